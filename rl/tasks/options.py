"""Reading the options of tasks, with errors that name what was allowed."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from operator import index
from typing import Any

from ..errors import RlError


def integer_range(name: str, value: Any, lowest: int | None = None) -> tuple[int, int]:
    """(low, high) from a pair of integers. Raises RlError unless lowest <= low <= high."""
    pair = list(value) if isinstance(value, Sequence) else []
    if len(pair) != 2 or any(type(end) is not int for end in pair) or pair[0] > pair[1]:
        raise RlError(f"{name} must be an inclusive range [low, high] of integers, got {value!r}")
    if lowest is not None and pair[0] < lowest:
        raise RlError(f"{name} must not go below {lowest}, got {value!r}")
    return pair[0], pair[1]


def whole_rows(rows: Any) -> tuple[tuple[int, ...], ...]:
    """The rows of an instance made by hand, as plain integers. Raises RlError for none, or for other than integers."""
    try:
        found = tuple(tuple(map(index, row)) for row in rows)
    except TypeError:
        found = ()
    if not found:
        raise RlError(f"an instance has one row or more, of whole numbers, got {rows!r:.200}")
    return found


def truth(name: str, value: Any) -> bool:
    """A bool as it is. Raises RlError for anything else."""
    if type(value) is not bool:
        raise RlError(f"{name} must be true or false, got {value!r}")
    return value


def unknown(what: str, word: object, allowed: Iterable[str]) -> RlError:
    """The error for a word that is none of the allowed ones, with the nearest guess."""
    names = list(allowed)
    near = get_close_matches(str(word), names, n=1)
    guess = f", did you mean {near[0]!r}?" if near else ""
    return RlError(f"unknown {what} {word!r}{guess}; {what}s: {', '.join(names) or 'there are none'}")
