"""The task "activity_weighted": choose activities that do not overlap and weigh the most."""

import random
from collections.abc import Sequence
from typing import Any

from .activity import Activity, Rows, changed
from .base import Instance
from .intervals import WEIGHTED_SHORTCUTS, best_schedule
from .options import integer_range
from .splits import as_random


class WeightedActivity(Activity):
    """Rows `id | start | end | weight`; choose rows that do not overlap with the largest total weight.

    weights: the inclusive range (low, high), 1 or more, drawn uniformly. The other options are those of
    "activity", except that there is no `paper_compat`: the paper has no weights. Here no simple rule is nearly
    right: on unique instances of 5 to 16 rows the best one, heaviest first, finds about three in four, and no
    rule that ignores weights one in four. Rejection stays cheap at any size, as weights seldom tie.

    A planted row that overlaps solution rows of total weight W has a weight w with 2 w < W. Those rows are
    then the only optimum: of disjoint planted rows at most two overlap the same solution row (a third between
    them would overlap no other), so their weights add up to less than that of the solution rows they displace.
    But the solution is then also the largest schedule, which "earliest end first" always finds: planted
    instances are for large tables, not for telling rules from reasoning.

    Raises RlError for bad options.
    """

    name = "activity_weighted"
    columns = ("start", "end", "weight")
    goal = "Choose activities that do not overlap and have the largest total weight; one may start when another ends."
    answer = "total weight"
    form = ("times start-end, start-end", "weights w + w")
    method = (
        "Hint: sort by end; for each activity keep the better of leaving it and of taking it with the best "
        "schedule that ends by its start."
    )
    rules = WEIGHTED_SHORTCUTS

    def __init__(
        self,
        horizon: int | None = None,
        duration: Sequence[int] = (10, 120),
        weights: Sequence[int] = (1, 10),
        unique: bool = True,
        generator: str = "auto",
    ):
        super().__init__(horizon, duration, unique, generator)
        self.weights = integer_range("weights", weights, lowest=1)

    def options(self) -> dict[str, Any]:
        """The options given, for seeding and for records."""
        return {**super().options(), "weights": self.weights}

    def _draw(self, rng: random.Random, rows: int) -> Rows:
        low, high = self.weights
        span = high - low + 1
        return [(*row, low + int(rng.random() * span)) for row in super()._draw(rng, rows)]

    def _loose(self, rows: Rows) -> list[int]:
        tie = best_schedule(rows)[3]
        return [] if tie is None else [tie]

    def _is_unique(self, rows: Rows) -> bool:
        return best_schedule(rows)[2] == 1

    def _core(self, rng: random.Random, start: int, end: int) -> tuple[int, ...]:
        return start, end, rng.randint(*self.weights)

    def _across(self, rng: random.Random, cores: Rows) -> tuple[int, ...]:
        start, end = super()._across(rng, cores)
        displaced = sum(core[2] for core in cores if core[0] < end and start < core[1])
        most = min(self.weights[1], (displaced - 1) // 2)
        return (start, end, rng.randint(self.weights[0], most)) if most >= self.weights[0] else ()

    def _sum(self, chosen: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
        return (f"weights {' + '.join(str(row[2]) for row in chosen)}",)

    def _worth(self, chosen: Sequence[tuple[int, ...]], ids: int) -> int:
        return sum([row[2] for row in chosen])

    def add_distractor(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """One more row, last in the table, that belongs to no optimal schedule; ids stay.

        It covers a row of the solution and weighs less, so that any schedule with it is improved by that row
        (where all of the solution weighs 1, the instance stays as it was).
        """
        source = as_random(rng)
        heavy = [instance.rows[i - 1] for i in self.solution(instance).certificate if instance.rows[i - 1][2] > 1]
        if not heavy:
            return changed(instance, instance.rows, "add_distractor")
        start, end, w = source.choice(heavy)
        row = (max(0, start - source.randint(0, 30)), end + source.randint(0, 30), source.randint(1, w - 1))
        return changed(instance, [*instance.rows, row], "add_distractor")
