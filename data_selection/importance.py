"""The maths of DSIR (arXiv 2302.03169): bucket counts of target and raw texts to log ratios and divergences.

Counts are n-grams a hash bucket, (buckets,); p is the target's distribution over buckets, q is raw's.
"""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]

# A random pick of a few hundred texts seems worse than raw for the n-grams that it is too small to hold: on
# docstrings up to 0.2 nats with a prior of 1 n-gram a bucket, at most 0.03 with 10.
PRIOR_NGRAMS = 10


def log_ratios(target_counts: Counts, raw_counts: Counts, smoothing: float, kind: str = "interpolate") -> Floats:
    """(buckets,) log(p'_b / q_b).

    - "interpolate": p' = (1 - smoothing) p + smoothing q;
    - "laplace": p' = (counts + smoothing) / (n-grams + smoothing * buckets);
    - "eps": log(p_b + smoothing) - log(q_b + smoothing), the official package's with 1e-8.

    With the first two a bucket that neither side has seen weighs 0, and q has half an n-gram in a bucket that the
    target alone has seen.
    """
    p = distribution(target_counts)
    if kind == "eps":
        return np.log(p + smoothing) - np.log(distribution(raw_counts) + smoothing)
    q = raw_distribution(target_counts, raw_counts)
    seen = q > 0
    ratios = np.ones(len(q))
    if kind == "interpolate":
        ratios[seen] = (1 - smoothing) * p[seen] / q[seen] + smoothing
    else:
        ratios[seen] = distribution(target_counts + smoothing)[seen] / q[seen]
    return np.log(ratios)


def normalised(sums: Floats, counts: Counts, normalize: str) -> Floats:
    """(N, targets) sums of log ratios over texts of `counts` n-grams, (N,), divided by the count ("mean"), by its
    square root ("sqrt") or by 1 ("sum"); -inf for a text without n-grams."""
    power = {"mean": 1.0, "sqrt": 0.5, "sum": 0.0}[normalize]
    divisors = np.maximum(counts, 1) ** power
    return np.where((counts > 0)[:, None], sums / divisors[:, None], -np.inf)


def distribution(counts: NDArray[Any]) -> Floats:
    """(buckets,) counts divided by their sum."""
    return counts / counts.sum()


def raw_distribution(target_counts: Counts, raw_counts: Counts) -> Floats:
    """(buckets,) q: raw's shares of n-grams, with half an n-gram in every bucket seen by the target alone."""
    return distribution(np.where((raw_counts == 0) & (target_counts > 0), 0.5, raw_counts))


def kl_reduction(target_counts: Counts, raw_counts: Counts, picked_counts: Counts) -> float:
    """KL(p || q) - KL(p || p_picked) = sum_b p_b log(p_picked_b / q_b), in nats. p_picked has a prior: q,
    worth PRIOR_NGRAMS n-grams a bucket on average."""
    p, q = distribution(target_counts), raw_distribution(target_counts, raw_counts)
    picked = distribution(picked_counts + PRIOR_NGRAMS * len(q) * q)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(picked[seen] / q[seen])))


def fold(counts: Counts, buckets: int) -> Counts:
    """Counts added up in `buckets` groups of neighbouring hash buckets; as they are where there are no more.

    Bucket b goes to group floor(b * buckets / len(counts)), about where its n-grams would be hashed to.
    """
    if len(counts) <= buckets:
        return counts
    first = -(-np.arange(buckets) * len(counts) // buckets)  # of each group: the quotient rounded up
    return np.add.reduceat(counts, first)
