"""Intervals for rates and for differences of paired rates."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev, variance
from typing import Any

from .errors import RlError

ALIKE = 1e-9  # numbers this close are the same


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a rate of `successes` in `n` trials.

    Never empty and never outside [0, 1], also at 0 or n successes, where the normal interval fails.
    Source: E. B. Wilson, JASA 22 (1927), 209-212. Raises RlError unless 0 <= successes <= n, n >= 1 and
    0 < confidence < 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise RlError(f"a rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    rate = successes / n
    middle = rate + z * z / (2 * n)
    half = z * sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == n else (middle + half) / scale
    return low, high


def paired_difference(
    first: Sequence[int | bool],
    second: Sequence[int | bool],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """mean(first) - mean(second) of two paired 0/1 sequences, with a bootstrap interval: (value, low, high).

    The percentile bootstrap over items. An item's difference is -1, 0 or 1, so that drawing n items with
    replacement is one multinomial draw of three counts; the cost does not depend on n. Where all items differ
    alike the bootstrap would be a point, as it cannot see what it never met; `alike_interval` is given instead.

    Raises RlError for sequences that are empty, of different lengths or not 0/1, and for a bad confidence or
    number of resamples.
    """
    import numpy as np

    _checked(confidence)
    if len(first) != len(second) or not len(first):
        raise RlError(f"paired sequences need one length, 1 or more, got {len(first)} and {len(second)} items")
    if resamples < 1:
        raise RlError(f"resamples must be 1 or more, got {resamples}")
    a, b = np.asarray(first), np.asarray(second)  # (n,)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise RlError("paired sequences must hold only 0 and 1 (or False and True)")
    n = len(a)
    differences = a.astype(np.int64) - b.astype(np.int64)
    counts = np.bincount(differences + 1, minlength=3)  # how many -1, 0, 1
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)  # (resamples, 3)
    means = (draws[:, 2] - draws[:, 0]) / n
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    if counts.max() == n:
        low, high = alike_interval(float(differences[0]), n, confidence)
    return float(differences.mean()), float(low), float(high)


def alike_interval(value: float, n: int, confidence: float = 0.95, lowest: float = -1.0) -> tuple[float, float]:
    """An interval of a mean of n numbers in [lowest, 1] that are all `value`, where the bootstrap gives a point.

    lowest: -1 for differences of two rates, 0 for rates. The true share of items that differ otherwise may be up to the
    upper end u of Wilson's interval of 0 in n; such items lie at worst at lowest or at 1. So
    (value - u (value - lowest), value + u (1 - value)): a difference of 0 in 3, +-0.56; of 0 in 200, +-0.02; of 1 in 3,
    from -0.12 to 1. Raises RlError for a value outside [lowest, 1], n < 1 or a bad confidence.
    """
    if not lowest <= value <= 1:
        raise RlError(f"the number lies in [{lowest:g}, 1], got {value}")
    other = wilson_interval(0, n, confidence)[1]
    return value - other * (value - lowest), value + other * (1 - value)


def clustered_mean(
    values: Sequence[float],
    groups: Sequence[int],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    lowest: float = 0.0,
) -> tuple[float, float, float, int]:
    """The mean of values that come in groups, with an interval over groups: (value, low, high, groups).

    groups: one label a value (samples of one instance share it). lowest: the least that a value could be, 0 for rates,
    -1 for differences of rates. Rates with one value a group get the Wilson interval, everything else the percentile
    bootstrap over groups (each drawn with all its values). Where all groups agree the bootstrap would be a point, and
    `alike_interval` over groups is given, which of rates of 0 and of 1 is Wilson's; beyond [lowest, 1] nothing bounds
    what was not seen, and the point stays.
    Raises RlError for nothing, for lengths that differ and for a bad confidence.
    """
    import numpy as np

    _checked(confidence)
    if len(values) != len(groups) or not len(values):
        raise RlError(f"one group a value is needed, 1 or more, got {len(values)} values and {len(groups)} groups")
    v = np.asarray(values, dtype=np.float64)  # (N,)
    g = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)  # (N,)
    sums, sizes = np.bincount(g, weights=v), np.bincount(g)  # (G,), (G,)
    count, value = len(sums), float(v.mean())
    if lowest == 0 and count == len(v) and np.isin(v, (0.0, 1.0)).all():
        return value, *wilson_interval(round(value * count), count, confidence), count
    if np.ptp(sums / sizes) < ALIKE and lowest <= value <= 1:
        return value, *alike_interval(value, count, confidence, lowest), count
    low, high = bootstrap_interval(
        np.stack([sums, sizes], axis=1), lambda m: m[:, 0] / m[:, 1], confidence, resamples, seed
    )
    return value, float(low), float(high), count


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The mean of a few numbers with Student's interval: (value, low, high). Raises RlError for fewer than 2."""
    from scipy.stats import t

    if len(values) < 2:
        raise RlError(f"an interval of a mean needs 2 values or more, got {len(values)}")
    half = stdev(values) / sqrt(len(values)) * float(t.ppf(0.5 + _checked(confidence) / 2, len(values) - 1))
    return fmean(values), fmean(values) - half, fmean(values) + half


def difference_of_means(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """mean(first) - mean(second) of two independent samples with Welch's interval: (value, low, high).

    Source: B. L. Welch, Biometrika 34 (1947), 28-35. Raises RlError for fewer than 2 values in either.
    """
    from scipy.stats import t

    if min(len(first), len(second)) < 2:
        raise RlError(f"a difference of means needs 2 values or more each, got {len(first)} and {len(second)}")
    value = fmean(first) - fmean(second)
    a, b = variance(first) / len(first), variance(second) / len(second)
    if a + b == 0:
        return value, value, value
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    half = sqrt(a + b) * float(t.ppf(0.5 + _checked(confidence) / 2, freedom))
    return value, value - half, value + half


def bootstrap_interval(
    items: Any, statistic: Any, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Any, Any]:
    """The percentile interval of `statistic(means)` under drawing items with replacement: (low, high).

    items: (N, K), K numbers an item. statistic: (resamples, K) means of the drawn items -> (resamples,) or
    (resamples, M); the ends have shape () or (M,). Items that are alike are drawn as one multinomial count.
    """
    import numpy as np

    _checked(confidence)
    kinds, counts = np.unique(np.asarray(items, dtype=np.float64), axis=0, return_counts=True)  # (U, K), (U,)
    n = counts.sum()
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)  # (resamples, U)
    found = statistic(draws @ kinds / n)
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise RlError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
