"""The task "activity": choose as many activities as possible that do not overlap."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

from ..errors import RlError
from .base import CertificateTask, Check, Instance, Solution, permuted, table
from .intervals import (
    END,
    SHORTCUTS,
    best_schedule,
    by_end,
    conflicts,
    has_one_largest,
    is_schedule,
    loose_rows,
)
from .options import integer_range, truth, unknown, whole_rows
from .parsing import Ids
from .splits import MAX_TRIES, as_random, size_range

REJECTION_MAX_N = 16
GENERATORS = ("auto", "rejection", "repair", "planted")

Rows = list[tuple[int, ...]]


class Activity(CertificateTask):
    """Rows `id | start | end`; choose as many rows as possible that do not overlap.

    Activities are half-open: one may start when another ends. The ids are stated in the order of their ends,
    and any largest schedule counts as optimal.

    horizon: starts are drawn uniformly from 0 to this. None: 540 up to 16 rows and in proportion above, so
        that long tables are not all overlap.
    duration: the inclusive range (low, high) of durations, drawn uniformly.
    unique: draw only instances with a single largest schedule, see `intervals.loose_rows` for the test.
    generator: how that is reached. "rejection" draws whole instances until one fits (slow above 16 rows,
        where about one in 130 does). "repair" draws the offending rows anew. "planted" lays out disjoint
        rows and adds others that each overlap two or more of them, which fits by construction and ignores
        `horizon` and, for the added rows, `duration`. "auto": rejection up to 16 rows, then repair.
        `Instance.generator` records which it was ("free" without unique).
    paper_compat: the sampling of arXiv 2510.27044, appendix A: the options above at their defaults, rejection
        at any size, and n drawn anew on each rejection, which favours few rows. Prompts stay ours.

    The task is that of arXiv 2510.27044, section 2. Among its small unique instances the rule "fewest
    conflicts first" is nearly always right (0.97 at 5 to 16 rows), so that they tell little about how a model
    solves them: for that take "activity_weighted", or planted instances of 16 rows and more, of which 11 per
    cent (38 at 32 rows) expose every rule. The exact rules "earliest end first" and "latest start first" are
    not among `heuristics`.

    Raises RlError for bad options.
    """

    name = "activity"
    version = 1
    columns: tuple[str, ...] = ("start", "end")
    goal = "Choose as many activities as possible that do not overlap; one may start when another ends."
    answer = "count"
    form: tuple[str, ...] = ("times start-end, start-end",)
    method = "Hint: sort by end, then take each activity that starts no earlier than the last one taken ends."
    rules: dict[str, Callable[..., Ids]] = SHORTCUTS

    def __init__(
        self,
        horizon: int | None = None,
        duration: Sequence[int] = (10, 120),
        unique: bool = True,
        generator: str = "auto",
        paper_compat: bool = False,
    ):
        if horizon is not None and (type(horizon) is not int or horizon < 0):
            raise RlError(f"horizon must be a whole number of minutes or None, got {horizon!r}")
        if generator not in GENERATORS:
            raise unknown("generator", generator, GENERATORS)
        self.duration = integer_range("duration", duration, lowest=1)
        self.horizon = horizon
        self.unique = truth("unique", unique)
        self.generator = generator
        self.paper_compat = truth("paper_compat", paper_compat)
        if paper_compat and (horizon, self.duration, unique, generator) != (None, (10, 120), True, "auto"):
            raise RlError("paper_compat fixes horizon, duration, unique and generator: leave them out")
        self.heuristics = {name: partial(_apply, rule) for name, rule in self.rules.items()}
        self.symmetries = {
            "shift": self.shift,
            "scale": self.scale,
            "reverse_time": self.reverse_time,
            "permute_rows": self.permute_rows,
            "add_distractor": self.add_distractor,
        }

    def options(self) -> dict[str, Any]:
        """The options given, for seeding and for records."""
        given = {name: getattr(self, name) for name in ("horizon", "duration", "unique", "generator")}
        return {**given, "paper_compat": True} if self.paper_compat else given

    def instance(self, rows: Sequence[Sequence[int]]) -> Instance:
        """The instance with these rows. Raises RlError for none, for other than whole numbers, for rows of another
        width, or that end before they start."""
        whole, width = whole_rows(rows), len(self.columns)
        for row in whole:
            if len(row) != width or row[0] >= row[1] or (width > 2 and row[2] < 1):
                raise RlError(f"an activity is {self.columns} with start < end and weight > 0, got {row}")
        return Instance(whole)

    def generate(self, rng: Any, n: int | Sequence[int]) -> Instance:
        """A random instance of n rows, or of a size drawn first from [low, high].

        rng: an int seed, a random.Random or a numpy Generator. Raises RlError for a bad n or rng, or where no
        unique optimum was found.
        """
        source = as_random(rng)
        sizes = size_range(n)
        if not self.unique:
            return Instance(tuple(self._draw(source, source.randint(*sizes))), "free")
        if self.paper_compat:
            return Instance(tuple(self._reject(source, *sizes)), "rejection")
        rows = source.randint(*sizes)
        kind = self.generator
        if kind == "auto":
            kind = "rejection" if rows <= REJECTION_MAX_N else "repair"
        if kind == "rejection":
            return Instance(tuple(self._reject(source, rows, rows)), kind)
        make = self._repair if kind == "repair" else self._plant
        return Instance(tuple(make(source, rows)), kind)

    def _draw(self, rng: random.Random, rows: int) -> Rows:
        low, high = self.duration
        starts, lengths = self._horizon(rows) + 1, high - low + 1
        rand = rng.random  # three times as fast as randint, and these ranges are tiny beside 2**53
        return [(start := int(rand() * starts), start + low + int(rand() * lengths)) for _ in range(rows)]

    def _horizon(self, rows: int) -> int:
        return 540 * max(rows, 16) // 16 if self.horizon is None else self.horizon

    def _loose(self, rows: Rows) -> list[int]:
        """Places whose redrawing may make the optimum unique; empty where it is."""
        return list(loose_rows(rows))

    def _is_unique(self, rows: Rows) -> bool:
        return has_one_largest(rows)

    def _reject(self, rng: random.Random, low: int, high: int) -> Rows:
        for _ in range(MAX_TRIES):
            rows = self._draw(rng, rng.randint(low, high) if low < high else low)
            if self._is_unique(rows):
                return rows
        raise self._none_found(high)

    def _repair(self, rng: random.Random, n: int) -> Rows:
        rows = self._draw(rng, n)
        for _ in range(MAX_TRIES):
            loose = self._loose(rows)
            if not loose:
                return rows
            place = rng.choice(loose)
            # drawn with the others' horizon, so that a repaired row is like any other
            rows[place] = self._draw(rng, n)[0]
        raise self._none_found(n)

    def _plant(self, rng: random.Random, n: int) -> Rows:
        """Disjoint rows in time order, and others that each overlap two or more of them; shuffled."""
        for _ in range(MAX_TRIES):
            cores: Rows = []
            end = 0
            # few of them, so that each has more neighbours than the rows across, and with gaps to start in:
            # otherwise the rules "fewest conflicts" and "earliest start" would always be right
            for _ in range(rng.randint(max(2, n // 4), max(2, n // 2))):
                start = end + rng.randint(0, 2 * self.duration[0])
                end = start + rng.randint(*self.duration)
                cores.append(self._core(rng, start, end))
            across = [self._across(rng, cores) for _ in range(n - len(cores))]
            rows = cores + [row for row in across if row]
            if len(rows) == n:
                rng.shuffle(rows)
                return rows
        raise self._none_found(n)

    def _core(self, rng: random.Random, start: int, end: int) -> tuple[int, ...]:
        return start, end

    def _across(self, rng: random.Random, cores: Rows) -> tuple[int, ...]:
        """A row that overlaps two or more neighbouring cores; empty where its weight would be too large."""
        first = rng.randrange(len(cores) - 1)
        last = first + 1 if rng.random() < 0.8 else rng.randrange(first + 1, len(cores))
        opens = cores[first - 1][1] if first else 0
        return rng.randrange(opens, cores[first][1]), rng.randint(cores[last][0] + 1, cores[last][1])

    def _none_found(self, n: int) -> RlError:
        return RlError(
            f"found no unique optimum for n={n} with {self.options()} in {MAX_TRIES} draws: "
            "try another generator, wider ranges, a smaller n or unique=False"
        )

    def prompt(self, instance: Instance, hint: bool = False) -> str:
        """The question; `hint` adds the method in one line."""
        lines = [
            self.goal,
            table(self.columns, instance.rows),
            f"Reply with all ids sorted by end, what you choose, its ids in that order and its {self.answer}:",
            "sorted id,id,id",
            *self.form,
            rf"\ids{{id,id}} \answer{{{self.answer}}}",
        ]
        if hint:
            lines.insert(1, self.method)
        return "\n".join(lines)

    def solve(self, instance: Instance) -> Solution:
        """Dynamic programming in the order of ends with an exact count of the optima, O(n log n)."""
        value, ids, n_optima, _ = best_schedule(instance.rows)
        return Solution(value, ids, n_optima)

    def check(self, instance: Instance, certificate: Sequence[int]) -> Check:
        """Feasible: ids of the instance, none twice, that do not overlap; worth the sum of their weights.

        The ids may come in any order; `order_ok` says whether they came in the order of their ends (and fit).
        """
        rows = instance.rows
        if certificate and (min(certificate) < 1 or max(certificate) > len(rows)):
            return Check(False, 0, False, False)
        # an id stated twice needs no test of its own: a row overlaps itself
        chosen = [rows[i - 1] for i in certificate]
        if not (order_ok := is_schedule(chosen)) and not is_schedule(sorted(chosen, key=END)):
            return Check(False, 0, False, False)
        value = self._worth(chosen, len(chosen))
        return Check(True, value, value == self.solution(instance).value, order_ok)

    def write(self, instance: Instance, ids: Sequence[int]) -> str:
        r"""`sorted 3,1,2`, `times 0-20, 30-45`, then `\ids{3,2} \answer{2}`; unknown ids have no times."""
        chosen = [instance.rows[i - 1] for i in ids if 1 <= i <= instance.n]
        return "\n".join(
            (
                f"sorted {','.join(map(str, self.preface(instance)))}",
                f"times {', '.join(f'{row[0]}-{row[1]}' for row in chosen)}",
                *self._sum(chosen),
                rf"\ids{{{','.join(map(str, ids))}}} \answer{{{self._worth(chosen, len(ids))}}}",
            )
        )

    def _sum(self, chosen: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
        return ()

    def _worth(self, chosen: Sequence[tuple[int, ...]], ids: int) -> int:
        return ids

    def preface(self, instance: Instance) -> Ids:
        """All ids by end; of equals, the lower first."""
        return tuple(place + 1 for place in by_end(instance.rows))

    def key(self, instance: Instance) -> str:
        """The rows in sorted order, from start 0: neither their order nor a shift in time makes a new instance."""
        first = min(row[0] for row in instance.rows)
        rows = sorted((row[0] - first, row[1] - first, *row[2:]) for row in instance.rows)
        return ";".join(",".join(map(str, row)) for row in rows)

    def features(self, instance: Instance) -> dict[str, float]:
        """Sizes, times, overlaps and, if there are any, weights; nothing from a rule that builds a schedule."""
        return _features(instance.rows)

    def shift(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """All times later by one random amount; ids stay."""
        by = as_random(rng).randint(1, 120)
        return changed(instance, [(row[0] + by, row[1] + by, *row[2:]) for row in instance.rows], "shift")

    def scale(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """All times twice or thrice as large; ids stay."""
        by = as_random(rng).randint(2, 3)
        return changed(instance, [(row[0] * by, row[1] * by, *row[2:]) for row in instance.rows], "scale")

    def reverse_time(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """Each row (s, e) as (T - e, T - s), T the last end; ids stay, their order turns round."""
        last = max(row[1] for row in instance.rows)
        return changed(instance, [(last - row[1], last - row[0], *row[2:]) for row in instance.rows], "reverse_time")

    def permute_rows(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """The rows in another order, with new ids."""
        other, ids = permuted(rng, instance)
        return other, partial(_carry, other.rows, ids)

    def add_distractor(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """One more row, last in the table, that belongs to no optimal schedule; ids stay.

        Without weights it overlaps two neighbours of the solution, so that the largest schedule stays unique
        (see `loose_rows`; an optimum of one row leaves the instance as it was).
        """
        ids = self.solution(instance).certificate
        if len(ids) < 2:
            return changed(instance, instance.rows, "add_distractor")
        cores = [instance.rows[i - 1] for i in ids]
        row = self._across(as_random(rng), cores)
        return changed(instance, [*instance.rows, row], "add_distractor")


def _apply(rule: Callable[..., Ids], instance: Instance) -> Ids:
    return rule(instance.rows)


def changed(instance: Instance, rows: Sequence[tuple[int, ...]], how: str) -> tuple[Instance, Any]:
    """The instance with other rows under the same ids, and the map of certificates into their new order."""
    other = Instance(tuple(rows), f"{instance.generator}+{how}")
    return other, partial(_carry, other.rows, None)


def _carry(rows: Sequence[tuple[int, ...]], new: dict[int, int] | None, ids: Sequence[int]) -> Ids:
    """The ids under their new names, in the order of the ends of the new rows."""
    named = [new[i] for i in ids] if new else list(ids)
    return tuple(sorted(named, key=lambda i: (rows[i - 1][1], i)))


def _features(rows: Sequence[tuple[int, ...]]) -> dict[str, float]:
    n = len(rows)
    starts, ends = sorted(row[0] for row in rows), sorted(row[1] for row in rows)
    lengths = [row[1] - row[0] for row in rows]
    crossing = conflicts(rows)
    span = ends[-1] - starts[0]
    gaps = [b - a for a, b in pairwise(starts)] or [0]
    found = {
        "n": float(n),
        "first_start": float(starts[0]),
        "last_end": float(ends[-1]),
        "span": float(span),
        "start_mean": fmean(starts),
        "start_std": pstdev(starts),
        "start_gap_std": pstdev(gaps),
        "length_min": float(min(lengths)),
        "length_max": float(max(lengths)),
        "length_mean": fmean(lengths),
        "length_std": pstdev(lengths),
        "load": sum(lengths) / span,
        "conflict_ratio": sum(crossing) / max(1, n * (n - 1)),
        "conflicts_min": float(min(crossing)),
        "conflicts_max": float(max(crossing)),
        "conflicts_std": pstdev(crossing),
        "free_rows": float(crossing.count(0)),
        "rows_sorted_by_end": fmean(a[1] <= b[1] for a, b in pairwise(rows)) if n > 1 else 1.0,
    }
    if len(rows[0]) > 2:
        weights = [row[2] for row in rows]
        found |= {
            "weight_min": float(min(weights)),
            "weight_max": float(max(weights)),
            "weight_mean": fmean(weights),
            "weight_std": pstdev(weights),
            "weight_total": float(sum(weights)),
            "weight_per_time": sum(weights) / sum(lengths),
        }
    return found
