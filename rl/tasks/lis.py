"""The task "lis": the longest strictly increasing subsequence of a column of values."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import fmean, pstdev, quantiles
from typing import Any

from ..errors import RlError
from .base import CertificateTask, Check, Instance, Solution, table
from .options import integer_range, truth, whole_rows
from .parsing import Ids
from .splits import MAX_TRIES, as_random, size_range
from .subsequence import RULES, critical_levels, is_increasing, longest

# Above this size random rows have a unique optimum too seldom (about 15 % at 16, 2 % at 64).
REJECTION_MAX_N = 16


class Lis(CertificateTask):
    """Rows `id | value`; choose as many rows as possible whose values rise strictly from top to bottom.

    values: the inclusive range (low, high) from which values are drawn, independently and uniformly.
    unique: draw only instances with a single optimal set of rows (which, from two rows on, also means an
        optimum of at least 2). The test needs no counting, see `critical_levels`.
    paper_compat: the sampling of arXiv 2510.27044, appendix A: values 1 to 1000, rejection at any size, and n
        drawn anew on each rejection, which favours few rows. Prompts stay ours.

    The task is that of arXiv 2510.27044, section 2 and appendix A. Departures: the size is drawn first (see
    `CertificateTask.instances`); any optimal certificate counts, not one reference sequence; above 16 rows an
    instance is repaired into uniqueness instead of rejected, which favours longer optima a little, so
    `Instance.generator` records "rejection", "repair" or, with unique=False, "free".

    Raises RlError for a range that is empty, a single value with unique=True, or options beside paper_compat.
    """

    name = "lis"
    version = 1
    columns = ("value",)

    def __init__(self, values: Sequence[int] = (1, 99), unique: bool = True, paper_compat: bool = False):
        self.values = integer_range("values", values)
        self.unique = truth("unique", unique)
        self.paper_compat = truth("paper_compat", paper_compat)
        if paper_compat:
            if (self.values, unique) != ((1, 99), True):
                raise RlError("paper_compat fixes values and unique: leave them out")
            self.values = (1, 1000)
        if unique and values[0] == values[1]:
            raise RlError(f"values {list(values)} is a single value, so no optimum is unique: widen the range")
        self.heuristics = {name: partial(_apply, rule) for name, rule in RULES.items()}
        self.symmetries = {
            "monotone_map": self.monotone_map,
            "reverse_negate": self.reverse_negate,
            "append_low": self.append_low,
            "prepend_high": self.prepend_high,
        }

    def options(self) -> dict[str, Any]:
        """The options given, for seeding and for records."""
        given = {"values": self.values, "unique": self.unique}
        return {**given, "paper_compat": True} if self.paper_compat else given

    def instance(self, values: Sequence[int]) -> Instance:
        """The instance with these values, top to bottom. Raises RlError for none, or for other than whole numbers."""
        return Instance(whole_rows([(value,) for value in values]))

    def generate(self, rng: Any, n: int | Sequence[int]) -> Instance:
        """A random instance of n rows, or of a size drawn first from [low, high].

        rng: an int seed, a random.Random or a numpy Generator. Raises RlError for a bad n or rng, or where
        the range of values is too narrow to find a unique optimum.
        """
        source = as_random(rng)
        low, high = size_range(n)
        if self.paper_compat:
            return replace(self.instance(self._reject(source, low, high)), generator="rejection")
        rows = source.randint(low, high)
        if not self.unique:
            return replace(self.instance(self._draw(source, rows)), generator="free")
        if rows <= REJECTION_MAX_N:
            return replace(self.instance(self._reject(source, rows, rows)), generator="rejection")
        return replace(self.instance(self._repair(source, rows)), generator="repair")

    def _draw(self, rng: random.Random, rows: int) -> list[int]:
        return [rng.randint(*self.values) for _ in range(rows)]

    def _reject(self, rng: random.Random, low: int, high: int) -> list[int]:
        for _ in range(MAX_TRIES):
            values = self._draw(rng, rng.randint(low, high) if low < high else low)
            levels = critical_levels(values)
            if len(levels) > 1 and all(len(level) == 1 for level in levels.values()):
                return values
        raise self._too_narrow(high)

    def _repair(self, rng: random.Random, rows: int) -> list[int]:
        """Draws one of the elements that share a level anew until every level holds one."""
        values = self._draw(rng, rows)
        for _ in range(MAX_TRIES):
            levels = critical_levels(values).values()
            crowded = [place for level in levels if len(level) > 1 for place in level]
            if not crowded:
                return values
            values[rng.choice(crowded)] = rng.randint(*self.values)
        raise self._too_narrow(rows)

    def _too_narrow(self, rows: int) -> RlError:
        return RlError(
            f"found no unique optimum for n={rows} with values {list(self.values)} in {MAX_TRIES} draws: "
            "widen values, lower n or set unique=False"
        )

    def prompt(self, instance: Instance, hint: bool = False) -> str:
        """The question in some 60 tokens for five rows; `hint` adds the textbook method in one line."""
        lines = [
            "Choose the most rows whose values strictly increase downwards.",
            table(self.columns, instance.rows),
            "Reply: values v < v",
            r"\ids{id,id} \answer{count}",
        ]
        if hint:
            lines.insert(1, "Hint: for each row find the best chain that ends there, then walk back from the longest.")
        return "\n".join(lines)

    def solve(self, instance: Instance) -> Solution:
        """Patience sorting with an exact count of the optima, O(n log n)."""
        ids, n_optima = longest(_values(instance))
        return Solution(len(ids), ids, n_optima)

    def check(self, instance: Instance, certificate: Sequence[int]) -> Check:
        """Feasible: ids of the instance, none twice, whose values strictly increase in row order.

        The ids may come in any order; `order_ok` says whether they came increasing.
        """
        ids, rows = sorted(certificate), instance.rows
        feasible = not ids or (ids[0] > 0 and ids[-1] <= len(rows) and is_increasing([rows[i - 1][0] for i in ids]))
        value = len(ids) if feasible else 0
        optimal = feasible and value == self.solution(instance).value
        return Check(feasible, value, optimal, ids == list(certificate) and (feasible or len(set(ids)) == len(ids)))

    def write(self, instance: Instance, ids: Sequence[int]) -> str:
        r"""`values 3 < 9 < 12`, then `\ids{1,4,5} \answer{3}`; unknown ids have no values."""
        chosen = " < ".join(str(instance.rows[i - 1][0]) for i in ids if 1 <= i <= instance.n)
        return f"values {chosen}\n\\ids{{{','.join(map(str, ids))}}} \\answer{{{len(ids)}}}"

    def features(self, instance: Instance) -> dict[str, float]:
        """The input-only features of arXiv 2510.27044, appendix E, less its greedy, beam and tail features.

        (Those run an algorithm; `heuristics` has them.) All are floats, ratios in [0, 1].
        """
        return _features(_values(instance))

    def monotone_map(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """Other values of the range in the same order; ids stay."""
        old = sorted({row[0] for row in instance.rows})
        low, high = min(self.values[0], old[0]), max(self.values[1], old[-1])
        new = dict(zip(old, sorted(as_random(rng).sample(range(low, high + 1), len(old))), strict=True))
        return _changed(instance, [new[row[0]] for row in instance.rows], "monotone_map"), _same

    def reverse_negate(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """The rows upside down, each value v as smallest + largest - v; id i becomes n + 1 - i."""
        values = _values(instance)
        ends = min(values) + max(values)
        changed = _changed(instance, [ends - value for value in reversed(values)], "reverse_negate")
        return changed, partial(_mirror, instance.n)

    def append_low(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """A last row below all others (equal to the smallest, if that is the end of the range); ids stay."""
        values = _values(instance)
        smallest = min(values)
        low = min(self.values[0], smallest)
        value = as_random(rng).randint(low, max(low, smallest - 1))
        return _changed(instance, [*values, value], "append_low"), _same

    def prepend_high(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """A first row above all others (equal to the largest, if that ends the range); ids grow by 1."""
        values = _values(instance)
        largest = max(values)
        high = max(self.values[1], largest)
        value = as_random(rng).randint(min(high, largest + 1), high)
        return _changed(instance, [value, *values], "prepend_high"), partial(_shift, 1)


def _values(instance: Instance) -> tuple[int, ...]:
    return tuple(row[0] for row in instance.rows)


def _apply(rule: Any, instance: Instance) -> Ids:
    return rule(_values(instance))


def _changed(instance: Instance, values: Sequence[int], how: str) -> Instance:
    return Instance(tuple((value,) for value in values), f"{instance.generator}+{how}")


def _same(ids: Sequence[int]) -> Ids:
    return tuple(sorted(ids))


def _shift(by: int, ids: Sequence[int]) -> Ids:
    return tuple(sorted(i + by for i in ids))


def _mirror(n: int, ids: Sequence[int]) -> Ids:
    return tuple(sorted(n + 1 - i for i in ids))


def _features(values: tuple[int, ...]) -> dict[str, float]:
    n = len(values)
    steps = [b - a for a, b in pairwise(values)] or [0]
    pairs = [(a, b) for i, a in enumerate(values) for b in values[i + 1 :]] or [(0, 0)]
    signs = [(step > 0) - (step < 0) for step in steps]
    turns = [a != b for a, b in pairwise(signs)] or [False]
    q1, q2, q3 = quantiles(values, n=4, method="inclusive") if n > 1 else [float(values[0])] * 3
    rising = fmean(a < b for a, b in pairs)
    falling = fmean(a > b for a, b in pairs)
    return {
        "n": float(n),
        "two_sqrt_n": 2 * n**0.5,
        "min": float(min(values)),
        "max": float(max(values)),
        "range": float(max(values) - min(values)),
        "mean": fmean(values),
        "std": pstdev(values),
        "q1": q1,
        "median": q2,
        "q3": q3,
        "distinct_ratio": len(set(values)) / n,
        "step_up_ratio": fmean(sign > 0 for sign in signs),
        "step_down_ratio": fmean(sign < 0 for sign in signs),
        "step_mean": fmean(steps),
        "step_std": pstdev(steps),
        "turn_ratio": fmean(turns),
        "pair_up_ratio": rising,
        "pair_down_ratio": falling,
        "pair_balance": rising - falling,
        "longest_rise": float(_longest_stretch(signs, 1)),
        "longest_fall": float(_longest_stretch(signs, -1)),
        "record_highs": float(sum(all(b < a for b in values[:i]) for i, a in enumerate(values))),
        "record_lows": float(sum(all(b > a for b in values[:i]) for i, a in enumerate(values))),
    }


def _longest_stretch(signs: Sequence[int], sign: int) -> int:
    """Rows in the longest stretch of neighbours whose steps all have this sign."""
    best = length = 1
    for step in signs:
        length = length + 1 if step == sign else 1
        best = max(best, length)
    return best
