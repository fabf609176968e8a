"""Longest strictly increasing subsequences: the exact method, and the known rules that fall short of it.

Everything here works on plain sequences of integers, and row ids count from 1.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise


def ending_lengths(values: Sequence[int]) -> list[int]:
    """f: the length of the longest strictly increasing subsequence that ends at each element. O(n log n)."""
    tails: list[int] = []
    lengths = []
    for value in values:
        place = bisect_left(tails, value)
        tails[place : place + 1] = [value]
        lengths.append(place + 1)
    return lengths


def starting_lengths(values: Sequence[int]) -> list[int]:
    """g: the same for the subsequence that starts at each element."""
    return ending_lengths([-value for value in reversed(values)])[::-1]


def critical_levels(values: Sequence[int]) -> dict[int, list[int]]:
    """Level f -> the 0-based positions of that level which lie on some longest increasing subsequence.

    The longest increasing subsequence is unique as a set of positions exactly where every level holds one
    position. (An element is critical where f + g - 1 equals the optimum; a second one at some level lies on a
    second optimal subsequence, and two different optimal subsequences differ at some level.)
    """
    ending = ending_lengths(values)
    starting = starting_lengths(values)
    best = max(ending, default=0)
    levels: dict[int, list[int]] = {level: [] for level in range(1, best + 1)}
    for place, (f, g) in enumerate(zip(ending, starting, strict=True)):
        if f + g - 1 == best:
            levels[f].append(place)
    return levels


def count_optima(values: Sequence[int]) -> int:
    """How many sets of positions are longest strictly increasing subsequences. O(n log n), exact.

    Within one level the values never rise from left to right, so the elements of the level below that may
    stand before a new one are the last few of that level, and prefix sums of their counts answer in one
    bisection.
    """
    falling: list[list[int]] = []  # per level: the negated values, in order of position
    sums: list[list[int]] = []  # per level: prefix sums of the counts, from 0
    for value, length in zip(values, ending_lengths(values), strict=True):
        if length > len(falling):
            falling.append([])
            sums.append([0])
        count = 1
        if length > 1:
            below, totals = falling[length - 2], sums[length - 2]
            first = bisect_right(below, -value)  # the first of that level with a smaller value
            count = totals[-1] - totals[first]
        falling[length - 1].append(-value)
        sums[length - 1].append(sums[length - 1][-1] + count)
    return sums[-1][-1] if sums else 1


@lru_cache(maxsize=8192)
def longest(values: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(ids of one longest strictly increasing subsequence, how many there are).

    Of several optima, the one whose rows, read from the last to the first, come latest.
    """
    ending = ending_lengths(values)
    wanted = max(ending, default=0)
    above = float("inf")
    ids = []
    for place in range(len(values) - 1, -1, -1):
        if ending[place] == wanted and values[place] < above:
            ids.append(place + 1)
            above = values[place]
            wanted -= 1
    return tuple(reversed(ids)), count_optima(values)


def is_increasing(chosen: Sequence[int]) -> bool:
    """Whether each value is larger than the one before it (an id stated twice never is)."""
    return all([a < b for a, b in pairwise(chosen)])


# The rules below are what a model may learn instead of the task. Each takes the values and gives ids.


def greedy_first(values: Sequence[int]) -> tuple[int, ...]:
    """From the first row, take every later row that is larger than the last one taken."""
    return _greedy(values, 0)


def greedy_min(values: Sequence[int]) -> tuple[int, ...]:
    """The same from the smallest value."""
    return _greedy(values, min(range(len(values)), key=values.__getitem__))


def greedy_best_start(values: Sequence[int]) -> tuple[int, ...]:
    """The same from every row; the longest, the first of equals."""
    return max((_greedy(values, start) for start in range(len(values))), key=len)


def longest_run(values: Sequence[int]) -> tuple[int, ...]:
    """The longest run of neighbouring rows that rises, the first of equals."""
    best: list[int] = []
    run: list[int] = []
    for place, value in enumerate(values):
        run = [*run, place + 1] if place and values[place - 1] < value else [place + 1]
        best = max(best, run, key=len)
    return tuple(best)


def smallest_next(values: Sequence[int]) -> tuple[int, ...]:
    """From every row, go on to the smallest later value that is larger; the longest, first of equals."""
    return max((_smallest_next(values, start) for start in range(len(values))), key=len)


def beam2(values: Sequence[int]) -> tuple[int, ...]:
    """Beam search of width 2, see `_beam`."""
    return _beam(values, 2)


def beam3(values: Sequence[int]) -> tuple[int, ...]:
    """Beam search of width 3, see `_beam`."""
    return _beam(values, 3)


def patience_tails(values: Sequence[int]) -> tuple[int, ...]:
    """The rows on top of the piles of patience sorting: always the right count, often not a subsequence."""
    tails: list[int] = []
    ids: list[int] = []
    for place, value in enumerate(values):
        pile = bisect_left(tails, value)
        tails[pile : pile + 1] = [value]
        ids[pile : pile + 1] = [place + 1]
    return tuple(ids)


RULES = {
    rule.__name__: rule
    for rule in (
        greedy_first,
        greedy_min,
        greedy_best_start,
        longest_run,
        smallest_next,
        beam2,
        beam3,
        patience_tails,
    )
}


def _greedy(values: Sequence[int], start: int) -> tuple[int, ...]:
    ids = [start + 1]
    for place in range(start + 1, len(values)):
        if values[place] > values[ids[-1] - 1]:
            ids.append(place + 1)
    return tuple(ids)


def _smallest_next(values: Sequence[int], start: int) -> tuple[int, ...]:
    ids = [start + 1]
    while True:
        last = ids[-1]
        later = [place for place in range(last, len(values)) if values[place] > values[last - 1]]
        if not later:
            return tuple(ids)
        ids.append(1 + min(later, key=values.__getitem__))


def _beam(values: Sequence[int], width: int) -> tuple[int, ...]:
    """Reads the rows once and keeps the `width` best partial answers: longer, then lower last value."""
    beam: list[tuple[int, ...]] = [()]
    for place, value in enumerate(values):
        grown = [ids + (place + 1,) for ids in beam if not ids or values[ids[-1] - 1] < value]
        beam = sorted(beam + grown, key=lambda ids: (-len(ids), values[ids[-1] - 1] if ids else 0))[:width]
    return beam[0]
