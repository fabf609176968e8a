"""Shingles of texts, MinHash signatures and bands: the maths of finding texts that share much of their wording.

A shingle is the hash of `width` neighbouring tokens. The share of shingles that two texts have in common, of all that
either has, is their Jaccard similarity J. Under one random order of all shingles both texts have the same first one
with probability J (Broder 1997); a signature is the first ones under many orders, and two texts with an equal band, a
run of a few entries, are candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .ngrams import hash_tokens, mix64
from .packing import pack

Hashes = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# What a text with fewer tokens than a shingle is filled up with: it has one shingle, equal to that of its like alone.
_FILL = np.uint64(0x5851F42D4C957F2D)
# A pair at the threshold is missed with at most this probability.
MISS = 0.01


class Shingles(NamedTuple):
    """The shingles of N texts, M in all, text after text, repeats included."""

    hashes: Hashes  # (M,)
    counts: NDArray[np.int64]  # (N,); 0 for a text without tokens

    def starts(self) -> NDArray[np.int64]:
        """(N + 1,) where the shingles of each text begin, and M."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def text_shingles(texts: Sequence[str], width: int) -> Shingles:
    """Shingles of `width` tokens, see `ngrams.hash_ngrams` for what a token is: letter case and white space do not
    matter. A text with fewer tokens has one shingle, of all of them."""
    tokens = hash_tokens(pack(texts))
    return shingles(tokens.hashes, tokens.counts, width)


def shingles(tokens: Hashes, counts: NDArray[np.int64], width: int, names: NDArray[np.bool_] | None = None) -> Shingles:
    """Shingles of tokens given by their hashes.

    Args:
        tokens: (T,) the tokens of N texts, text after text.
        counts: (N,) how many each has.
        width: tokens a shingle.
        names: (T,) which tokens are names that may be changed throughout; each then counts as the place within the
            shingle where the same name stands first (Baker 1993, parameterised matching), so that `a = a + b` and
            `x = x + y` agree and `x = y + x` does not.
    """
    held = np.where(counts > 0, np.maximum(counts, width), 0)  # (N,) tokens with the filling
    ends = np.cumsum(held)
    shifts = np.repeat(ends - held - (np.cumsum(counts) - counts), counts)
    filled = np.full(int(held.sum()), _FILL)
    filled[np.arange(len(tokens)) + shifts] = tokens
    renamed = np.zeros(len(filled), bool)
    if names is not None:
        renamed[np.arange(len(tokens)) + shifts] = names
    found = np.where(counts > 0, held - width + 1, 0)  # (N,) shingles a text
    starts = np.arange(int(found.sum())) + np.repeat(ends - held - (np.cumsum(found) - found), found)  # (M,)
    hashes = np.zeros(len(starts), np.uint64)
    for offset in range(width):
        values = filled[starts + offset]
        if names is not None:
            values = np.where(renamed[starts + offset], _first_places(filled, starts, offset), values)
        hashes = hashes * _GOLDEN + values
    return Shingles(mix64(hashes), found)


def _first_places(tokens: Hashes, starts: NDArray[np.int64], offset: int) -> Hashes:
    """(M,) hashed: the first place of each shingle that holds the token at `offset`."""
    own, places = tokens[starts + offset], np.full(len(starts), offset, np.uint64)
    for place in reversed(range(offset)):
        places[tokens[starts + place] == own] = place
    return mix64(places + np.uint64(1))


def signatures(found: Shingles, permutations: int, seed: int) -> Hashes:
    """(N, permutations) the smallest value of each text's shingles under so many hash functions; all ones for a text
    without shingles. The share of equal entries of two rows estimates the Jaccard similarity of the texts."""
    keys = mix64(mix64(np.array([seed], np.uint64)) + np.arange(2 * permutations, dtype=np.uint64) * _GOLDEN)
    factors, flips = keys[:permutations] | np.uint64(1), keys[permutations:]
    result = np.full((permutations, len(found.counts)), np.uint64(2**64 - 1))
    full = np.flatnonzero(found.counts)
    if len(full):
        starts = found.starts()[full]
        buffer = np.empty_like(found.hashes)
        for row in range(permutations):
            np.bitwise_xor(found.hashes, flips[row], out=buffer)
            np.multiply(buffer, factors[row], out=buffer)
            result[row, full] = np.minimum.reduceat(buffer, starts)
    return result.T


def band_rows(threshold: float, permutations: int) -> int:
    """How many entries of a signature make a band: the most with which two texts of Jaccard similarity `threshold`
    share none of the `permutations // rows` bands with a probability of at most MISS; 1 where even that is too many."""
    for rows in range(permutations, 1, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= MISS:
            return rows
    return 1


def bands(signature: Hashes, rows: int) -> Hashes:
    """(N, permutations // rows) one hash a band of `rows` entries."""
    count = signature.shape[1] // rows
    parts = signature[:, : count * rows].reshape(len(signature), count, rows)
    keys = np.zeros((len(signature), count), np.uint64)
    for entry in range(rows):
        keys = mix64(keys * _GOLDEN + parts[:, :, entry])
    return keys


def candidate_pairs(keys: Hashes, limit: int) -> NDArray[np.int64]:
    """(P, 2) pairs of rows, earlier first, increasing, that agree in a band. Where many rows do, each is paired with
    the `limit` earliest of them, so that a template repeated n times gives limit * n pairs, not n * n.

    Args:
        keys: (N, bands)
        limit: 1 or more.
    """
    codes = [np.empty(0, np.int64)]
    for column in keys.T:
        order = np.argsort(column, kind="stable")  # of equal keys the earlier row first
        new = np.concatenate([[True], column[order][1:] != column[order][:-1]]) if len(order) else np.empty(0, bool)
        firsts = np.flatnonzero(new)
        runs = np.repeat(firsts, np.diff(np.append(firsts, len(order))))  # (N,) where the run of each place starts
        places = np.arange(len(order)) - runs
        for place in range(min(limit, int(places.max(initial=0)))):
            later = np.flatnonzero(places > place)
            codes.append(order[runs[later] + place] * len(keys) + order[later])
    pairs = np.unique(np.concatenate(codes))
    return np.stack(np.divmod(pairs, max(len(keys), 1)), axis=1)


def jaccard(one: Hashes, others: Sequence[Hashes]) -> NDArray[np.float64]:
    """The Jaccard similarity of one set with each of several; each is sorted, without repeats, not empty."""
    every = np.concatenate(others)
    places = np.minimum(np.searchsorted(one, every), len(one) - 1)
    sizes = np.array([len(other) for other in others])
    shared = np.add.reduceat((one[places] == every).astype(np.int64), np.cumsum(sizes) - sizes)
    return shared / (len(one) + sizes - shared)
