"""Pick the rows of a pool whose gradients point where those of a target set do.

Source: LESS (arXiv 2402.04333), which scores a training sample by the cosine of its gradient to the mean of a subtask's
and takes the highest subtask. Here both gradients are plain ones of one adapter; LESS takes those of Adam for the pool
and sums over checkpoints, weighted by their learning rates.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .clusters import ROWS_AT_ONCE, unit_rows
from .selection import MAX_SEED, Selection, checked_int
from .store import Store
from .texts import DataSelectionError

Turns = Literal["max", "round_robin"]
# What two stores must share for their vectors to be comparable.
SHARED = ("model", "adapter", "layers", "projection", "seed")


def target_scores(
    store: Store, target: Store, tasks: Sequence[str] | None = None
) -> tuple[NDArray[np.float64], list[str]]:
    """How well the rows of a pool serve each task of a target.

    Args:
        store: of the pool, N rows.
        target: of the target rows, scored with the same model, adapter, layers, projection and seed.
        tasks: the task of each target row; None for one task.

    Returns:
        (N, M) the mean cosine of a row's gradient to those of the task's rows, 0 for a row without an answer; and the
        names of the M tasks, sorted.

    Raises:
        DataSelectionError: the vectors of the stores cannot be compared, or a task has no row with an answer.
    """
    other = [name for name in SHARED if store.key.get(name) != target.key.get(name)]
    if other:
        listed = "; ".join(f"{name}: {store.key.get(name)!r} and {target.key.get(name)!r}" for name in other)
        raise DataSelectionError(f"the vectors of pool and target cannot be compared ({listed}); score both alike")
    owners = ["target"] * len(target) if tasks is None else list(tasks)
    if len(owners) != len(target):
        raise DataSelectionError(f"{len(owners)} tasks for {len(target)} target rows; give one a row")
    units = unit_rows(target.vectors)
    names, means = sorted(set(owners)), []
    for name in names:
        own = units[[i for i, owner in enumerate(owners) if owner == name]]
        own = own[own.any(axis=1)]
        if not len(own):
            raise DataSelectionError(f"no target row of the task {name!r} has an answer token")
        means.append(own.mean(axis=0, dtype=np.float64))
    directions, found = np.stack(means, axis=1), np.empty((len(store), len(names)))
    for first in range(0, len(store), ROWS_AT_ONCE):
        found[first : first + ROWS_AT_ONCE] = unit_rows(store.vectors[first : first + ROWS_AT_ONCE]) @ directions
    return found, names


def select_for_target(
    store: Store,
    target: Store,
    *,
    budget: int,
    tasks: Sequence[str] | None = None,
    turns: Turns = "max",
    seed: int = 0,
) -> Selection:
    """Pick the `budget` rows that serve a target best.

    Args:
        store, target, tasks: as of `target_scores`.
        budget: how many.
        turns: "max" ranks rows by their best task (LESS); "round_robin" lets the tasks, in the order of their names,
            pick in turn the best row left for each.
        seed: of the random control.

    Returns:
        The selection; reasons: `task` and `score`, the mean cosine.

    Raises:
        DataSelectionError: as of `target_scores`, or the budget exceeds the rows with an answer.
    """
    if turns not in ("max", "round_robin"):
        raise DataSelectionError(f"turns={turns!r}: must be 'max' or 'round_robin'")
    checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
    scores, names = target_scores(store, target, tasks)
    usable = np.flatnonzero(store.norms > 0)  # NaN, and so left out, where there is no answer
    checked_int(budget, "budget", 1, len(usable), f"the pool has {len(usable)} rows with an answer")
    if turns == "max":
        best = scores[usable].max(axis=1)
        rows = usable[np.argsort(-best, kind="stable")[:budget]].tolist()
        owners = scores[rows].argmax(axis=1).tolist()
    else:
        rows, owners = _in_turn(scores, usable, budget)
    picks = sorted(zip(rows, owners, strict=True))
    reasons = [{"task": names[task], "score": float(scores[row, task])} for row, task in picks]
    indices = np.array([row for row, _ in picks], np.int64)
    return Selection(indices, reasons, len(store), seed, f"target_{turns}")


def _in_turn(scores: NDArray[np.float64], usable: NDArray[np.int64], budget: int) -> tuple[list[int], list[int]]:
    ranked = [iter(usable[np.argsort(-column, kind="stable")].tolist()) for column in scores[usable].T]
    taken, rows, owners = set[int](), list[int](), list[int]()
    while len(rows) < budget:
        task = len(rows) % len(ranked)
        row = next(row for row in ranked[task] if row not in taken)
        taken.add(row)
        rows.append(row)
        owners.append(task)
    return rows, owners
