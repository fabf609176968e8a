"""pass@k and con@k without bias, and base against tuned on the same instances."""

from collections.abc import Hashable, Sequence
from math import comb
from typing import Any

import numpy as np

from ..errors import RlError
from ..statistics import ALIKE, alike_interval, bootstrap_interval
from .result import CheckResult

DRAWS = 200
Votes = Sequence[Sequence[Hashable]]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples is right, from n samples of which c were: 1 - C(n-c, k) / C(n, k).

    Unbiased, where 1 - (1 - c/n)^k and the first k samples are not or waste samples. Source: Chen et al.,
    arXiv 2107.03374, eq. 1. Raises RlError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise RlError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def con_at_k(
    answers: Sequence[Hashable], right: Hashable | set[Any], k: int, draws: int = DRAWS, seed: int = 0
) -> float:
    """The chance that the most frequent of k answers is right, k drawn without replacement from `answers`.

    right: the right answer, or a set of them where several are; each keeps its own votes. Ties are broken at random,
    that is, the right answer among m tied ones counts 1/m. (arXiv 2510.27044 breaks them towards the smaller, which
    favours some answers.) None counts as no vote. Exact for k = 1 and for k = len(answers), else the mean of `draws`
    draws. Raises RlError unless 1 <= k <= len(answers).
    """
    if not 1 <= k <= len(answers):
        raise RlError(f"con@k needs 1 <= k <= the number of answers, got k={k} for {len(answers)}")
    rights = right if isinstance(right, set) else {right}
    if k == 1:
        return sum(answer in rights for answer in answers) / len(answers)
    names = list(dict.fromkeys(answer for answer in answers if answer is not None))
    good = [place for place, name in enumerate(names) if name in rights]
    if not good:
        return 0.0
    codes = np.array([len(names) if answer is None else names.index(answer) for answer in answers])  # (n,)
    votes = np.eye(len(names) + 1)[codes][:, :-1]  # (n, answers); a None votes for nothing
    rng = np.random.default_rng(seed)
    order = rng.random((1 if k == len(codes) else draws, len(codes))).argsort(axis=1)[:, :k]  # (draws, k)
    tally = votes[order].sum(axis=1)  # (draws, answers)
    top = tally == tally.max(axis=1, keepdims=True)
    won = top[:, good].sum(axis=1) * (tally.max(axis=1) > 0)
    return float((won / top.sum(axis=1)).mean())


def ladder(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return ks if ks[-1] == n else [*ks, n]


def pass_curve(right: Sequence[Sequence[Any]], ks: Sequence[int] | None = None) -> dict[str, Any]:
    """pass@k over instances: {"k", "value", "low", "high", "n"}, intervals by bootstrap over instances.

    Where all instances are alike the ends are those of `alike_interval`.

    right: (N, n) of 0 and 1, n samples for each of N instances. ks: 1, 2, 4, ... n if not given.
    """
    table, chosen = _table(right, ks)  # (N, K)
    return {"k": chosen, **_means(table), "n": len(table)}


def con_curve(votes: Votes, right: Sequence[Hashable | set[Any]], ks: Sequence[int] | None = None) -> dict[str, Any]:
    """con@k over instances, in the form of `pass_curve`.

    votes: n stated answers for each of N instances, None for no vote. right: (N,) the right answer of each,
    or the set of them.
    """
    table, chosen = _con_table(votes, right, ks)  # (N, K)
    return {"k": chosen, **_means(table), "n": len(table)}


def base_vs_tuned(
    base: Sequence[Sequence[Any]],
    tuned: Sequence[Sequence[Any]],
    ks: Sequence[int] | None = None,
    votes: tuple[Votes, Votes, Sequence[Hashable | set[Any]]] | None = None,
) -> CheckResult:
    """pass@k of the tuned model against the base on the same instances, and the k where the base overtakes.

    base, tuned: (N, n) of 0 and 1, the same N instances in the same order. value: tuned minus base at k = 1,
    threshold 0, by a paired bootstrap over instances; where all instances differ alike, by `alike_interval`. details:
    both curves, the difference at each k with its interval, `crossing`: the smallest k from which the base is ahead
    (None: never), with `crossing_share`, the share of bootstrap resamples in which there is one. votes: the base's
    answers, the tuned model's and the right ones, as `con_curve` takes them; then details["con"] compares con@k alike.
    Departures from the
    plain verdict: "pass" and "fail" need an interval wholly above or below 0, so that equal models get "warn"; and a
    pass becomes "warn" where the base is surely ahead at the largest k, that is, where training has narrowed what the
    model can find.
    (Yue et al., arXiv 2504.13837, report that; Wen et al., 2506.14245, and ProRL, 2505.24864, find otherwise:
    look at your curve.) Raises RlError for shapes that do not match.
    """
    first, chosen = _table(base, ks)  # (N, K)
    second, _ = _table(tuned, chosen)
    if len(first) != len(second):
        raise RlError(f"base and tuned need the same instances, got {len(first)} and {len(second)}")
    change = second - first  # (N, K)
    difference = _means(change, lowest=-1.0)
    means, low, high = (difference[name] for name in ("value", "low", "high"))
    verdict = "pass" if low[0] > 0 else "fail" if high[0] < 0 else "warn"
    if verdict == "pass" and high[-1] < 0:
        verdict = "warn"
    details = {
        "k": chosen,
        "base": pass_curve(base, chosen),
        "tuned": pass_curve(tuned, chosen),
        "difference": difference,
        "crossing": _crossing(means, chosen),
        "crossing_share": _crossing_share(change),
    }
    if votes is not None:
        first, _ = _con_table(votes[0], votes[2], chosen)
        second, _ = _con_table(votes[1], votes[2], chosen)
        curves = {"base": _means(first), "tuned": _means(second), "difference": _means(second - first, lowest=-1.0)}
        details["con"] = {"k": chosen, **curves}
    return CheckResult("base_vs_tuned", means[0], (low[0], high[0]), len(first), 0.0, verdict, details)


def _con_table(
    votes: Votes, right: Sequence[Hashable | set[Any]], ks: Sequence[int] | None
) -> tuple[np.ndarray, list[int]]:
    """(N, K): con@k of each instance, and the ks."""
    if not len(votes) or len(votes) != len(right) or len({len(own) for own in votes}) != 1:
        raise RlError(
            "con@k needs as many answers for each instance, and the right one; got those of "
            f"{len(votes)} instances and {len(right)} right ones"
        )
    chosen = list(ks) if ks is not None else ladder(len(votes[0]))
    rows = zip(votes, right, strict=True)
    return np.array([[con_at_k(own, value, k) for k in chosen] for own, value in rows]), chosen


def _means(table: np.ndarray, lowest: float = 0.0) -> dict[str, list[float]]:
    """{"value", "low", "high"} of each column of (N, K); where all items are alike the ends are `alike_interval`'s."""
    low, high = bootstrap_interval(table, lambda means: means)
    for place in np.flatnonzero(np.ptp(table, axis=0) < ALIKE):
        low[place], high[place] = alike_interval(float(table[0, place]), len(table), lowest=lowest)
    return {"value": table.mean(axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _table(right: Sequence[Sequence[Any]], ks: Sequence[int] | None) -> tuple[np.ndarray, list[int]]:
    """(N, K): pass@k of each instance, and the ks."""
    try:
        array = np.asarray(right, dtype=np.int64)
    except ValueError:
        array = np.zeros((0, 0), dtype=np.int64)
    if array.ndim != 2 or not array.size or not np.isin(array, (0, 1)).all():
        raise RlError("right must be a table (instances, samples) of 0 and 1, with as many samples for each instance")
    n = int(array.shape[-1])
    chosen = list(ks) if ks is not None else ladder(n)
    lookup = np.array([[pass_at_k(n, c, k) for k in chosen] for c in range(n + 1)])  # (n + 1, K)
    return lookup[array.sum(axis=1)], chosen


def _crossing(difference: Sequence[float], ks: list[int]) -> int | None:
    """The smallest k from which on the difference stays negative."""
    ahead = None
    for place in reversed(range(len(ks))):
        if difference[place] >= 0:
            break
        ahead = ks[place]
    return ahead


def _crossing_share(change: np.ndarray, resamples: int = 2000, seed: int = 0) -> float:
    """The share of resamples with a `_crossing`: those in which the base is ahead at the largest k."""
    n = len(change)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # (resamples, N)
    return float((weights @ change[:, -1] / n < 0).mean())
