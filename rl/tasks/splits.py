"""Drawing different items of one split, from streams that do not overlap."""

import hashlib
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import RlError

SPLITS = ("train", "validation", "test")
# Draws of one item before a size, a range or a split counts as exhausted.
MAX_TRIES = 20_000

Item = TypeVar("Item")


def draw_distinct(
    name: str,
    draw: Callable[[random.Random, int], Item],
    key: Callable[[Item], str],
    size: int,
    n: int | Sequence[int],
    seed: int,
    split: str,
    salt: tuple[Any, ...] = (),
    wanted: Callable[[Item], bool] = lambda item: True,
) -> list[Item]:
    """`size` items with different keys, all of one split; a larger size begins with the same items.

    The number of rows is drawn first, uniformly from n, and kept while `draw(rng, rows)` is repeated until
    the item is new, of the split and `wanted`. The stream depends on name, salt, n, seed and split. Raises RlError for
    a bad argument, or where the split has nothing new at some number of rows.
    """
    if split not in SPLITS:
        raise RlError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    size, seed = whole("size", size), whole("seed", seed)
    if size < 1:
        raise RlError(f"size must be 1 or more, got {size}")
    low, high = size_range(n)
    rng = stream(name, salt, low, high, seed, split)
    found: dict[str, Item] = {}
    while len(found) < size:
        rows = rng.randint(low, high)
        for _ in range(MAX_TRIES):
            item = draw(rng, rows)
            place = key(item)
            if place not in found and split_of(name, place) == split and wanted(item):
                found[place] = item
                break
        else:
            raise RlError(
                f"{name}: after {len(found)} of {size} items, {MAX_TRIES} draws with n={rows} gave "
                f"nothing new in split {split!r}: lower size, raise n or widen the range of values"
            )
    return list(found.values())


def split_of(name: str, key: str) -> str:
    """The split that an instance belongs to: a hash of task name and key, 80/10/10."""
    tenth = int.from_bytes(hashlib.sha256(f"split/{name}/{key}".encode()).digest()[:8], "big") % 10
    return "train" if tenth < 8 else SPLITS[tenth - 7]


def stream(*parts: Any) -> random.Random:
    """An independent random stream for these parts: neighbouring seeds have nothing in common."""
    return random.Random(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest(), "big"))


def as_random(rng: Any) -> random.Random:
    """A `random.Random` from an int seed, a Random (itself) or a numpy Generator (which is advanced once)."""
    if isinstance(rng, random.Random):
        return rng
    if isinstance(rng, int) and not isinstance(rng, bool):
        return random.Random(rng)
    import numpy as np

    if isinstance(rng, np.random.Generator):
        return random.Random(int(rng.integers(2**63)))
    if isinstance(rng, np.integer):
        return random.Random(int(rng))
    raise RlError(f"rng must be an int, a random.Random or a numpy Generator, got {rng!r}")


def size_range(n: int | Sequence[int]) -> tuple[int, int]:
    """(low, high) from a size or a pair of sizes. Raises RlError unless 2 <= low <= high."""
    try:
        pair = [operator.index(item) for item in ((n, n) if not isinstance(n, Sequence) else n)]
    except TypeError:
        pair = []
    if len(pair) != 2 or not 2 <= pair[0] <= pair[1]:
        raise RlError(f"n must be a number of rows, 2 or more, or a pair [low, high] of them, got {n!r}")
    return pair[0], pair[1]


def whole(what: str, value: Any) -> int:
    """An int from anything integral. Raises RlError, naming `what`, for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise RlError(f"{what} must be an integer, got {value!r}") from None
