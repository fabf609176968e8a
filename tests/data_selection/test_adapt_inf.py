import numpy as np
import pytest

from krontune.data_selection import AdaptInf, DataSelectionError, Selection, Store
from krontune.data_selection.clusters import cluster, knee, merge_small, spherical_k_means, unit_rows


def planted(sizes, dim=16, noise=0.15, seed=0):
    """Directions of len(sizes) skills with that many samples each: vectors (N, dim) and skills (N,), shuffled."""
    rng = np.random.default_rng(seed)
    skills = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.linalg.qr(rng.normal(size=(dim, dim)))[0][: len(sizes)]
    vectors = centres[skills] + noise * rng.normal(size=(len(skills), dim)) / np.sqrt(dim)
    return (vectors * rng.lognormal(size=(len(skills), 1))).astype(np.float32), skills


def store_of(folder, vectors, **scores):
    scores = scores or {"nll": np.random.default_rng(5).normal(size=len(vectors))}
    store = Store.prepare(folder, {"projection": None}, len(vectors), [*scores, "gradient_norm"], vectors.shape[1])
    columns = [*scores.values(), np.linalg.norm(vectors, axis=1)]
    store.write(range(len(vectors)), np.stack(columns, axis=1), vectors)
    store.finish()
    return store


def test_planted_directions_and_their_number_are_found():
    for sizes in ([100] * 5, [300, 200, 100, 60], [40, 400, 80]):
        vectors, skills = planted(sizes)
        found = cluster(unit_rows(vectors), None, seed=0, min_size=5)
        assert len(found.centres) == len(sizes), found.curve
        assert len(set(zip(skills, found.labels, strict=True))) == len(sizes)
        first = [int(np.flatnonzero(found.labels == i)[0]) for i in range(len(sizes))]
        assert first == sorted(first), "clusters are numbered by their first rows"


def test_the_sum_of_squares_is_no_worse_than_that_of_the_truth():
    vectors, skills = planted([50] * 6, noise=0.6)
    units = unit_rows(vectors)
    centres, total = spherical_k_means(units, 6, seed=1)
    truth = unit_rows(np.stack([units[skills == i].mean(0) for i in range(6)]))
    naive = sum(((unit - truth) ** 2).sum(1).min() for unit in units)
    assert total == pytest.approx(sum(((unit - centres) ** 2).sum(1).min() for unit in units), rel=1e-5)
    assert total <= naive * 1.001


def test_scale_does_not_matter_to_a_direction():
    vectors, _ = planted([30, 30])
    tiny = unit_rows(vectors * np.float32(1e-25))
    np.testing.assert_allclose(tiny, unit_rows(vectors), atol=1e-6)
    assert not unit_rows(np.zeros((2, 3))).any()


def test_small_clusters_join_the_nearest():
    angles = np.array([0.0] * 10 + [0.3] * 2 + [2.0] * 10)
    units = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labels = np.repeat([0, 1, 2], [10, 2, 10])
    assert merge_small(units, labels, 3).tolist() == [0] * 12 + [2] * 10
    assert merge_small(units, labels, 2).tolist() == labels.tolist()
    assert len(set(merge_small(units, labels, 1000))) == 1


def test_the_knee_is_where_the_curve_bends():
    assert knee({1: 100, 2: 60, 3: 20, 4: 19, 5: 18, 6: 17}) == 3
    assert knee({1: 5.0, 2: 5.0, 3: 5.0}) == 1
    assert knee({1: 5.0}) == 1


def test_identical_rows_and_more_clusters_than_rows_do_no_harm():
    units = unit_rows(np.ones((4, 3)))
    assert cluster(units, 3, 0, 1).labels.tolist() == [0] * 4
    assert len(cluster(unit_rows(np.eye(3)), 9, 0, 1).centres) == 3


def test_a_selection_meets_the_budget_and_says_why(tmp_path):
    vectors, skills = planted([300, 200, 20])
    rng = np.random.default_rng(1)
    wide, flat = rng.uniform(size=520), rng.lognormal(sigma=2, size=520)
    store = store_of(tmp_path, vectors, nll=flat, el2n=wide)
    picked = AdaptInf().select(store, budget=120, seed=3)
    assert isinstance(picked, Selection) and len(picked) == 120 and picked.pool_size == 520
    told = picked.details["clusters"]
    assert sorted(entry["share"] for entry in told) == [20, 50, 50]
    assert {entry["selector"] for entry in told} == {"el2n"}, "a uniform score has the higher entropy"
    for row, reason in zip(picked.indices, picked.reasons, strict=True):
        assert set(reason) == {"cluster", "selector", "score", "bin"}
        assert reason["score"] == store.scores[reason["selector"]][row]
    clusters = [reason["cluster"] for reason in picked.reasons]
    assert len(set(zip(clusters, skills[picked.indices], strict=True))) == 3
    assert len(picked.control) == 120 and picked.control.method == "random"
    assert AdaptInf().select(store, budget=120, seed=3) == picked
    assert AdaptInf().select(store, budget=120, seed=4) != picked
    picked.save(tmp_path / "picked")
    assert Selection.load(tmp_path / "picked") == picked


def test_each_cluster_has_its_own_selector_whatever_the_unit(tmp_path):
    vectors, skills = planted([200, 200])
    rng = np.random.default_rng(1)
    even, peaked = rng.uniform(size=400), rng.lognormal(sigma=2, size=400)
    first = np.where(skills == 0, even, peaked)
    second = np.where(skills == 0, peaked, even)
    for number, unit in enumerate((1.0, 1e-6)):
        store = store_of(tmp_path / str(number), vectors, nll=first, el2n=unit * second)
        picked = AdaptInf(clusters=2).select(store, budget=100)
        chosen = {(skills[row], reason["selector"]) for row, reason in zip(picked.indices, picked.reasons, strict=True)}
        assert chosen == {(0, "nll"), (1, "el2n")}


def test_a_rare_skill_is_found_more_often_than_by_a_random_draw(tmp_path):
    vectors, skills = planted([990, 600, 400, 20], dim=32, noise=0.4)
    store = store_of(tmp_path, vectors)
    picked = AdaptInf().select(store, budget=200)
    rare, control = (skills[found.indices] == 3 for found in (picked, picked.control))
    assert rare.sum() == 20 > 5 > control.sum()


@pytest.mark.parametrize("shares", ["equal", "spread", "density"])
@pytest.mark.parametrize("selector", ["entropy", "mixed", "random", "el2n"])
def test_every_option_meets_the_budget(shares, selector, tmp_path):
    vectors, _ = planted([150, 80, 30])
    rng = np.random.default_rng(2)
    store = store_of(tmp_path, vectors, nll=rng.normal(size=260), el2n=rng.uniform(size=260))
    for budget in (1, 100, 260):
        picked = AdaptInf(selector=selector, shares=shares, clusters=3).select(store, budget=budget)
        assert len(picked) == budget
        assert {reason["selector"] for reason in picked.reasons} <= (
            {selector} if selector != "entropy" else {"nll", "el2n"}
        )


def test_spread_gives_more_to_the_cluster_whose_el2n_varies(tmp_path):
    vectors, skills = planted([200, 200])
    el2n = np.random.default_rng(0).normal(size=400) * np.where(skills == 1, 3.0, 1.0)
    store = store_of(tmp_path, vectors, el2n=el2n)
    picked = AdaptInf(clusters=2, shares="spread").select(store, budget=100)
    assert (skills[picked.indices] == 1).sum() == pytest.approx(75, abs=3)


def test_density_weighs_a_cluster_by_its_distance_to_the_next_times_the_distances_within(tmp_path):
    rng = np.random.default_rng(0)
    angles = np.concatenate([rng.normal(0.0, 0.05, 200), rng.normal(0.6, 0.15, 200), rng.normal(2.5, 0.1, 200)])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    picked = AdaptInf(clusters=3, shares="density").select(store_of(tmp_path, vectors), budget=90)
    labels = cluster(unit_rows(vectors), 3, 0, 3).labels
    centres = [vectors[labels == i].sum(0) / np.linalg.norm(vectors[labels == i].sum(0)) for i in range(3)]
    weights = []
    for i in range(3):
        between = min(1 - centres[i] @ centres[j] for j in range(3) if j != i)
        weights.append(between * np.mean([1 - v @ centres[i] for v in vectors[labels == i]]))
    expected = 90 * np.array(weights) / sum(weights)
    shares = [one["share"] for one in picked.details["clusters"]]
    assert shares == pytest.approx(expected, abs=1) and max(shares) > 2 * min(shares)


def test_rows_without_answer_are_never_picked(tmp_path):
    vectors, _ = planted([50, 50])
    nll = np.random.default_rng(0).normal(size=100)
    vectors[7], nll[7] = 0, np.nan
    store = store_of(tmp_path, vectors, nll=nll)
    assert 7 not in AdaptInf().select(store, budget=99).indices
    assert AdaptInf().select(store, budget=99).details["left_out"] == {"no_answer": 1}
    assert 7 not in AdaptInf().prune(store, keep=1000).indices
    with pytest.raises(DataSelectionError, match="budget=100: must be an integer from 1 to 99"):
        AdaptInf().select(store, budget=100)


def test_rows_whose_score_is_not_finite_are_left_out_and_counted_apart(tmp_path):
    vectors, _ = planted([50, 50])
    ppl = np.random.default_rng(0).lognormal(size=100)
    vectors[7], ppl[7], ppl[3], ppl[4] = 0, np.nan, np.inf, np.nan
    store = store_of(tmp_path, vectors, ppl=ppl)
    picked = AdaptInf().select(store, budget=97)
    assert not {3, 4, 7} & set(picked.indices.tolist()) and len(picked) == 97
    assert picked.details["left_out"] == {"no_answer": 1, "not_finite": 2}
    with pytest.raises(DataSelectionError, match="from 1 to 97; the store has 97 rows with an answer and finite"):
        AdaptInf().select(store, budget=98)


def test_constant_scores_and_copies_alone_are_picked_from(tmp_path):
    store = store_of(tmp_path, np.ones((30, 8), np.float32), nll=np.full(30, 2.0), el2n=np.zeros(30))
    for options in ({}, {"selector": "mixed"}, {"shares": "spread"}, {"shares": "density"}, {"legacy": True}):
        picked = AdaptInf(**options).select(store, budget=7)
        assert len(picked) == 7 and len(set(picked.indices.tolist())) == 7, options
    assert len(AdaptInf().prune(store, keep=1)) == 1


def test_one_score_may_be_given_by_its_name_alone(tmp_path):
    store = store_of(tmp_path, planted([30, 20])[0], nll=np.arange(50.0), el2n=np.arange(50.0) ** 2)
    assert AdaptInf(scores="el2n").select(store, budget=9) == AdaptInf(scores=["el2n"]).select(store, budget=9)


def with_copies(seed=0):
    vectors, _ = planted([60, 40], noise=0.5)
    copies = vectors[:20] * 2.0  # the same directions
    everything = np.concatenate([vectors, copies])
    order = np.random.default_rng(seed).permutation(len(everything))
    return everything[order], np.concatenate([np.arange(100), np.arange(20)])[order]


def test_pruning_drops_the_planted_copies(tmp_path):
    vectors, content = with_copies()
    store = store_of(tmp_path, vectors)
    kept = AdaptInf(clusters=1).prune(store, keep=100)
    assert sorted(content[kept.indices]) == list(range(100))
    assert max(reason["cosine"] for reason in kept.reasons) < 0.9999
    for row, reason in zip(kept.indices, kept.reasons, strict=True):
        twins = np.flatnonzero(content == content[row])
        assert row == twins[0], "of copies the first in the store stays"
        assert reason["cluster"] == 0


def test_what_stays_does_not_depend_on_the_order_of_the_pool(tmp_path):
    kept = []
    for seed in range(3):
        vectors, content = with_copies(seed)
        store = store_of(tmp_path / str(seed), vectors)
        kept.append(sorted(content[AdaptInf(clusters=2, min_cluster=1).prune(store, keep=70).indices]))
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) == 70


def test_published_pruning_depends_on_the_order(tmp_path):
    kept = []
    for seed in range(2):
        vectors, content = with_copies(seed)
        store = store_of(tmp_path / str(seed), vectors)
        kept.append(sorted(content[AdaptInf(clusters=1, legacy=True).prune(store, keep=70).indices]))
    assert kept[0] != kept[1]


def test_a_cap_above_the_pool_keeps_everything(tmp_path):
    vectors, _ = planted([60, 40])
    kept = AdaptInf().prune(store_of(tmp_path, vectors), keep=1000)
    assert kept.indices.tolist() == list(range(100)) and kept.method == "adapt_inf_prune"


def test_legacy_takes_the_score_of_the_smaller_unit(tmp_path):
    vectors, _ = planted([500, 300])
    rng = np.random.default_rng(1)
    nll, el2n = rng.normal(size=800) * 10, rng.uniform(size=800) * 0.1
    store = store_of(tmp_path, vectors, nll=nll, el2n=el2n)
    legacy = AdaptInf(clusters=2, legacy=True).select(store, budget=101)
    assert {reason["selector"] for reason in legacy.reasons} == {"el2n"}
    assert len(legacy) == 102, "shares are rounded up"
    assert legacy.details["legacy"]
    assert legacy == AdaptInf(clusters=2, legacy=True).select(store, budget=101)
    ours = AdaptInf(clusters=2).select(store, budget=101)
    assert {reason["selector"] for reason in ours.reasons} == {"nll"} and len(ours) == 101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters=0"),
        ({"clusters": "knee"}, "clusters='knee'"),
        ({"shares": "fair"}, "shares='fair': must be one of equal, spread, density"),
        ({"bins": 1}, "bins=1"),
        ({"trim": 0.5}, "trim=0.5"),
        ({"min_cluster": 0}, "min_cluster=0"),
        ({"trim": "5 %"}, "trim='5 %'"),
        ({"legacy": True, "selector": "nll"}, "legacy=True"),
        ({"legacy": True, "trim": 0.2, "min_cluster": 3}, "legacy=True .* trim=0.2, min_cluster=3"),
        ({"selector": "perplexity"}, "'perplexity'.*has the scores"),
        ({"scores": ["grand"]}, "'grand'.*has the scores"),
        ({"shares": "spread"}, "'el2n', which the store lacks"),
    ],
)
def test_bad_values_are_named(options, message, tmp_path):
    store = store_of(tmp_path, planted([10, 10])[0])
    with pytest.raises(DataSelectionError, match=message):
        AdaptInf(**options).select(store, budget=5)
