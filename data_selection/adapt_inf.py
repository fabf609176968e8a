"""Adapt-inf: pick training data skill by skill, each skill by the score that tells its samples apart best.

1. Samples whose gradients point the same way are taken for one skill: spherical k-means on the store's vectors.
2. Of every cluster, the score whose histogram has the highest entropy becomes its selector.
3. Clusters share the budget; what a small one cannot use goes to the others.
4. Within a cluster the range of the score is covered evenly (CCS).
5. `prune` drops, for good, the samples of a cluster that are most like others.

Source: arXiv 2410.10636. Its text was not readable in full; docs/adapt_inf.md lists what is known of it, and where this
differs from the published code. `legacy=True` does as that code does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import adapt_inf_legacy as published
from .clusters import Clusters, cluster, unit_rows
from .coverage import (
    BINS,
    TRIM,
    histogram_entropy,
    mean_ranks,
    similarity_to_earlier,
    stratified,
    water_fill,
)
from .selection import MAX_SEED, Selection, checked_int, uniform_noise
from .store import Store
from .texts import DataSelectionError

Shares = Literal["equal", "spread", "density"]
SHARES = ("equal", "spread", "density")


class _Pool(NamedTuple):
    """The rows of a store that can be picked."""

    rows: NDArray[np.int64]  # (N,) their numbers
    units: NDArray[np.float32]  # (N, d) of unit length
    clusters: Clusters


@dataclass(frozen=True)
class AdaptInf:
    """Selection and permanent pruning over the clusters of a `Store`.

    Args:
        clusters: how many skills to look for, or "auto": the knee of the sum of squared distances.
        selector: "entropy" (per cluster the score of highest histogram entropy), "mixed" (the mean rank over all
            scores), "random" (the balanced random control: same clusters and shares, no score), or the name of a score.
        scores: the scores of the store to choose among, or one; None for all.
        shares: of the budget a cluster gets: "equal", "spread" (in proportion to the standard deviation of the score
            "el2n" in the cluster), or "density" (to the distance between clusters times that within).
        bins: of the histograms and of the strata.
        trim: the share of a cluster left out at each end of its score, where the budget leaves room.
        min_cluster: clusters of fewer rows are merged into the nearest; None for one in 200 rows, at most 50.
        legacy: do as the published code does: mini-batch k-means of 10 clusters, histogram bins that depend on the
            score's unit, shares rounded up, the hardest stratum first, pruning that depends on the order of the rows.
            Only `clusters`, `scores` and `bins` have a meaning then, and the other options are left as they come.

    Raises:
        DataSelectionError: a value is not as above.
    """

    clusters: int | Literal["auto"] = "auto"
    selector: str = "entropy"
    scores: Sequence[str] | str | None = None
    shares: Shares = "equal"
    bins: int = BINS
    trim: float = TRIM
    min_cluster: int | None = None
    legacy: bool = False

    def __post_init__(self) -> None:
        if self.clusters != "auto":
            checked_int(self.clusters, "clusters", 1, 2**31, "'auto' looks for the number")
        if self.shares not in SHARES:
            raise DataSelectionError(f"shares={self.shares!r}: must be one of {', '.join(SHARES)}")
        checked_int(self.bins, "bins", 2, 2**20, f"{BINS} is the paper's")
        if not isinstance(self.trim, (int, float)) or not 0 <= self.trim < 0.5:
            raise DataSelectionError(f"trim={self.trim!r}: must be from 0 to below 0.5; it is cut at each end")
        if self.min_cluster is not None:
            checked_int(self.min_cluster, "min_cluster", 1, 2**31, "1 merges nothing")
        if self.legacy:
            fixed = {"selector": "entropy", "shares": "equal", "trim": TRIM, "min_cluster": None}
            other = [f"{name}={getattr(self, name)!r}" for name, value in fixed.items() if getattr(self, name) != value]
            if other:
                raise DataSelectionError(
                    f"legacy=True is the published choice, to which {', '.join(other)} does not belong; leave it out"
                )

    def select(self, store: Store, *, budget: int, seed: int = 0) -> Selection:
        """Pick `budget` rows of a complete store.

        Rows without an answer token, or with a score that is not finite, are never picked. Each pick's reason:
        `cluster`, `selector`, `score` (the value it was picked by) and `bin` (its stratum). `details` of the selection:
        rows, share and selector of every cluster, and how many rows were left out.

        Raises:
            DataSelectionError: the store is incomplete or has no vectors, lacks a score, or has fewer rows than asked.
        """
        checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
        columns = self._columns(store)
        pool = self._pool(store, seed)
        advice = f"the store has {len(pool.rows)} rows with an answer and finite scores"
        checked_int(budget, "budget", 1, len(pool.rows), advice)
        scores = {name: values[pool.rows] for name, values in columns.items()}
        members = _members(pool.clusters)
        shares = self._budgets(store, pool, members, budget)
        noise = uniform_noise(seed, len(store), stream=2)[pool.rows]
        picks, told = [], []
        for number, (own, share) in enumerate(zip(members, shares, strict=True)):
            name, values = self._selector({score: column[own] for score, column in scores.items()}, noise[own])
            if self.legacy:
                taken, strata = published.stratified(values, share, noise[own], self.bins)
            else:
                taken, strata = stratified(values, share, noise[own], self.bins, self.trim)
            told.append({"cluster": number, "rows": len(own), "share": share, "selector": name})
            for at, stratum in zip(taken.tolist(), strata.tolist(), strict=True):
                reason = {"cluster": number, "selector": name, "score": float(values[at]), "bin": stratum}
                picks.append((int(pool.rows[own[at]]), reason))
        return self._selection(picks, store, pool, seed, "adapt_inf", {"clusters": told})

    def prune(self, store: Store, *, keep: int, seed: int = 0) -> Selection:
        """What stays when a pool is cut to `keep` rows for good: of every cluster those least like the others.

        A row's likeness is its highest cosine to the rows of its cluster that come before it, the rows farthest from
        the cluster's centre coming first and equal ones in the order of the store. So the first of several copies
        stays, and which rows stay does not depend on how the pool is ordered. (The published code compares with the
        rows above in the file.) Clusters share `keep` equally, what a small one cannot use going to the others.

        Rows that `select` never picks do not stay. Reasons: `cluster` and `cosine`, the likeness; -1 for the first.

        Raises:
            DataSelectionError: as of `select`; a `keep` above the number of rows keeps them all.
        """
        checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
        checked_int(keep, "keep", 1, 2**62, "it is the number of rows that stay")
        pool = self._pool(store, seed)
        members = _members(pool.clusters)
        picks = []
        for number, (own, share) in enumerate(zip(members, water_fill([len(m) for m in members], keep), strict=True)):
            order = np.arange(len(own))
            if not self.legacy:
                typical = np.round(pool.units[own] @ pool.clusters.centres[number], 5)
                order = np.argsort(typical, kind="stable")
            likeness = np.empty(len(own), np.float32)
            likeness[order] = similarity_to_earlier(pool.units[own[order]])
            place = np.empty(len(own), np.int64)
            place[order] = np.arange(len(own))
            for at in np.lexsort((place, np.round(likeness, 5)))[:share].tolist():
                reason = {"cluster": number, "selector": "prune", "cosine": float(likeness[at])}
                picks.append((int(pool.rows[own[at]]), reason))
        return self._selection(picks, store, pool, seed, "adapt_inf_prune", {})

    def _columns(self, store: Store) -> dict[str, NDArray[np.float64]]:
        found = store.scores
        wanted = [self.scores] if isinstance(self.scores, str) else list(found if self.scores is None else self.scores)
        if self.selector not in ("entropy", "mixed", "random"):
            wanted = [self.selector]
        if self.shares == "spread" and "el2n" not in found:
            raise DataSelectionError("shares='spread' weighs clusters by the score 'el2n', which the store lacks")
        missing = [name for name in wanted if name not in found]
        if missing or not wanted and self.selector != "random":
            raise DataSelectionError(
                f"{missing or 'no score'} asked for, and the store has the scores {list(found)}; name some of them, or "
                "as selector 'entropy', 'mixed' or 'random'"
            )
        return {name: found[name] for name in wanted}

    def _pool(self, store: Store, seed: int) -> _Pool:
        rows = usable_rows(store)
        if not len(rows):
            raise DataSelectionError(
                "no row of the store has an answer token and finite scores; there is nothing to pick from"
            )
        units = unit_rows(store.vectors if len(rows) == len(store) else store.vectors[rows])
        if self.legacy:
            k = published.CLUSTERS if self.clusters == "auto" else self.clusters
            return _Pool(rows, units, published.cluster(units, min(k, len(units)), seed))
        smallest = self.min_cluster if self.min_cluster is not None else max(1, min(50, len(rows) // 200))
        k = None if self.clusters == "auto" else self.clusters
        return _Pool(rows, units, cluster(units, k, seed, smallest))

    def _selector(
        self, scores: dict[str, NDArray[np.float64]], noise: NDArray[np.float64]
    ) -> tuple[str, NDArray[np.float64]]:
        """The name of a cluster's selector, and its values (n,)."""
        if self.selector == "random":
            return "random", noise
        if self.selector == "mixed":
            return "mixed", mean_ranks(list(scores.values()))
        measure = published.histogram_entropy if self.legacy else histogram_entropy
        entropies = {name: measure(values, self.bins) for name, values in scores.items()}
        name = max(entropies, key=lambda name: entropies[name])  # of equal ones the first
        return name, scores[name]

    def _budgets(self, store: Store, pool: _Pool, members: list[NDArray[np.int64]], budget: int) -> list[int]:
        sizes = [len(own) for own in members]
        if self.legacy:
            return published.shares(sizes, budget)
        if self.shares == "equal":
            return water_fill(sizes, budget)
        if self.shares == "spread":
            el2n = store.scores["el2n"][pool.rows]
            weights = np.array([el2n[own].std() for own in members])
        else:
            weights = _densities(pool, members)
        # A cluster without spread still gets something, since a weight of 0 has no share at all.
        floor = 1e-3 * weights.max() if weights.max() > 0 else 1.0
        return water_fill(sizes, budget, np.maximum(weights, floor).tolist())

    def _selection(
        self, picks: list[tuple[int, dict[str, Any]]], store: Store, pool: _Pool, seed: int, method: str, details: Any
    ) -> Selection:
        picks.sort(key=lambda pick: pick[0])
        left_out = {"no_answer": int((~answered_rows(store)).sum())}
        if strange := len(store) - len(pool.rows) - left_out["no_answer"]:
            left_out["not_finite"] = strange
        details = {**details, "legacy": self.legacy, "left_out": left_out}
        if pool.clusters.curve:
            details["squared_distances"] = {str(k): total for k, total in pool.clusters.curve.items()}
        indices = np.array([row for row, _ in picks], np.int64)
        return Selection(indices, [reason for _, reason in picks], len(store), seed, method, details=details)


def balanced_control(method: AdaptInf) -> AdaptInf:
    """The random control with a method's clusters and shares."""
    return replace(method, selector="random", legacy=False)


def usable_rows(store: Store) -> NDArray[np.int64]:
    """The numbers of the rows that can be picked: those with an answer, all of whose scores are finite."""
    usable = answered_rows(store)
    for values in store.scores.values():
        usable &= np.isfinite(values)
    return np.flatnonzero(usable)


def answered_rows(store: Store) -> NDArray[np.bool_]:
    """(N,) whether a row has an answer token, and with it a gradient."""
    return store.norms > 0  # NaN, and so false, where there is none


def _members(clusters: Clusters) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(clusters.labels == number) for number in range(len(clusters.centres))]


def _densities(pool: _Pool, members: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Distance to the nearest other centre times the mean distance to the own one, (k,); distances are 1 - cosine."""
    centres = pool.clusters.centres.astype(np.float64)
    apart = 1.0 - centres @ centres.T
    np.fill_diagonal(apart, np.inf)
    between = apart.min(axis=1) if len(centres) > 1 else np.ones(1)
    within = [float((1.0 - pool.units[own] @ pool.clusters.centres[i]).mean()) for i, own in enumerate(members)]
    return np.maximum(between, 0.0) * np.maximum(within, 0.0)
