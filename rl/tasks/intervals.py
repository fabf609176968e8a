"""Schedules of activities: the exact method, a test of uniqueness, and the known rules that fall short.

Rows are (start, end) or (start, end, weight) with start < end, half-open, so that touching rows do not overlap.
Places count from 0, ids from 1; a schedule's ids stand in the order of their ends.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter

Rows = Sequence[Sequence[int]]
NEVER, FOREVER = float("-inf"), float("inf")
END = itemgetter(1)


def weight(row: Sequence[int]) -> int:
    """The weight of a row; 1 where rows have none."""
    return row[2] if len(row) > 2 else 1


def by_end(rows: Rows) -> list[int]:
    """Places by end; of equals, the lower first."""
    return sorted(range(len(rows)), key=[row[1] for row in rows].__getitem__)


def best_schedule(rows: Rows) -> tuple[int, tuple[int, ...], int, int | None]:
    """(largest total weight, ids of one such schedule, how many there are, a place where two of them part).

    With rows in the order of their ends and p(i) the number of rows that end by the start of row i,
    opt_i = max(w_i + opt_p(i), opt_(i-1)), and the counts add up over the branches that attain the maximum:
    each set is counted once, by whether it holds row i. O(n log n). On the way back a tie can be met only
    where there are several optima, since every count is at least 1; the first one met is the fourth result.
    """
    order = by_end(rows)
    ends = [rows[place][1] for place in order]
    best, count, before = [0], [1], []
    for rank, place in enumerate(order):
        row = rows[place]
        p = bisect_right(ends, row[0], 0, rank)
        taken, left = (row[2] if len(row) > 2 else 1) + best[p], best[rank]
        best.append(max(taken, left))
        count.append((count[p] if taken >= left else 0) + (count[rank] if left >= taken else 0))
        before.append(p)
    ids: list[int] = []
    tie = None
    rank = len(order)
    while rank:
        place, p = order[rank - 1], before[rank - 1]
        taken = weight(rows[place]) + best[p]
        if taken < best[rank - 1]:
            rank -= 1
            continue
        if taken == best[rank - 1] and tie is None:
            tie = place
        ids.append(place + 1)
        rank = p
    return best[-1], tuple(reversed(ids)), count[-1], tie


def loose_rows(rows: Rows) -> Iterator[int]:
    """Places outside the earliest-end schedule S that overlap fewer than two rows of S.

    The largest schedule (weights aside) is unique exactly where there are none. If x outside S overlaps at
    most one row of S, putting x in its place is as large. Conversely, let a feasible T have d >= 1 rows outside
    S. Each overlaps a contiguous block of two or more rows of S; as the d rows are disjoint, neighbouring
    blocks share at most one row, so they hit at least d + 1 rows of S, none of which T may hold: |T| < |S|.
    """
    waiting: list[int] = []  # they overlap the last row of S, and as yet no other
    last = before = NEVER  # where the last row of S ends, and the one before it
    for place in by_end(rows):
        start = rows[place][0]
        if start >= last:
            for other in waiting:
                if rows[other][1] <= start:
                    yield other
            waiting = []
            before, last = last, rows[place][1]
        elif start >= before:
            waiting.append(place)
    yield from waiting


def has_one_largest(rows: Sequence[tuple[int, ...]]) -> bool:
    """Whether `loose_rows` would give nothing, sooner: it stops at the first, and few random tables have none."""
    soonest = FOREVER  # the first end among the rows that wait
    last = before = NEVER
    for row in sorted(rows, key=END):
        start = row[0]
        if start >= last:
            if soonest <= start:
                return False
            soonest = FOREVER
            before, last = last, row[1]
        elif start >= before and row[1] < soonest:
            soonest = row[1]
    return soonest == FOREVER


def is_schedule(chosen: Rows) -> bool:
    """Whether each row starts no earlier than the one before it ends."""
    return all([a[1] <= b[0] for a, b in pairwise(chosen)])


def conflicts(rows: Rows) -> list[int]:
    """How many other rows each row overlaps, O(n log n): all but those that end before it or start after it."""
    starts = sorted(row[0] for row in rows)
    ends = sorted(row[1] for row in rows)
    return [bisect_right(starts, row[1] - 1) - bisect_right(ends, row[0]) - 1 for row in rows]


def first_fit(rows: Rows, order: Sequence[int]) -> tuple[int, ...]:
    """Goes through the places in this order and takes each row that overlaps none taken before."""
    chosen: list[int] = []
    for place in order:
        start, end = rows[place][0], rows[place][1]
        if all(end <= rows[other][0] or rows[other][1] <= start for other in chosen):
            chosen.append(place)
    return tuple(place + 1 for place in sorted(chosen, key=lambda place: rows[place][1]))


# The rules below are what a model may learn instead of the task; of equals each takes the first row.


def earliest_end(rows: Rows) -> tuple[int, ...]:
    """First fit by end: the largest schedule, whatever it weighs."""
    return first_fit(rows, by_end(rows))


def latest_start(rows: Rows) -> tuple[int, ...]:
    """First fit by start, from the last: the largest schedule too."""
    return first_fit(rows, sorted(range(len(rows)), key=lambda i: -rows[i][0]))


def earliest_start(rows: Rows) -> tuple[int, ...]:
    """First fit by start."""
    return first_fit(rows, sorted(range(len(rows)), key=lambda i: rows[i][0]))


def shortest(rows: Rows) -> tuple[int, ...]:
    """First fit by duration."""
    return first_fit(rows, sorted(range(len(rows)), key=lambda i: rows[i][1] - rows[i][0]))


def fewest_conflicts(rows: Rows) -> tuple[int, ...]:
    """First fit by the number of other rows that a row overlaps."""
    return first_fit(rows, sorted(range(len(rows)), key=conflicts(rows).__getitem__))


def input_order(rows: Rows) -> tuple[int, ...]:
    """First fit from top to bottom."""
    return first_fit(rows, range(len(rows)))


def heaviest(rows: Rows) -> tuple[int, ...]:
    """First fit by weight, from the largest."""
    return first_fit(rows, sorted(range(len(rows)), key=lambda i: -weight(rows[i])))


def densest(rows: Rows) -> tuple[int, ...]:
    """First fit by weight per unit of time, from the largest."""
    return first_fit(rows, sorted(range(len(rows)), key=lambda i: -weight(rows[i]) / (rows[i][1] - rows[i][0])))


SHORTCUTS = {rule.__name__: rule for rule in (earliest_start, shortest, fewest_conflicts, input_order)}
WEIGHTED_SHORTCUTS = {
    rule.__name__: rule for rule in (earliest_end, latest_start, *SHORTCUTS.values(), heaviest, densest)
}
