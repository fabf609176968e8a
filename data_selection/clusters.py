"""Spherical k-means: clusters of directions, their number found by a knee, small ones merged.

The published code clusters with a mini-batch k-means of 10 clusters and no seed (arXiv 2410.10636); here Lloyd's
iterations run on unit vectors, from a seeded k-means++ start, on a sample where the pool is large.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .selection import uniform_noise

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FIT_ROWS, KNEE_ROWS = 50_000, 20_000
STARTS, ITERATIONS = 3, 50
ROWS_AT_ONCE = 8192


class Clusters(NamedTuple):
    """`labels` (N,), `centres` (k, d) of unit length, and for a number that was looked for, `curve`: the sum of squared
    distances of every number of clusters that was tried."""

    labels: Ints
    centres: Floats
    curve: dict[int, float]


def unit_rows(vectors: NDArray[np.generic]) -> Floats:
    """(N, d) scaled to unit length, float32; a row of zeros stays one."""
    found, least = np.empty(vectors.shape, np.float32), np.finfo(np.float32).tiny
    for first in range(0, len(vectors), ROWS_AT_ONCE):
        part = np.array(vectors[first : first + ROWS_AT_ONCE], np.float32)
        # Scaled before it is squared: the squares of a small gradient are too small for float32.
        part /= np.maximum(np.abs(part).max(axis=1, keepdims=True, initial=0), least)
        found[first : first + ROWS_AT_ONCE] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), least)
    return found


def cluster(units: Floats, k: int | None, seed: int, min_size: int) -> Clusters:
    """Clusters of unit vectors.

    Args:
        units: (N, d), each of unit length.
        k: how many, or None to look for the knee.
        seed: of the starts and of the samples.
        min_size: clusters with fewer rows are merged into the nearest, the smallest first.

    Returns:
        The clusters, numbered in the order of their first rows.
    """
    curve = dict[int, float]()
    if k is None:
        sample = units[_sample(len(units), KNEE_ROWS, seed, 10)]
        curve = {count: spherical_k_means(sample, count, seed)[1] for count in candidates(len(units))}
        k = knee(curve)
    centres, _ = spherical_k_means(units[_sample(len(units), FIT_ROWS, seed, 11)], min(k, len(units)), seed)
    labels = merge_small(units, nearest(units, centres)[0], min_size)
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    labels = rank[labels]
    return Clusters(labels, _means(units, labels, len(first)), curve)


def candidates(rows: int) -> list[int]:
    """The numbers of clusters that are tried for a pool: 1 to 12, then a quarter more each, up to sqrt(rows / 2)."""
    most, found = max(1, int((rows / 2) ** 0.5)), list[int]()
    number = 1
    while number <= most:
        found.append(number)
        number = max(number + 1, number * 5 // 4) if number >= 12 else number + 1
    return found


def knee(curve: dict[int, float]) -> int:
    """The number after which more clusters bring little: the point farthest below the straight line between the ends of
    the curve of log sums of squares. Of equal ones the smallest.

    Logarithms, since a skill of one sample in a hundred is a small part of the sum that one cluster leaves, and a large
    one of what the clusters of all other skills leave.
    """
    counts, sums = np.array(list(curve)), np.minimum.accumulate(list(curve.values()))
    if len(counts) < 3 or sums[0] - sums[-1] <= 1e-9:
        return int(counts[0])
    logs = np.log(np.maximum(sums, 1e-6 * sums[0]))
    below = (logs[0] - logs) / (logs[0] - logs[-1]) - (counts - counts[0]) / (counts[-1] - counts[0])
    return int(counts[np.argmax(np.round(below, 9))])


def spherical_k_means(units: Floats, k: int, seed: int) -> tuple[Floats, float]:
    """The best of some starts: centres (k, d) of unit length, and the sum of squared distances to them."""
    best: tuple[Floats, float] | None = None
    for start in range(STARTS):
        centres = _plus_plus(units, k, seed, start)
        labels = np.full(len(units), -1)
        for _ in range(ITERATIONS):
            new, closeness = nearest(units, centres)
            if np.array_equal(new, labels):
                break
            labels = new
            # A centre that lost all its rows goes to the row that is farthest from its own.
            for empty in np.setdiff1d(np.arange(k), labels):
                worst = int(np.argmin(closeness))
                labels[worst], closeness[worst] = empty, 1.0
            centres = _means(units, labels, k)
        total = float((2.0 - 2.0 * nearest(units, centres)[1].astype(np.float64)).sum())
        if best is None or total < best[1]:
            best = centres, total
    assert best is not None
    return best


def nearest(units: Floats, centres: Floats) -> tuple[Ints, Floats]:
    """The centre of highest cosine for each row (N,), of equal ones the first, and that cosine (N,)."""
    labels, closeness = np.empty(len(units), np.int64), np.empty(len(units), np.float32)
    for first in range(0, len(units), ROWS_AT_ONCE):
        cosines = units[first : first + ROWS_AT_ONCE] @ centres.T
        own = cosines.argmax(axis=1)
        labels[first : first + ROWS_AT_ONCE] = own
        closeness[first : first + ROWS_AT_ONCE] = cosines[np.arange(len(own)), own]
    return labels, closeness


def merge_small(units: Floats, labels: Ints, min_size: int) -> Ints:
    """Labels (N,) with every cluster of fewer than `min_size` rows merged into the one with the nearest centre."""
    labels = labels.copy()
    while True:
        names, sizes = np.unique(labels, return_counts=True)
        if len(names) < 2 or sizes.min() >= min_size:
            return labels
        at = int(np.argmin(sizes))
        centres = _means(units, np.searchsorted(names, labels), len(names))
        cosines = centres @ centres[at]
        cosines[at] = -np.inf
        labels[labels == names[at]] = names[int(np.argmax(cosines))]


def _plus_plus(units: Floats, k: int, seed: int, start: int) -> Floats:
    """k rows of `units`, one after the other: of some drawn in proportion to the squared distance from those before,
    the one that leaves the least."""
    tries = 2 + int(np.log(k))
    draws = uniform_noise(seed, k * tries, stream=1000 + start).reshape(k, tries)
    chosen = [int(draws[0, 0] * len(units))]
    distance = _distances(units, units[chosen])[:, 0]
    for drawn in draws[1:]:
        sums = np.cumsum(distance)
        rows = np.searchsorted(sums, drawn * sums[-1]) if sums[-1] > 1e-6 else (drawn * len(units)).astype(np.int64)
        rows = np.minimum(rows, len(units) - 1)
        left = np.minimum(distance[:, None], _distances(units, units[rows]))  # (N, tries)
        best = int(left.sum(axis=0).argmin())
        chosen.append(int(rows[best]))
        distance = left[:, best]
    return units[chosen]


def _distances(units: Floats, others: Floats) -> NDArray[np.float64]:
    """Squared distances between unit vectors: (N, d) and (m, d) -> (N, m)."""
    return np.maximum(2.0 - 2.0 * (units @ others.T).astype(np.float64), 0.0)


def _means(units: Floats, labels: Ints, k: int) -> Floats:
    """The mean directions (k, d) of the rows of each label."""
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(k + 1))
    sums = [units[order[a:b]].sum(axis=0, dtype=np.float64) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return unit_rows(np.stack(sums))


def _sample(rows: int, most: int, seed: int, stream: int) -> Ints:
    """At most `most` of `rows` row numbers, increasing."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.argsort(uniform_noise(seed, rows, stream), kind="stable")[:most])
