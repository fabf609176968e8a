"""How a budget is shared out over clusters and, within one, over the range of a score: pure functions on arrays.

Sources: the entropy of a score's histogram as the reason to select by it, and shares per cluster, arXiv 2410.10636;
strata of equal width within a cluster (coverage-centric sampling, CCS), arXiv 2210.15809. Departures from the published
code of the first are stated at each function.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS, TRIM = 50, 0.05
Z_RANGE = 4.0


def histogram_entropy(scores: Floats, bins: int = BINS) -> float:
    """Entropy, in bits, of the histogram of scores (n,) in `bins` equal bins from -4 to 4 standard deviations.

    It does not change with the unit of the score, H(a x + b) = H(x) for a > 0: values outside go in the outermost bins,
    and a constant score has entropy 0. (The published code lays the bins by the raw standard deviation over already
    standardised values, so that scores of a small unit win.)
    """
    deviation = scores.std() if len(scores) else 0.0
    if not deviation > 1e-12 * max(1e-300, float(np.abs(scores).max(initial=0))):
        return 0.0
    # Rounded, so that a value on the edge of a bin stays on one side of it whatever the unit.
    z = np.round((scores - scores.mean()) / deviation, 9)
    places = np.clip(np.floor((z + Z_RANGE) / (2 * Z_RANGE) * bins), 0, bins - 1).astype(np.int64)
    counts = np.bincount(places, minlength=bins)
    p = counts[counts > 0] / len(scores)
    return float(-(p * np.log2(p)).sum())


def water_fill(sizes: Sequence[int], budget: int, weights: Sequence[float] | None = None) -> list[int]:
    """Shares of a budget in proportion to weights, none above its size: what one cannot use goes to the others.

    The shares add up to min(budget, sum of sizes) exactly. They are those of giving out one unit at a time, each to the
    cluster with room left for which (share + 1) / weight is lowest, of equal ones the first.

    Args:
        sizes: (k,) room of each cluster.
        budget: units to give out.
        weights: (k,) above 0, or None for equal ones.

    Returns:
        (k,) shares.
    """
    weights = [1.0] * len(sizes) if weights is None else list(weights)
    budget = min(budget, sum(sizes))
    # The level L at which sum(min(size, L weight)) is the budget; whole units below it are certain.
    left, mass, level = float(budget), sum(w for w, size in zip(weights, sizes, strict=True) if size), 0.0
    for full, at in sorted((size / w, i) for i, (size, w) in enumerate(zip(sizes, weights, strict=True)) if size):
        level = left / mass
        if level <= full:
            break
        left, mass = left - sizes[at], mass - weights[at]
    shares = [min(size, max(0, int(level * w * (1 - 1e-12)))) for size, w in zip(sizes, weights, strict=True)]
    heap = [((shares[i] + 1) / weights[i], i) for i in range(len(sizes)) if shares[i] < sizes[i]]
    heapq.heapify(heap)
    for _ in range(budget - sum(shares)):
        _, i = heapq.heappop(heap)
        shares[i] += 1
        if shares[i] < sizes[i]:
            heapq.heappush(heap, ((shares[i] + 1) / weights[i], i))
    return shares


def stratified(scores: Floats, budget: int, noise: Floats, bins: int = BINS, trim: float = TRIM) -> tuple[Ints, Ints]:
    """Pick `budget` of n samples evenly over the range of their scores, without the extremes.

    The `trim` share of the samples with the lowest scores and as many with the highest are left out, fewer where the
    budget needs them. The range of the rest is cut in `bins` strata of equal width; strata share the budget by
    `water_fill`, and within one the samples of lowest `noise` are taken. (CCS as published cuts the hardest alone; the
    code of arXiv 2410.10636 cuts both ends by value and fills from the hardest stratum down.)

    Args:
        scores: (n,) finite.
        budget: at most n.
        noise: (n,) random numbers, one a sample.
        bins: strata.
        trim: share left out at each end.

    Returns:
        Positions (budget,), increasing, and the stratum of each.
    """
    if budget == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    kept = central(scores, max(budget, len(scores) - 2 * int(trim * len(scores))), noise)
    low, high = scores[kept].min(), scores[kept].max()
    width = (high - low) / bins
    strata = np.zeros(len(kept), np.int64)
    if width > 0:
        strata = np.clip(((scores[kept] - low) / width).astype(np.int64), 0, bins - 1)
    shares = water_fill(np.bincount(strata, minlength=bins).tolist(), budget)
    order = np.lexsort((noise[kept], strata))
    place = np.arange(len(order)) - np.searchsorted(strata[order], strata[order])  # within the stratum
    taken = np.sort(order[place < np.array(shares)[strata[order]]])
    picked = np.argsort(kept[taken], kind="stable")
    return kept[taken][picked], strata[taken][picked]


def central(scores: Floats, count: int, noise: Floats) -> Ints:
    """The positions of the `count` samples in the middle of the ranking by score; ties in the order of `noise`."""
    ranked = np.lexsort((noise, scores))
    first = (len(scores) - count) // 2
    return np.sort(ranked[first : first + count])


def mean_ranks(columns: Sequence[Floats]) -> Floats:
    """The mean over several scores (n,) of a sample's rank, equal values sharing theirs, scaled to 0 to 1."""
    ranks = []
    for column in columns:
        _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - (counts + 1) / 2
        ranks.append(middle[inverse] / max(1, len(column) - 1))
    return np.mean(ranks, axis=0)


def similarity_to_earlier(units: NDArray[np.float32], rows_at_once: int = 1024) -> NDArray[np.float32]:
    """The highest cosine of each unit vector to those before it: (n, d) -> (n,), -1 for the first. Memory holds
    `rows_at_once` rows of the cosines."""
    found = np.full(len(units), -1.0, np.float32)
    for first in range(0, len(units), rows_at_once):
        block = units[first : first + rows_at_once]
        cosines = block @ units[: first + len(block)].T
        own = cosines[:, first:]
        own[np.triu_indices(len(block))] = -1.0  # a row itself and those after it
        found[first : first + len(block)] = cosines.max(axis=1)
    return found
