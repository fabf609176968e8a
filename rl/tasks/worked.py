"""Worked puzzles of several kinds: short tables with a right solution, as text to train on."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RlError
from . import TASKS, get_task
from .base import table
from .splits import draw_distinct, size_range

VALUES = (1, 99)
Rows = tuple[tuple[int, ...], ...]


def worked_examples(
    kind: str,
    size: int,
    seed: int = 0,
    n: int | Sequence[int] = (3, 5),
    split: str = "train",
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, str]]:
    """`size` different puzzles of one kind with their solutions: {"prompt", "completion", "kind"}.

    kind: "sorting" (rows by increasing value), "arithmetic" (a sum, step by step), "scheduling" (as many
    activities as possible that do not overlap, by earliest end) or the name of a task, such as "lis". n: rows of
    a table, or a pair [low, high] drawn first. split: "train", "validation" or "test", decided by a hash of the
    table as in `CertificateTask.instances`; for a task they are that task's own splits. options: of a task. The
    same arguments give the same list; a larger size begins with the same puzzles.

    Raises RlError for an unknown kind, option or split, a bad size or n, or where a split has no more puzzles.
    """
    if kind in TASKS:
        task = get_task(kind, **(options or {}))
        pairs = [(task.prompt(item), task.completion(item)) for item in task.instances(size, n, seed, split)]
    elif kind not in KINDS:
        raise RlError(f"unknown kind of worked puzzle {kind!r}; kinds: {', '.join((*KINDS, *TASKS))}")
    elif options:
        raise RlError(f"the puzzle {kind!r} has no options, got {dict(options)}; only tasks have: {', '.join(TASKS)}")
    else:
        pairs = KINDS[kind](size, n, seed, split)
    return [{"prompt": prompt, "completion": completion, "kind": kind} for prompt, completion in pairs]


def _sorting(size: int, n: int | Sequence[int], seed: int, split: str) -> list[tuple[str, str]]:
    if size_range(n)[1] > VALUES[1]:
        raise RlError(f"a table to sort holds at most {VALUES[1]} different values, got n={n!r}")
    tables = draw_distinct("sorting", _distinct_values, repr, size, n, seed, split)
    return [(sorting_prompt(rows), sorting_completion(rows)) for rows in tables]


def _arithmetic(size: int, n: int | Sequence[int], seed: int, split: str) -> list[tuple[str, str]]:
    tables = draw_distinct("arithmetic", _any_values, repr, size, n, seed, split)
    return [(arithmetic_prompt(rows), arithmetic_completion(rows)) for rows in tables]


def _scheduling(size: int, n: int | Sequence[int], seed: int, split: str) -> list[tuple[str, str]]:
    tables = draw_distinct("scheduling", _activities, repr, size, n, seed, split)
    return [(scheduling_prompt(rows), scheduling_completion(rows)) for rows in tables]


KINDS: dict[str, Callable[..., list[tuple[str, str]]]] = {
    "sorting": _sorting,
    "arithmetic": _arithmetic,
    "scheduling": _scheduling,
}


def sorting_prompt(rows: Rows) -> str:
    """The question; rows (value,)."""
    return "\n".join(
        (
            "Sort the rows by value, smallest first.",
            table(("value",), rows),
            "Reply with the values in order, then their ids:",
            "values v < v < v",
            r"\ids{id,id,id}",
        )
    )


def sorting_completion(rows: Rows) -> str:
    """The values in order and their ids."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    values = " < ".join(str(rows[i][0]) for i in order)
    return f"values {values}\n\\ids{{{','.join(str(i + 1) for i in order)}}}"


def arithmetic_prompt(rows: Rows) -> str:
    """The question; rows (value,)."""
    return "\n".join(
        (
            "Add up all values.",
            table(("value",), rows),
            "Reply with one sum per line, from top to bottom, then the total:",
            "v + v = sum",
            r"\answer{total}",
        )
    )


def arithmetic_completion(rows: Rows) -> str:
    """The running sums, one addition a line, and the total."""
    total = rows[0][0]
    lines = []
    for (value,) in rows[1:]:
        lines.append(f"{total} + {value} = {total + value}")
        total += value
    return "\n".join((*lines, f"\\answer{{{total}}}"))


def scheduling_prompt(rows: Rows) -> str:
    """The question; rows (start, end), half-open, so that touching activities do not overlap."""
    return "\n".join(
        (
            "Choose as many activities as possible that do not overlap; one may start when another ends.",
            table(("start", "end"), rows),
            "Reply with the chosen times, their ids and their count:",
            "times start-end, start-end",
            r"\ids{id,id} \answer{count}",
        )
    )


def scheduling_completion(rows: Rows) -> str:
    """The schedule that always takes the activity that ends first; of equals, the lower id."""
    chosen: list[int] = []
    free_from = -1
    for i in sorted(range(len(rows)), key=lambda i: (rows[i][1], i)):
        start, end = rows[i]
        if start >= free_from:
            chosen.append(i)
            free_from = end
    times = ", ".join(f"{rows[i][0]}-{rows[i][1]}" for i in chosen)
    ids = ",".join(str(i + 1) for i in chosen)
    return f"times {times}\n\\ids{{{ids}}} \\answer{{{len(chosen)}}}"


def _distinct_values(rng: random.Random, n: int) -> Rows:
    return tuple((value,) for value in rng.sample(range(VALUES[0], VALUES[1] + 1), n))


def _any_values(rng: random.Random, n: int) -> Rows:
    return tuple((rng.randint(*VALUES),) for _ in range(n))


def _activities(rng: random.Random, n: int) -> Rows:
    starts = [rng.randint(0, 40) for _ in range(n)]
    return tuple((start, start + rng.randint(2, 15)) for start in starts)
