"""The kernels of `ngrams` compiled by numba: the same tokens, buckets and bits, byte by byte in one pass.

Compiled code is kept in numba's cache; the first run on a machine takes some seconds more.
"""

from typing import Any

import numba
import numpy as np
from numba import uint64
from numpy.typing import NDArray

from .ngrams import BYTE_CLASSES, MAX_TOKEN_BYTES, SPACE, Scores
from .packing import Packed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST_BYTES = np.array([(1 << 8 * kept) - 1 for kept in range(9)], np.uint64)


def count(packed: Packed, ngrams: int, buckets: int, totals: NDArray[np.int64]) -> None:
    """As `ngrams.count`."""
    data, words = _views(packed)
    _count(data, words, packed.offsets, ngrams, np.uint64(buckets), totals)


def score(packed: Packed, ngrams: int, buckets: int, table: NDArray[np.float64]) -> Scores:
    """As `ngrams.score`."""
    data, words = _views(packed)
    found = Scores(
        np.zeros((len(packed), table.shape[1])), np.zeros(len(packed), np.int64), np.zeros(len(packed), np.uint64)
    )
    _score(data, words, packed.offsets, ngrams, np.uint64(buckets), np.ascontiguousarray(table), *found)
    return found


def _views(packed: Packed) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """The bytes, and the eight bytes from each position on as a little-endian number."""
    data = packed.data.view()
    data.flags.writeable = False  # one type of array, one compilation
    return data, np.ndarray((len(data) - 7,), "<u8", data.data, strides=(1,))


def _jit(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def _inline(function: Any) -> Any:
    return numba.njit(inline="always", error_model="numpy")(function)


@_inline
def _mix(value):
    value = (value ^ (value >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> uint64(27))) * uint64(0x94D049BB133111EB)
    return value ^ (value >> uint64(31))


@_inline
def _lower(word):
    """A to Z in lower case, in eight bytes at once: bit 7 of `capital` is set in the bytes that hold one."""
    low = word & uint64(0x7F7F7F7F7F7F7F7F)
    capital = ((low + uint64(0x3F3F3F3F3F3F3F3F)) ^ (low + uint64(0x2525252525252525))) & ~word
    return word | ((capital & uint64(0x8080808080808080)) >> uint64(2))


@_inline
def _hash(words, start, length):
    value = _mix((_lower(words[start]) & _FIRST_BYTES[min(length, 8)]) + uint64(length) * _GOLDEN)
    for at in range(8, min(length, MAX_TOKEN_BYTES), 8):
        rest = _lower(words[start + at]) & _FIRST_BYTES[min(length - at, 8)]
        value = _mix(value * _GOLDEN + rest)
    return value


@_inline
def _edges(data, start, end, starts, ends):
    """Where the tokens of one document start and end; how many there are. Without a branch a byte: the processor
    would guess wrong at every other word."""
    runs, before = 0, SPACE
    for at in range(start, end):
        kind = BYTE_CLASSES[data[at]]
        starts[runs] = at
        runs += kind != before
        before = kind
    starts[runs] = end
    tokens = 0
    for run in range(runs):
        first = starts[run]
        starts[tokens] = first
        ends[tokens] = starts[run + 1]
        tokens += BYTE_CLASSES[data[first]] != SPACE
    return tokens


@_inline
def _buckets(data, words, start, end, ngrams, buckets, room):
    """The buckets of one document, tokens, then pairs, ... in the rows of `room.found`; how many tokens; its print."""
    starts, ends, grams, found = room
    tokens, value_print, last = _edges(data, start, end, starts, ends), uint64(0), uint64(0)
    for token in range(tokens):
        value = _hash(words, starts[token], ends[token] - starts[token])
        value_print += value * uint64(2 * token + 1)
        found[0, token] = ((value >> uint64(32)) * buckets) >> uint64(32)
        if ngrams > 1 and token:
            for order in range(min(token, ngrams - 1), 1, -1):
                grams[order] = _mix(grams[order - 1] * _GOLDEN + value)
                found[order, token - order] = ((grams[order] >> uint64(32)) * buckets) >> uint64(32)
            pair = _mix(last * _GOLDEN + value)
            grams[1] = pair
            found[1, token - 1] = ((pair >> uint64(32)) * buckets) >> uint64(32)
        last = value
    return tokens, value_print


@_inline
def _room(offsets, ngrams):
    """Working arrays for the longest document, which has no more tokens than bytes: starts and ends of its tokens, the
    last hash of each length of n-grams, and the buckets."""
    longest = 0
    for row in range(len(offsets) - 1):
        longest = max(longest, offsets[row + 1] - offsets[row])
    return (
        np.empty(longest + 1, np.int64),
        np.empty(longest + 1, np.int64),
        np.empty(ngrams, np.uint64),
        np.empty((ngrams, longest), np.uint32),
    )


@_jit
def _count(data, words, offsets, ngrams, buckets, totals):
    room = _room(offsets, ngrams)
    found = room[3]
    for row in range(len(offsets) - 1):
        tokens, _ = _buckets(data, words, offsets[row], offsets[row + 1], ngrams, buckets, room)
        for order in range(ngrams):
            for at in range(tokens - order):
                totals[found[order, at]] += 1


@_jit
def _score(data, words, offsets, ngrams, buckets, table, sums, token_counts, prints):
    room = _room(offsets, ngrams)
    found, targets = room[3], table.shape[1]
    fours = targets - targets % 4
    for row in range(len(offsets) - 1):
        tokens, prints[row] = _buckets(data, words, offsets[row], offsets[row + 1], ngrams, buckets, room)
        token_counts[row] = tokens
        for order in range(ngrams):
            for first in range(0, fours, 4):  # four sums in registers; the row of the table is one line of the cache
                a, b, c, d = 0.0, 0.0, 0.0, 0.0
                for at in range(tokens - order):
                    bucket = found[order, at]
                    a += table[bucket, first]
                    b += table[bucket, first + 1]
                    c += table[bucket, first + 2]
                    d += table[bucket, first + 3]
                sums[row, first] += a
                sums[row, first + 1] += b
                sums[row, first + 2] += c
                sums[row, first + 3] += d
            for target in range(fours, targets):
                total = 0.0
                for at in range(tokens - order):
                    total += table[found[order, at], target]
                sums[row, target] += total
