"""A sequence of data sets, learned one after the other from a pool that grows, under a budget of rows.

At every step the next data set joins the pool, the pool is scored with the current model, `budget` rows are picked, the
model is trained on them, and the pool is pruned for good. What is picked is a policy's choice:

- "adapt_inf": by `AdaptInf.select`, pruned by `AdaptInf.prune`;
- "balanced": at random with the same clusters and shares, pruned at random;
- "random": at random from the pool (replay), pruned at random;
- "sequential": at random from the newest data set alone, of which nothing is kept;
- "full": the whole pool, of which everything is kept, for as many trained rows as the others.

Source: arXiv 2410.10636, whose own formulas of relative gain and forgetting were not readable; those here are not
claimed to be the same.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .adapt_inf import AdaptInf, balanced_control, usable_rows
from .files import write_atomic
from .identity import data_identity
from .selection import MAX_SEED, Selection, checked_int, top_k, uniform_noise
from .store import Store
from .texts import DataSelectionError

Policy = Literal["adapt_inf", "balanced", "random", "sequential", "full"]
POLICIES = ("adapt_inf", "balanced", "random", "sequential", "full")
HEADER, START, STEP, MODEL = "lifelong.json", "start.json", "step.json", "model"


class Learner(Protocol):
    """The model that learns, and how: what `lifelong` is given."""

    def restore(self, folder: Path | None) -> None:
        """Make what `train` saved in a folder the current model; None for the model that all begins with."""

    def score(self, rows: Sequence[Any], folder: Path) -> Store:
        """Score rows with the current model into a folder, where an interrupted call goes on (`score_samples`)."""
        ...

    def train(self, rows: Sequence[Any], count: int, folder: Path) -> None:
        """Train the current model on `count` of the rows, repeated as often as the learner repeats any, and save it in
        the folder, which is made here. `count` is below the number of rows under the policy "full", and where the
        published shares (`AdaptInf.legacy`) add up to more than the budget."""

    def performance(self, skill: str) -> Mapping[str, float]:
        """Measures of the current model on a data set's test rows, by name, the higher the better: an accuracy, or
        where there is none exp(-loss)."""
        ...


@dataclass(frozen=True)
class Lifelong:
    """What a sequence gave.

    Args:
        skills: the data sets, in order: S of them.
        performance: S + 1 mappings: before the first step and after each, skill -> measure -> value.
        pool: the size of the pool at each step, (S,).
        picked: how many rows each step trained on, by the skill they came from, (S,).
        policy: who chose them.
    """

    skills: tuple[str, ...]
    performance: tuple[Mapping[str, Mapping[str, float]], ...]
    pool: tuple[int, ...]
    picked: tuple[Mapping[str, int], ...]
    policy: str

    @property
    def measures(self) -> list[str]:
        """Names of the measures."""
        return list(self.performance[0][self.skills[0]])

    def matrix(self, measure: str) -> NDArray[np.float64]:
        """(S + 1, S): row t after step t, the first before training; column s the skill s.

        Raises:
            DataSelectionError: there is no such measure.
        """
        if measure not in self.measures:
            raise DataSelectionError(f"measure {measure!r}: the learner measured {self.measures}; name one of them")
        return np.array([[at[skill][measure] for skill in self.skills] for at in self.performance])

    def summary(self, measure: str) -> dict[str, float | None]:
        """`final` (the mean over skills at the end), `relative_gain` over the model before training (None where that
        scores 0 on a skill) and `forgetting`."""
        matrix = self.matrix(measure)
        gain = relative_gain(matrix[-1], matrix[0]) if (matrix[0] > 0).all() else None
        return {"final": float(matrix[-1].mean()), "relative_gain": gain, "forgetting": forgetting(matrix)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields, and of each measure the matrix and the summary."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {
            **fields,
            "measures": {name: {"matrix": self.matrix(name).tolist(), **self.summary(name)} for name in self.measures},
        }


def relative_gain(final: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """(100 / S) sum_s P_s / P_s^ref, in per cent: 100 means as good as the reference.

    Args:
        final: (S,) performance at the end, the higher the better.
        reference: (S,) that of the model compared with, above 0.

    Raises:
        DataSelectionError: the two are not of one length, or a reference is not above 0.
    """
    final, reference = np.asarray(final, np.float64), np.asarray(reference, np.float64)
    if final.shape != reference.shape or final.ndim != 1 or not final.size:
        raise DataSelectionError(f"final {final.shape} and reference {reference.shape} must both be (S,), S above 0")
    if not (reference > 0).all():
        raise DataSelectionError(f"reference {reference.tolist()}: a gain relative to 0 or less says nothing")
    return float(100.0 * np.mean(final / reference))


def forgetting(matrix: NDArray[np.float64]) -> float:
    """(100 / S) sum_s max(0, (M_s - P_s(T)) / M_s) with M_s = max_{t < T} P_s(t), in per cent: 0 where each skill ends
    at least as well as it ever was.

    Args:
        matrix: (T, S) performance over time, the higher the better, none below 0; the first row may be that before
            training. A skill that was never above 0 has nothing to forget.

    Raises:
        DataSelectionError: there are fewer than two rows, or a value is below 0 or not a number.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or len(matrix) < 2 or not matrix.shape[1]:
        raise DataSelectionError(f"matrix {matrix.shape}: must be (T, S) with at least two rows, a time each")
    if not (matrix >= 0).all():
        raise DataSelectionError("performance must be 0 or more; of a loss give exp(-loss)")
    best = matrix[:-1].max(axis=0)
    lost = np.divide(best - matrix[-1], best, out=np.zeros_like(best), where=best > 0)
    return float(100.0 * np.mean(np.maximum(lost, 0.0)))


def lifelong(
    datasets: Mapping[str, Sequence[Any]],
    learner: Learner,
    *,
    budget: int,
    keep: int | None = None,
    policy: Policy = "adapt_inf",
    method: AdaptInf = AdaptInf(),  # noqa: B008 - frozen
    seed: int = 0,
    out_dir: str | os.PathLike[str],
    key: Mapping[str, Any] | None = None,
) -> Lifelong:
    """Learn a sequence of data sets, in a folder where an interrupted run goes on.

    Args:
        datasets: name -> rows, in order.
        learner: the model and how it is scored, trained and measured.
        budget: rows trained on at each step; a smaller pool is taken whole.
        keep: rows that stay in the pool after each step; None keeps all.
        policy: as in the module's text.
        method: of "adapt_inf", and of "balanced" its clusters and shares.
        seed: of picks and pruning.
        out_dir: one folder a step: `store`, `selection`, `model` (what `learner.train` saved) and `step.json`, which is
            written last.
        key: plain values that the learner depends on; a folder with others is refused.

    Returns:
        The performance on every skill before the first step and after each.

    Raises:
        DataSelectionError: a value is not as above, the folder belongs to another run, or as of the learner.
    """
    if policy not in POLICIES:
        raise DataSelectionError(f"policy={policy!r}: must be one of {', '.join(POLICIES)}")
    checked_int(budget, "budget", 1, 2**62, "it is the number of rows of a step")
    checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
    if keep is not None:
        checked_int(keep, "keep", 1, 2**62, "None keeps all rows")
    if not isinstance(datasets, Mapping):
        raise DataSelectionError(f"datasets is a {type(datasets).__name__}; give a mapping from names to rows")
    empty = [name for name, rows in datasets.items() if not len(rows)]
    if empty or not datasets:
        raise DataSelectionError(f"no rows in {empty or 'datasets'}; give at least one data set, and rows to each")
    out, names = Path(out_dir), list(datasets)
    _check_header(out, datasets, key or {}, budget=budget, keep=keep, policy=policy, method=method, seed=seed)
    rows = [row for name in names for row in datasets[name]]
    owner = [name for name in names for _ in datasets[name]]
    bounds = np.cumsum([0, *(len(datasets[name]) for name in names)])

    done = _records(out, len(names))
    learner.restore(out / _step(len(done) - 1) / MODEL if done else None)
    start = _read(out / START)
    if start is None:
        start = {"performance": _measured(learner, names)}
        _write(out / START, start)
    kept = np.array(done[-1]["kept"] if done else [], np.int64)
    for number in range(len(done), len(names)):
        folder = out / _step(number)
        new = np.arange(bounds[number], bounds[number + 1])
        pool = np.concatenate([kept, new])
        scored = _Scored(learner, [rows[i] for i in pool], folder / "store")
        picked = _pick(folder / "selection", scored, len(pool), len(new), budget, policy, method, seed + number)
        chosen = pool[picked.indices]
        if not (folder / MODEL).is_dir():
            beside = folder / f".{MODEL}"
            shutil.rmtree(beside, ignore_errors=True)
            learner.train([rows[i] for i in chosen], min(budget, len(chosen)), beside)
            if not beside.is_dir():
                raise DataSelectionError(
                    f"learner.train left no folder {beside}, from which the next step and a run that goes on begin; "
                    "save the model there"
                )
            beside.rename(folder / MODEL)
        # Read back even where it was just trained, so that a run that goes on has the very same model.
        learner.restore(folder / MODEL)
        kept = pool[_stay(scored, len(pool), keep, policy, method, seed + number)]
        counts = {name: sum(owner[i] == name for i in chosen) for name in names}
        record = {
            "skill": names[number],
            "pool": len(pool),
            "picked": {name: count for name, count in counts.items() if count},
            "kept": kept.tolist(),
            "performance": _measured(learner, names),
        }
        _write(folder / STEP, record)
        done.append(record)
    return Lifelong(
        tuple(names),
        (start["performance"], *(record["performance"] for record in done)),
        tuple(record["pool"] for record in done),
        tuple(record["picked"] for record in done),
        policy,
    )


class _Scored:
    """The store of a pool, scored with the model as it was before the step's training, and only where it is needed."""

    def __init__(self, learner: Learner, rows: Sequence[Any], folder: Path) -> None:
        self.learner, self.rows, self.folder = learner, rows, folder
        self.found: Store | None = None

    @property
    def store(self) -> Store:
        if self.found is None:
            self.found = self.learner.score(self.rows, self.folder)
        return self.found

    @property
    def filled(self) -> Store:
        """The store that an earlier attempt filled: the model has been trained since, and would score otherwise."""
        return self.found or Store(self.folder)


def _pick(
    folder: Path, scored: _Scored, rows: int, new: int, budget: int, policy: str, method: AdaptInf, seed: int
) -> Selection:
    """What is trained on, as row numbers of the pool; read back where an earlier attempt picked."""
    if (folder / "selection.json").is_file():
        return Selection.load(folder)
    if policy in ("adapt_inf", "balanced"):
        if policy == "balanced":
            method = balanced_control(method)
        picked = method.select(scored.store, budget=min(budget, len(usable_rows(scored.store))), seed=seed)
    else:
        first = rows - new if policy == "sequential" else 0
        count = rows if policy == "full" else min(budget, rows - first)
        indices = first + top_k(uniform_noise(seed, rows - first, stream=51), count)
        picked = Selection(indices, [{"selector": policy} for _ in indices], rows, seed, policy)
    picked.save(folder)
    return picked


def _stay(scored: _Scored, rows: int, keep: int | None, policy: str, method: AdaptInf, seed: int) -> NDArray[np.int64]:
    """Row numbers of the pool that stay in it."""
    if policy == "sequential":
        return np.empty(0, np.int64)
    if policy == "full" or keep is None or keep >= rows:
        return np.arange(rows)
    if policy == "adapt_inf":
        return method.prune(scored.filled, keep=keep, seed=seed).indices
    return top_k(uniform_noise(seed, rows, stream=52), keep)


def _measured(learner: Learner, names: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {name: {key: float(value) for key, value in learner.performance(name).items()} for name in names}
    for name, measures in found.items():
        wrong = {key: value for key, value in measures.items() if not 0 <= value < float("inf")}
        if wrong or not measures or set(measures) != set(found[names[0]]):
            raise DataSelectionError(
                f"learner.performance({name!r}) is {measures}; give the same measures of every data set, each a finite "
                "number of 0 or more: of a loss exp(-loss)"
            )
    return found


def _step(number: int) -> str:
    return f"step-{number:02d}"


def _records(out: Path, steps: int) -> list[dict[str, Any]]:
    """What the steps recorded that are done, in order."""
    found = []
    for number in range(steps):
        record = _read(out / _step(number) / STEP)
        if record is None:
            break
        found.append(record)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1).encode())


def _check_header(out: Path, datasets: Mapping[str, Any], key: Mapping[str, Any], **settings: Any) -> None:
    settings["method"] = dataclasses.asdict(settings["method"])
    data = {name: data_identity(rows) for name, rows in datasets.items()}
    header = json.loads(json.dumps({**settings, "datasets": data, "key": dict(key)}))
    found = _read(out / HEADER)
    if found is None:
        if out.is_dir() and any(out.glob("[!.]*")):
            raise DataSelectionError(f"{out} holds other files; give a new folder, or that of an earlier run")
        _write(out / HEADER, header)
        return
    # The order of the data sets counts, which mappings do not compare.
    other = [name for name in header if list(_flat(found.get(name))) != list(_flat(header[name]))]
    if other:
        listed = "; ".join(f"{name}: {found.get(name)!r} there, {header[name]!r} now" for name in other)
        raise DataSelectionError(f"{out} belongs to another run ({listed}); give another folder, or delete it")


def _flat(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else [value]
