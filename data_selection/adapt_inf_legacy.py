"""What the published code of Adapt-inf does where this library departs from it, for comparisons.

Written anew from a description of github.com/adymaharana/adapt-inf at d1b1b25, without its missing seeds: the same call
gives the same picks here. A score that the histogram cannot take (NaN there) counts as 0.
"""

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .clusters import Clusters, unit_rows

CLUSTERS = 10
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def cluster(units: NDArray[np.float32], k: int, seed: int) -> Clusters:
    """Mini-batch k-means as of scikit-learn with batches of 10240; clusters without rows are dropped."""
    from sklearn.cluster import MiniBatchKMeans

    found: Any = MiniBatchKMeans(k, batch_size=10_240, random_state=seed % 2**32).fit(units)
    names, labels = np.unique(found.labels_, return_inverse=True)
    return Clusters(labels.astype(np.int64), unit_rows(found.cluster_centers_[names]), {})


def histogram_entropy(scores: Floats, bins: int) -> float:
    """Bits of the histogram of standardised scores (n,) over `bins` edges from -4 to 4 times the raw deviation: the
    unit of the score decides how many samples are counted at all."""
    deviation = scores.std()
    if deviation == 0:
        return 0.0
    z = (scores - scores.mean()) / deviation
    counts, _ = np.histogram(z, np.linspace(-4 * deviation, 4 * deviation, bins))
    if not counts.sum():
        return 0.0
    p = np.maximum(counts / counts.sum(), np.finfo(np.float64).eps)
    return float(-(p * np.log2(p)).sum())


def shares(sizes: list[int], budget: int) -> list[int]:
    """Equal shares, filled from the smallest cluster up; rounded up where every cluster has room, so that they may add
    up to more than the budget."""
    n = len(sizes)
    if n * min(sizes) >= budget:
        return [ceil(budget / n)] * n
    found, left = [0] * n, budget
    for done, i in enumerate(sorted(range(n), key=lambda i: sizes[i])):
        found[i] = min(sizes[i], left // (n - done))
        left -= found[i]
    return found


def stratified(scores: Floats, budget: int, noise: Floats, bins: int) -> tuple[Ints, Ints]:
    """Without the lowest and highest 5 % by value, from the hardest stratum down, each taking an equal part of what is
    left to pick; fewer than `budget` where the cut leaves fewer.

    Returns:
        Positions, increasing, and the stratum of each.
    """
    low, high = np.percentile(scores, 5), np.percentile(scores, 95)
    kept = np.flatnonzero((scores >= low) & (scores <= high))
    width = (high - low) / bins
    strata = np.zeros(len(kept), np.int64)
    if width > 0:
        strata = np.clip(((scores[kept] - low) / width).astype(np.int64), 0, bins - 1)
    picked, left = [], budget
    for number in range(bins - 1, -1, -1):
        own = kept[strata == number]
        taken = own[np.argsort(noise[own], kind="stable")][: min(ceil(left / (number + 1)), left)]
        picked += [(int(row), number) for row in taken]
        left -= len(taken)
    picked.sort()
    rows = np.array([row for row, _ in picked], np.int64)
    return rows, np.array([number for _, number in picked], np.int64)
