import random
import statistics

import pytest

from krontune.rl import RlError, paired_difference, wilson_interval
from krontune.rl.statistics import alike_interval, clustered_mean, difference_of_means, mean_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (1, 10, 0.01788, 0.40415),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.25529, 0.36621),
        (15, 148, 0.06238, 0.16055),
        (1, 29, 0.00611, 0.17178),
    ],
)
def test_wilson_gives_the_published_numbers(successes, n, low, high):
    """81/263, 15/148 and 1/29 are examples of R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=2e-4)


def test_wilson_narrows_with_less_confidence():
    low, high = wilson_interval(30, 100)
    low_90, high_90 = wilson_interval(30, 100, confidence=0.9)
    assert low < low_90 < 0.3 < high_90 < high


@pytest.mark.parametrize(("successes", "n", "confidence"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1)])
def test_wilson_refuses_what_is_no_rate(successes, n, confidence):
    with pytest.raises(RlError):
        wilson_interval(successes, n, confidence)


def naive_bootstrap(first, second, resamples, seed):
    """Draw items with replacement, one by one."""
    rng = random.Random(seed)
    pairs = list(zip(first, second, strict=True))
    means = []
    for _ in range(resamples):
        drawn = rng.choices(pairs, k=len(pairs))
        means.append(sum(a - b for a, b in drawn) / len(drawn))
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


@pytest.mark.parametrize("n", [11, 31, 150])
def test_the_paired_interval_agrees_with_drawing_items_one_by_one(n):
    rng = random.Random(n)
    second = [int(rng.random() < 0.4) for _ in range(n)]
    first = [b if rng.random() < 0.6 else int(rng.random() < 0.8) for b in second]
    value, low, high = paired_difference(first, second, resamples=4000)
    naive_low, naive_high = naive_bootstrap(first, second, 4000, 1)
    assert value == pytest.approx((sum(first) - sum(second)) / n)
    step = 2.01 / n if n < 100 else 0.02
    assert abs(low - naive_low) <= step and abs(high - naive_high) <= step
    assert low <= value <= high


def test_the_paired_interval_uses_the_pairing():
    noise = [i % 2 for i in range(200)]
    same = [(i + 1) % 2 for i in range(200)]
    assert paired_difference(noise, noise) == pytest.approx((0.0, -0.0188, 0.0188), abs=1e-3)
    value, low, high = paired_difference(noise, same)
    assert value == 0.0 and low < -0.1 and high > 0.1


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_few_pairs_that_differ_alike_are_not_sure(first, second):
    value, low, high = paired_difference([first] * 3, [second] * 3)
    assert value == first - second and -1 <= low <= 0 <= high <= 1 and high - low > 0.5
    _, low, high = paired_difference([first] * 300, [second] * 300)
    assert high - low < 0.03 and low <= value <= high


def test_the_interval_of_differences_that_are_alike_holds_wilsons_share_of_others():
    share = wilson_interval(0, 7)[1]
    for value in (-1.0, -0.25, 0.0, 0.5, 1.0):
        ends = [(1 - share) * value + share * other for other in (-1, 1)]
        assert alike_interval(value, 7) == pytest.approx(ends)
    with pytest.raises(RlError, match="1.5"):
        alike_interval(1.5, 3)


def test_the_seed_decides_the_interval():
    first, second = [1, 1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 1]
    assert paired_difference(first, second, seed=4) == paired_difference(first, second, seed=4)
    intervals = {paired_difference(first, second, resamples=40, seed=seed) for seed in range(20)}
    assert len(intervals) > 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([1], [1, 0]), ([0.5], [1]), ([2], [1])])
def test_what_is_not_paired_zeros_and_ones_is_refused(first, second):
    with pytest.raises(RlError):
        paired_difference(first, second)


def naive_clustered(values, groups, resamples, seed):
    """Draw groups with replacement, one by one, each with all its values."""
    rng = random.Random(seed)
    names = sorted(set(groups))
    members = {name: [v for v, g in zip(values, groups, strict=True) if g == name] for name in names}
    means = []
    for _ in range(resamples):
        drawn = [v for name in rng.choices(names, k=len(names)) for v in members[name]]
        means.append(sum(drawn) / len(drawn))
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


@pytest.mark.parametrize("count", [12, 40])
def test_the_clustered_interval_agrees_with_drawing_groups_one_by_one(count):
    rng = random.Random(count)
    groups = [g for g in range(count) for _ in range(1 + g % 4)]
    lean = [rng.random() for _ in range(count)]
    values = [float(rng.random() < lean[g]) for g in groups]
    value, low, high, n = clustered_mean(values, groups, resamples=4000)
    naive_low, naive_high = naive_clustered(values, groups, 4000, 1)
    assert value == pytest.approx(sum(values) / len(values)) and n == count
    assert (low, high) == pytest.approx((naive_low, naive_high), abs=0.03)


def test_samples_of_one_instance_do_not_narrow_the_interval():
    flags = [float(i % 2) for i in range(40)]
    _, low, high, n = clustered_mean(flags, range(40))
    repeated = clustered_mean([flag for flag in flags for _ in range(16)], [i for i in range(40) for _ in range(16)])
    assert n == repeated[3] == 40
    assert repeated[1:3] == pytest.approx((low, high), abs=0.03)


@pytest.mark.parametrize("difference", [-1.0, 0.0, 1.0])
def test_differences_that_never_varied_may_lie_on_either_side_of_what_was_seen(difference):
    for count in (1, 50):
        value, low, high, n = clustered_mean([difference] * count, range(count), lowest=-1.0)
        assert (value, n) == (difference, count) and (low, high) == alike_interval(difference, count)


def test_a_rate_that_never_varied_still_has_an_interval():
    found = clustered_mean([1.0] * 64, [i // 4 for i in range(64)])
    assert found == pytest.approx((1.0, *wilson_interval(16, 16), 16))
    for values, groups in (([0.0, 1.0], [0, 0]), ([0.5, 0.5], [0, 1])):  # alike, between 0 and 1
        value, low, high, n = clustered_mean(values, groups)
        share = wilson_interval(0, n)[1]
        assert (value, low, high) == pytest.approx((0.5, 0.5 - 0.5 * share, 0.5 + 0.5 * share))
    with pytest.raises(RlError):
        clustered_mean([], [])
    with pytest.raises(RlError):
        clustered_mean([1.0], [1, 2])


def test_intervals_of_means_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(2)
    first, second = [rng.gauss(1, 2) for _ in range(5)], [rng.gauss(0, 1) for _ in range(8)]
    known = stats.ttest_ind(first, second, equal_var=False)
    value, low, high = difference_of_means(first, second)
    assert (low, high) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert value == pytest.approx(statistics.fmean(first) - statistics.fmean(second))
    known = stats.ttest_1samp(first, 0)
    assert mean_interval(first)[1:] == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert difference_of_means([1.0, 1.0], [0.5, 0.5]) == (0.5, 0.5, 0.5)
    for call in (lambda: mean_interval([1.0]), lambda: difference_of_means([1.0], [1.0, 2.0])):
        with pytest.raises(RlError, match="2 values"):
            call()
