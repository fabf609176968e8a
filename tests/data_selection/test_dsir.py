"""Dsir against a twin in plain Python, and what it must do on a mixed pool."""

import json
import math
import random
import subprocess
import sys

import datasets
import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir, Selection
from krontune.data_selection.importance import fold, kl_reduction, log_ratios
from krontune.data_selection.ngrams import BATCH_BYTES, hash_ngrams
from krontune.data_selection.selection import gumbel_noise

COMMON = [f"common{i}" for i in range(200)]
TOPICS = [[f"topic{t}word{i}" for i in range(400)] for t in range(5)]


def zipf_words(rng, words, n):
    return rng.choices(words, [1 / (i + 1) for i in range(len(words))], k=n)


def topic_text(rng, topic):
    n = rng.randrange(10, 80)
    words = [*zipf_words(rng, COMMON, 2 * n // 3), *zipf_words(rng, TOPICS[topic], n // 3)]
    rng.shuffle(words)
    return " ".join(words) + "."


def mixed_pool(n, seed=0):
    """n texts, of which each tenth is of topic 0, and whether each one is."""
    rng = random.Random(seed)
    topics = [0 if rng.random() < 0.1 else rng.randrange(1, 5) for _ in range(n)]
    return [topic_text(rng, topic) for topic in topics], np.array(topics) == 0


def topic_target(n, seed=1):
    rng = random.Random(seed)
    return [topic_text(rng, 0) for _ in range(n)]


def naive_log_weights(texts, target, raw, *, ngrams, buckets, smoothing, normalize):
    def buckets_of(text):
        return hash_ngrams([text], ngrams, buckets).buckets.tolist()

    def counts_of(texts):
        counts = dict.fromkeys(range(buckets), 0.0)
        for text in texts:
            for bucket in buckets_of(text):
                counts[bucket] += 1
        return counts

    target_counts, raw_counts = counts_of(target), counts_of(raw)
    for bucket, count in target_counts.items():
        if count and not raw_counts[bucket]:
            raw_counts[bucket] = 0.5
    target_total, raw_total = sum(target_counts.values()), sum(raw_counts.values())
    weights = []
    for text in texts:
        found, total = buckets_of(text), 0.0
        for bucket in found:
            p, q = target_counts[bucket] / target_total, raw_counts[bucket] / raw_total
            if q:
                total += math.log(((1 - smoothing) * p + smoothing * q) / q)
        divisor = {"sum": 1, "mean": len(found), "sqrt": math.sqrt(len(found))}[normalize]
        weights.append(total / divisor if found else -math.inf)
    return weights


@pytest.mark.parametrize("normalize", ["mean", "sum", "sqrt"])
@pytest.mark.parametrize(("ngrams", "buckets", "smoothing"), [(1, 13, 0.5), (2, 1009, 0.1), (3, 5000, 0.9)])
def test_log_weights_equal_those_of_the_twin(normalize, ngrams, buckets, smoothing):
    target, (raw, _) = topic_target(7), mixed_pool(33)
    others = ["", " \n", "never seen before!", *topic_target(3, seed=5), *mixed_pool(5, seed=6)[0]]
    settings = dict(ngrams=ngrams, buckets=buckets, smoothing=smoothing, normalize=normalize)
    dsir = Dsir(**settings).fit(target=target, raw=raw)
    expected = naive_log_weights([*raw, *others], target, raw, **settings)
    weights = dsir.log_weights([*raw, *others])
    assert weights.dtype == np.float64
    assert weights == pytest.approx(expected, abs=1e-10)


def test_buckets_that_neither_side_has_seen_add_nothing():
    ratios = log_ratios(np.array([0, 3, 1, 0]), np.array([0, 3, 0, 2]), 0.5)
    assert ratios[0] == 0
    assert np.isfinite(ratios).all()
    assert ratios[2] > 0 > ratios[3]
    assert ratios[3] == pytest.approx(math.log(0.5))


def test_words_of_the_target_alone_give_finite_high_weights():
    dsir = Dsir().fit(target=["zebra quagga"], raw=["horse donkey"])
    zebra, horse, neither = dsir.log_weights(["zebra quagga", "horse donkey", "tapir okapi"])
    assert math.isfinite(zebra) and zebra > neither == 0 > horse


def test_a_text_weighs_the_same_in_any_company():
    raw, _ = mixed_pool(2000)
    dsir = Dsir().fit(target=topic_target(50), raw=raw)
    together = dsir.log_weights(raw)
    assert len(raw) == len(together) == 2000 and sum(map(len, raw)) > 3 * BATCH_BYTES
    for i in (0, 1, 700, 1999):
        assert dsir.log_weights([raw[i]])[0] == together[i]
    assert np.array_equal(dsir.log_weights(raw[::-1])[::-1], together)


def test_mean_weights_do_not_grow_with_repetition_and_sums_do():
    text = topic_target(1, seed=3)[0]
    for normalize, factor in (("mean", 1), ("sqrt", math.sqrt(3)), ("sum", 3)):
        dsir = Dsir(ngrams=1, normalize=normalize).fit(target=topic_target(20), raw=mixed_pool(100)[0])
        once, thrice = dsir.log_weights([text, " ".join([text] * 3)])
        assert thrice == pytest.approx(factor * once)


def test_empty_texts_weigh_minus_infinity_and_come_last():
    raw = ["", "far away words", "...", " ", "near target words"]
    dsir = Dsir().fit(target=["near target"], raw=raw)
    weights = dsir.log_weights(raw)
    assert np.isneginf(weights).tolist() == [True, False, False, True, False]
    for method in ("gumbel", "topk"):
        for seed in range(20):
            assert dsir.select(raw, k=3, method=method, seed=seed).indices.tolist() == [1, 2, 4]
        assert dsir.select(raw, k=4, method=method).indices.tolist() == [0, 1, 2, 4]
        assert len(dsir.select(raw, k=5, method=method)) == 5


@pytest.mark.parametrize("normalize", ["mean", "sum", "sqrt"])
def test_fifty_target_texts_find_the_right_ones_in_a_mixed_pool(normalize):
    raw, right = mixed_pool(3000)
    dsir = Dsir(normalize=normalize).fit(target=topic_target(50), raw=raw)
    k = int(right.sum())
    for method in ("gumbel", "topk"):
        picked = dsir.select(raw, k=k, method=method)
        assert right[picked.indices].mean() > 0.9
        assert right[picked.control.indices].mean() < 0.2


def test_topk_takes_the_highest_weights_and_ties_go_to_the_earlier():
    raw = ["b", "target text", "b", "target text", "b"]
    dsir = Dsir().fit(target=["target text"], raw=raw)
    assert dsir.select(raw, k=3, method="topk", exclude_copies=False).indices.tolist() == [0, 1, 3]


@pytest.mark.parametrize("normalize", ["mean", "sum", "sqrt"])
def test_gumbel_selection_equals_the_formula(normalize):
    raw, _ = mixed_pool(500)
    dsir = Dsir(normalize=normalize).fit(target=topic_target(50), raw=raw)
    length = hash_ngrams(raw, 2, 2**17).counts.mean()
    scale = {"mean": length, "sum": 1.0, "sqrt": math.sqrt(length)}[normalize]
    weights = dsir.log_weights(raw)
    for seed, temperature in ((0, 1.0), (1, 30.0)):
        scores = scale * weights / temperature + gumbel_noise(seed, 500)
        expected = sorted(np.argsort(-scores)[:60].tolist())
        picked = dsir.select(raw, k=60, temperature=temperature, seed=seed)
        assert picked.indices.tolist() == expected


def test_gumbel_draws_in_proportion_to_the_weights():
    raw = ["red", "red green", "blue blue"]
    dsir = Dsir(ngrams=1, normalize="sum").fit(target=["red red red green"], raw=raw)
    odds = np.exp(dsir.log_weights(raw) / 2)
    draws = [dsir.select(raw, k=1, temperature=2, seed=seed).indices[0] for seed in range(1000)]
    shares = np.bincount(draws, minlength=3) / 1000
    assert shares == pytest.approx(odds / odds.sum(), abs=0.05)


def test_temperature_leads_from_top_k_to_uniform():
    raw, right = mixed_pool(3000)
    dsir = Dsir().fit(target=topic_target(50), raw=raw)
    top = dsir.select(raw, k=300, method="topk").indices

    def agreement(temperature):
        return len(np.intersect1d(dsir.select(raw, k=300, temperature=temperature).indices, top)) / 300

    agreements = [agreement(temperature) for temperature in (1e-9, 1, 10, 1e9)]
    assert agreements[0] == 1
    assert agreements == sorted(agreements, reverse=True)
    assert agreements[1] > 0.85 and agreements[3] < 0.2


def test_the_seed_decides_and_nothing_else():
    raw, _ = mixed_pool(500)
    dsir = Dsir().fit(target=topic_target(50), raw=raw)
    picked = dsir.select(raw, k=50, temperature=20, seed=7)
    assert picked == dsir.select(iter(raw), k=50, temperature=20, seed=7)
    assert picked == dsir.select(datasets.Dataset.from_dict({"text": raw}), k=50, temperature=20, seed=7)
    other = dsir.select(raw, k=50, temperature=20, seed=8)
    assert len(np.intersect1d(picked.indices, other.indices)) < 45


def test_small_batches_select_the_same(monkeypatch):
    raw, _ = mixed_pool(300)
    dsir = Dsir().fit(target=topic_target(50), raw=raw)
    picked = dsir.select(raw, k=50, temperature=20)
    monkeypatch.setattr("krontune.data_selection.shards.ROWS_PER_READ", 7)
    again = Dsir().fit(target=topic_target(50), raw=raw).select(raw, k=50, temperature=20)
    assert picked == again


def test_reasons_hold_the_weight_and_the_target(tmp_path):
    raw, _ = mixed_pool(100)
    (tmp_path / "wanted.txt").write_text("\n".join(topic_target(20)))
    dsir = Dsir().fit(target=tmp_path / "wanted.txt", raw=raw)
    picked = dsir.select(raw, k=10)
    weights = dsir.log_weights(raw)
    expected = [{"log_weight": weights[i], "target": "wanted.txt"} for i in picked.indices]
    assert list(picked.reasons) == expected
    assert picked.pool_size == 100 and picked.method == "gumbel" and picked.seed == 0
    assert picked.summary()["log_weight"]["min"] == weights[picked.indices].min()


def test_kl_reduction_is_positive_for_a_selection_and_about_zero_for_the_control():
    raw, right = mixed_pool(5000)
    dsir = Dsir().fit(target=topic_target(500), raw=raw)
    picked = dsir.select(raw, k=int(right.sum()))
    gained, by_chance = dsir.kl_reduction(picked), dsir.kl_reduction(picked.control)
    assert gained > 0.15
    assert abs(by_chance) < 0.02
    assert dsir.kl_reduction(raw) == pytest.approx(0, abs=1e-3)


def test_kl_reduction_of_a_selection_is_that_of_its_texts(tmp_path):
    raw, _ = mixed_pool(300)
    (tmp_path / "pool.txt").write_text("\n".join(raw))
    dataset = datasets.Dataset.from_dict({"text": raw})
    dsir = Dsir().fit(target=topic_target(50), raw=raw)
    expected = dsir.kl_reduction([raw[i] for i in dsir.select(raw, k=30).indices])
    for pool in (raw, dataset, tmp_path / "pool.txt"):
        picked = dsir.select(pool, k=30)
        assert dsir.kl_reduction(picked) == expected
    assert dsir.kl_reduction(picked.apply(dataset)) == expected


def test_kl_reduction_equals_the_difference_of_two_divergences():
    rng = np.random.default_rng(0)
    target, raw, picked = rng.integers(1, 50, (3, 40))
    q = raw / raw.sum()
    p, mixed = target / target.sum(), (picked + 400 * q) / (picked.sum() + 400)

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    assert kl_reduction(target, raw, picked) == pytest.approx(kl(p, q) - kl(p, mixed))


@pytest.mark.parametrize(("size", "groups"), [(7, 3), (10, 10), (5, 8), (1000, 7), (2**17, 10_000)])
def test_folding_equals_the_twin(size, groups):
    counts = np.random.default_rng(size).integers(0, 9, size)
    naive = [0] * min(size, groups)
    for bucket, count in enumerate(counts.tolist()):
        naive[bucket * groups // size if groups < size else bucket] += count
    assert fold(counts, groups).tolist() == naive


def test_kl_reduction_without_a_pool_asks_for_the_texts(tmp_path):
    raw, _ = mixed_pool(50)
    dsir = Dsir().fit(target=topic_target(5), raw=raw)
    dsir.select(raw, k=5).save(tmp_path)
    for picked in (Selection.load(tmp_path), dsir.select(iter(raw), k=5)):
        with pytest.raises(DataSelectionError, match=r"pass the texts.*apply\(dataset\)"):
            dsir.kl_reduction(picked)


def test_kl_reduction_notices_a_pool_that_changed():
    raw, _ = mixed_pool(50)
    dsir = Dsir().fit(target=topic_target(5), raw=raw)
    picked = dsir.select(raw, k=5)
    raw.append("one more")
    with pytest.raises(DataSelectionError, match="had 50 texts and has 51 now"):
        dsir.kl_reduction(picked)


def test_save_and_load_give_the_same_weights(tmp_path):
    raw, _ = mixed_pool(200)
    settings = dict(ngrams=3, buckets=5000, smoothing=0.3, normalize="sqrt")
    dsir = Dsir(**settings).fit(target=topic_target(20), raw=raw)
    dsir.save(tmp_path / "new" / "folder")
    loaded = Dsir.load(tmp_path / "new" / "folder")
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert np.array_equal(loaded.log_weights(raw), dsir.log_weights(raw))
    assert loaded.select(raw, k=20, seed=3) == dsir.select(raw, k=20, seed=3)
    assert loaded.kl_reduction(raw[:9]) == dsir.kl_reduction(raw[:9])
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "counts.npz",
        "dsir.json",
    ]


def test_loading_what_was_not_saved_is_refused(tmp_path):
    with pytest.raises(DataSelectionError, match="cannot read"):
        Dsir.load(tmp_path)
    dsir = Dsir(buckets=10).fit(target=["a"], raw=["b"])
    dsir.save(tmp_path)
    header = json.loads((tmp_path / "dsir.json").read_text())
    (tmp_path / "dsir.json").write_text(json.dumps(header | {"counts_crc32": 1}))
    with pytest.raises(DataSelectionError, match="does not belong"):
        Dsir.load(tmp_path)
    (tmp_path / "dsir.json").write_text(json.dumps(header | {"format": "other"}))
    with pytest.raises(DataSelectionError, match="other"):
        Dsir.load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"ngrams": 0},
        {"ngrams": 2.5},
        {"ngrams": True},
        {"buckets": 1},
        {"buckets": 2**40},
        {"buckets": "many"},
        {"smoothing": 0},
        {"smoothing": 1},
        {"smoothing": -0.1},
        {"smoothing": float("nan")},
        {"smoothing": "half"},
        {"normalize": "median"},
    ],
)
def test_a_setting_out_of_range_is_named(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(DataSelectionError, match=f"{name}={value!r}"):
        Dsir(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0: must be an integer from 1 to 20; the pool has 20 texts"),
        ({"k": 0.0}, "k=0.0"),
        ({"k": None}, "give one of the two"),
        ({"k": 5, "tokens": 5}, "give one of the two"),
        ({"k": None, "tokens": 0}, "tokens=0"),
        ({"k": 5, "min_tokens": -1}, "min_tokens=-1"),
        ({"k": 5, "max_tokens": 0}, "max_tokens=0"),
        ({"k": 5, "num_proc": 0}, "num_proc=0"),
        ({"k": 5, "proportions": {"other": 1}}, "one for each of target"),
        ({"k": 5, "source_caps": {"web": 1}}, "no row has the source"),
        ({"k": 21}, "k=21: must be an integer from 1 to 20"),
        ({"k": -3}, "k=-3"),
        ({"k": 1.5}, "k=1.5"),
        ({"k": "all"}, "k='all'"),
        ({"k": 5, "method": "best"}, "method='best'"),
        ({"k": 5, "temperature": 0}, "temperature=0"),
        ({"k": 5, "temperature": float("inf")}, "temperature=inf"),
        ({"k": 5, "temperature": float("nan")}, "temperature=nan"),
        ({"k": 5, "seed": -1}, "seed=-1"),
        ({"k": 5, "seed": 1.5}, "seed=1.5"),
        ({"k": 5, "raw": []}, "pool is empty"),
    ],
)
def test_an_argument_of_select_out_of_range_is_named(arguments, message):
    raw, _ = mixed_pool(20)
    dsir = Dsir().fit(target=topic_target(5), raw=raw)
    with pytest.raises(DataSelectionError, match=message):
        dsir.select(**{"raw": raw, **arguments})


@pytest.mark.parametrize("name", ["target", "raw"])
@pytest.mark.parametrize(("texts", "message"), [([], "is empty"), (["", " "], "none of its 2 texts has a word")])
def test_a_side_without_words_is_named(name, texts, message):
    sides = {"target": ["a"], "raw": ["b"], name: texts}
    with pytest.raises(DataSelectionError, match=f"{name}.*{message}"):
        Dsir().fit(**sides)


def test_an_empty_file_is_an_empty_side(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataSelectionError, match="target is empty"):
        Dsir().fit(target=tmp_path / "a.jsonl", raw=["b"])


def test_an_unfitted_dsir_says_so(tmp_path):
    dsir = Dsir()
    for act in (
        lambda: dsir.log_weights(["a"]),
        lambda: dsir.select(["a"], k=1),
        lambda: dsir.kl_reduction(["a"]),
        lambda: dsir.save(tmp_path),
    ):
        with pytest.raises(DataSelectionError, match="call fit"):
            act()


def test_importing_the_room_imports_nothing_heavy():
    code = (
        "import sys, krontune.data_selection as room; print(*room.__all__); "
        "heavy = {'numpy', 'torch', 'datasets', 'pyarrow'} & set(sys.modules); assert not heavy, heavy; "
        "room.Dsir; heavy = {'torch', 'datasets', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
