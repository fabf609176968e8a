import numpy as np
import pytest

from krontune.data_selection import adapt_inf_legacy as published
from krontune.data_selection.coverage import (
    central,
    histogram_entropy,
    mean_ranks,
    similarity_to_earlier,
    stratified,
    water_fill,
)

RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.normal(size=500),
    "log-normal": RNG.lognormal(size=500),
    "bimodal": np.repeat([0.0, 1.0], 250),
    "three values": np.repeat([-1.0, 0.0, 1.0], [50, 200, 50]),
}


@pytest.mark.parametrize("scores", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize(("a", "b"), [(1e-9, 0), (0.01, 3), (10, -700), (1e12, 1)])
def test_entropy_does_not_depend_on_the_unit(scores, a, b):
    assert histogram_entropy(a * scores + b) == pytest.approx(histogram_entropy(scores), abs=1e-12)


def test_entropy_equals_a_count_by_hand():
    scores = np.array([0.0, 0.0, 0.0, 10.0])  # z = -0.577 three times and 1.732: two bins
    assert histogram_entropy(scores) == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    far = np.array([0.0] * 99 + [1.0])  # z = 9.9, beyond the last edge: counted in the last bin
    assert histogram_entropy(far) == pytest.approx(-(0.99 * np.log2(0.99) + 0.01 * np.log2(0.01)))


@pytest.mark.parametrize("scores", [np.full(9, 3.7), np.full(9, 0.1) * 3, np.zeros(3), np.empty(0), np.array([2.0])])
def test_a_constant_score_has_no_entropy(scores):
    assert histogram_entropy(scores) == 0.0


def test_the_published_entropy_depends_on_the_unit():
    scores = np.random.default_rng(1).normal(size=5000)
    found = [published.histogram_entropy(a * scores, 50) for a in (0.1, 1, 10)]
    # Measured on the published code: 5.59, 4.66 and 1.48 bits.
    assert found == pytest.approx([5.59, 4.66, 1.48], abs=0.06)


def naive_water_fill(sizes, budget, weights):
    shares = [0] * len(sizes)
    for _ in range(min(budget, sum(sizes))):
        free = [i for i in range(len(sizes)) if shares[i] < sizes[i]]
        shares[min(free, key=lambda i: ((shares[i] + 1) / weights[i], i))] += 1
    return shares


def test_water_filling_gives_out_the_budget_exactly_and_as_one_unit_at_a_time():
    rng = np.random.default_rng(2)
    for _ in range(300):
        k = int(rng.integers(1, 9))
        sizes = rng.integers(0, 40, k).tolist()
        budget = int(rng.integers(0, sum(sizes) + 5))
        weights = rng.choice([1.0, 2.0, 0.5, 3.7], k).tolist()
        for chosen in (weights, None):
            shares = water_fill(sizes, budget, chosen)
            assert shares == naive_water_fill(sizes, budget, chosen or [1.0] * k)
            assert sum(shares) == min(budget, sum(sizes))


def naive_stratified(scores, budget, noise, bins, trim):
    ranked = sorted(range(len(scores)), key=lambda i: (scores[i], noise[i]))
    count = max(budget, len(scores) - 2 * int(trim * len(scores)))
    first = (len(scores) - count) // 2
    kept = ranked[first : first + count]
    low, high = min(scores[i] for i in kept), max(scores[i] for i in kept)
    width = (high - low) / bins
    strata = [[] for _ in range(bins)]
    for i in kept:
        strata[min(bins - 1, int((scores[i] - low) / width)) if width > 0 else 0].append(i)
    shares = naive_water_fill([len(stratum) for stratum in strata], budget, [1.0] * bins)
    picked = {}
    for number, (stratum, share) in enumerate(zip(strata, shares, strict=True)):
        for i in sorted(stratum, key=lambda i: noise[i])[:share]:
            picked[i] = number
    return sorted(picked.items())


def test_strata_equal_the_ones_filled_by_hand():
    rng = np.random.default_rng(3)
    for _ in range(100):
        n = int(rng.integers(1, 60))
        scores = rng.choice([rng.normal(size=n), rng.integers(0, 3, n).astype(float), np.zeros(n)])
        budget, noise = int(rng.integers(0, n + 1)), rng.random(n)
        rows, strata = stratified(scores, budget, noise, bins=7, trim=0.1)
        assert list(zip(rows.tolist(), strata.tolist(), strict=True)) == naive_stratified(scores, budget, noise, 7, 0.1)


def test_the_extremes_are_left_out_where_the_budget_leaves_room():
    scores, noise = np.arange(100.0), np.random.default_rng(0).random(100)
    assert set(stratified(scores, 90, noise)[0]) == set(range(5, 95))
    assert set(stratified(scores, 98, noise)[0]) == set(range(1, 99))
    assert central(scores, 2, noise).tolist() == [49, 50]


def test_a_rare_range_of_scores_is_covered():
    scores = np.concatenate([np.zeros(900) + np.linspace(0, 0.01, 900), np.linspace(1, 10, 100)])
    rows, _ = stratified(scores, 60, np.random.default_rng(0).random(1000), trim=0.0)
    assert (rows >= 900).sum() > 40, "a random draw would take 6"


def test_mean_ranks_share_ties():
    assert mean_ranks([np.array([3.0, 1.0, 3.0])]).tolist() == [0.75, 0.0, 0.75]
    assert mean_ranks([np.array([1.0, 2.0]), np.array([2.0, 1.0])]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_similarity_in_blocks_equals_the_whole_matrix(at_once):
    units = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = units @ units.T
    expected = [-1.0] + [cosines[j, :j].max() for j in range(1, 30)]
    np.testing.assert_allclose(similarity_to_earlier(units, at_once), expected, atol=1e-6)


def test_published_shares_may_exceed_the_budget():
    assert published.shares([10, 10, 10], 10) == [4, 4, 4]
    assert published.shares([1, 10, 10], 9) == [1, 4, 4]


def naive_published_strata(scores, budget, noise, bins):
    low, high = np.percentile(scores, 5), np.percentile(scores, 95)
    edges = [low + (high - low) * i / bins for i in range(bins)]
    left, found = budget, {}
    for number in range(bins - 1, -1, -1):
        inside = [
            i
            for i, score in enumerate(scores)
            if low <= score <= high and number == max(j for j in range(bins) if edges[j] <= score)
        ]
        quota = min(-(-left // (number + 1)), left)
        taken = sorted(inside, key=lambda i: noise[i])[:quota]
        left -= len(taken)
        found |= dict.fromkeys(taken, number)
    return sorted(found.items())


def test_published_strata_are_filled_from_the_hardest_down_without_the_extremes():
    rng = np.random.default_rng(7)
    for size, budget in ((60, 20), (60, 54), (9, 3), (60, 60)):
        scores, noise = rng.lognormal(size=size), rng.random(size)
        rows, strata = published.stratified(scores, budget, noise, 5)
        expected = naive_published_strata(scores, budget, noise, 5)
        assert list(zip(rows.tolist(), strata.tolist(), strict=True)) == expected
        assert len(rows) <= budget and (budget < 60 or len(rows) == 54), "never those beyond the percentiles"
