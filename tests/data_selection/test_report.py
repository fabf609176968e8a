"""The report's figures against plain recomputation, and the page: whole, escaped, alone."""

import json
import math
import random
import re
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir, Selection
from krontune.data_selection.importance import PRIOR_NGRAMS, kl_reduction, raw_distribution
from krontune.data_selection.ngrams import hash_ngrams
from krontune.data_selection.report import (
    bucket_names,
    effective_size,
    kl_bound,
    selection_report,
    text_ngrams,
    write_report,
)

COMMON = [f"common{i}" for i in range(100)]
TOPICS = {name: [f"{name}{i}" for i in range(150)] for name in ("sea", "sky", "soil")}
EVIL = "<script>alert('x')</script> & \"quoted\" </pre></svg>"


def text_of(rng, topic):
    words = rng.choices(COMMON, k=rng.randrange(5, 30)) + rng.choices(TOPICS[topic], k=rng.randrange(4, 15))
    rng.shuffle(words)
    return " ".join(words)


def rows_of(n, seed=0):
    rng = random.Random(seed)
    topics = [rng.choice(list(TOPICS)) for _ in range(n)]
    return [{"text": text_of(rng, topic), "source": topic} for topic in topics]


@pytest.fixture(scope="module")
def made():
    rng = random.Random(1)
    target = [text_of(rng, "sea") for _ in range(60)]
    pool = [*rows_of(400), {"text": "", "source": EVIL}]
    dsir = Dsir().fit(target=target, raw=pool)
    picked = dsir.select(pool, k=80)
    right = [row for row, item in enumerate(pool) if item["source"] == "sea"]
    oracle = Selection(np.array(right), [{} for _ in right], len(pool), 0, "right")
    return target, pool, dsir, picked, selection_report(dsir, picked, target=target, oracle=oracle)


def test_kl_reductions_are_those_of_dsir_and_stand_between_random_and_bound(made):
    _, pool, dsir, picked, report = made
    found = report["targets"][0]["kl_reduction"]
    assert found["picked"] == pytest.approx(dsir.kl_reduction(picked))
    right = [row["text"] for row in pool if row["source"] == "sea"]
    assert found["oracle"] == pytest.approx(dsir.kl_reduction(right))
    control = dsir.kl_reduction(picked.control)
    assert found["random_lowest"] <= control <= found["random_highest"]
    assert found["random_lowest"] < found["random"] < found["random_highest"] < found["picked"] < found["bound"]


def test_the_bound_is_the_best_that_moving_counts_about_can_reach():
    rng = np.random.default_rng(0)
    for total in (20, 2000):
        target, raw = rng.integers(0, 9, 12), rng.integers(0, 30, 12)
        target[3], raw[4], target[5] = 0, 0, 40
        bound = kl_bound(target, raw, total)
        # Climb: move mass between two buckets as long as it helps, by ever smaller amounts.
        counts = np.full(12, total / 12)
        value = kl_reduction(target, raw, counts)
        for step in (total / 24, total / 200, total / 2000, total / 20000):
            better = True
            while better:
                better = False
                for a in range(12):
                    for b in range(12):
                        if a != b and counts[a] >= step:
                            counts[a] -= step
                            counts[b] += step
                            if kl_reduction(target, raw, counts) > value + 1e-12:
                                value, better = kl_reduction(target, raw, counts), True
                            else:
                                counts[a] += step
                                counts[b] -= step
        assert value <= bound + 1e-9
        assert bound == pytest.approx(value, abs=1e-3 * abs(bound) + 1e-6)


def test_the_bound_of_a_huge_pick_is_the_whole_divergence():
    target, raw = np.array([5, 3, 2, 0]), np.array([1, 5, 3, 9])
    p, q = target / target.sum(), raw_distribution(target, raw)
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    assert kl_bound(target, raw, 10**9) == pytest.approx(whole, rel=1e-6)
    assert kl_bound(target, raw, 1) < 0.2 * whole
    assert PRIOR_NGRAMS > 1


def test_effective_size_is_the_number_of_equal_weights():
    assert effective_size(np.zeros(7)) == pytest.approx(7)
    assert effective_size(np.array([-1e4, -1e4, 0.0])) == pytest.approx(1)
    assert effective_size(np.log([3.0, 1.0])) == pytest.approx(16 / 10)


def test_effective_size_of_the_pool_uses_document_nats_and_grows_with_temperature(made):
    _, pool, dsir, _, report = made
    weights = dsir.log_weights(pool)
    scaled = weights[np.isfinite(weights)] * dsir.noise_scale
    sizes = report["targets"][0]["effective_size"]
    assert sizes["10"] == pytest.approx(effective_size(scaled / 10))
    assert sizes["1"] < sizes["10"] < sizes["100"] <= 400
    assert report["targets"][0]["without_ngrams"] == 1


def test_histograms_hold_every_row_once(made):
    histogram = made[4]["targets"][0]["histogram"]
    assert sum(histogram["pool"]) == pytest.approx(1)
    assert sum(histogram["picked"]) == pytest.approx(1)
    assert len(histogram["edges"]) == len(histogram["pool"]) + 1
    middles = (np.array(histogram["edges"])[1:] + np.array(histogram["edges"])[:-1]) / 2
    assert np.dot(middles, histogram["picked"]) > np.dot(middles, histogram["pool"])


def test_lengths_and_sources_are_counted_from_the_rows(made):
    target, pool, _, picked, report = made
    lengths = [len(pool[row]["text"].split()) for row in picked.indices]
    assert report["lengths"]["picked"]["mean"] == pytest.approx(np.mean(lengths))
    assert report["lengths"]["target"]["p50"] == pytest.approx(np.median([len(text.split()) for text in target]))
    by_name = {part["source"]: part for part in report["sources"]}
    assert by_name["sea"]["picked"] == sum(pool[row]["source"] == "sea" for row in picked.indices)
    assert by_name["sky"]["pool"] == sum(row["source"] == "sky" for row in pool)
    assert by_name["sea"]["share_picked"] > 0.9


def test_many_sources_are_added_up():
    rows = [{"text": f"word{i} and more", "source": f"s{i}"} for i in range(50)]
    dsir = Dsir().fit(target=["word3 and"], raw=rows)
    sources = selection_report(dsir, dsir.select(rows, k=5))["sources"]
    assert sources[-1]["source"] == "30 others"
    assert sum(part["pool"] for part in sources) == 50
    assert sum(part["picked"] for part in sources) == 5


def test_the_ngrams_that_weighed_most_are_those_of_the_topic(made):
    ngrams = made[4]["targets"][0]["ngrams"]
    upwards, downwards = ([ngram["ngram"] for ngram in ngrams[side]] for side in ("for", "against"))
    assert sum(name.startswith("sea") for name in upwards) >= 8
    assert not any(re.search("sky|soil", name) for name in upwards)
    assert not any("sea" in name for name in downwards)
    assert all(ngram["log_ratio"] > 0 for ngram in ngrams["for"])
    assert all(ngram["log_ratio"] < 0 for ngram in ngrams["against"])


@pytest.mark.parametrize("settings", [{}, {"ngrams": 3, "buckets": 1000}, {"compat": "dsir-1.0.3"}])
def test_named_ngrams_fall_into_their_buckets(settings):
    dsir = Dsir(**settings)
    text = "The  cat's naïve_2 plan: 3.5% ...\n\u2003 über-ALLES \ud800 x\x00y"
    buckets, ngrams = text_ngrams(text, dsir)
    assert len(buckets) == len(ngrams) > 20
    assert "cat ' s"[:5] in ngrams
    if settings.get("compat") is None:
        for bucket, ngram in zip(buckets, ngrams, strict=True):
            if "\ufffd" not in ngram:  # the lone surrogate, which has no place in a page
                longest = len(ngram.split(" "))
                assert hash_ngrams([ngram], longest, dsir.buckets).buckets[-1] == bucket
    names = bucket_names(["a b", "a b", "c"], Dsir(buckets=2, ngrams=1))
    assert sum(1 + others for _, others in names.values()) == 3


def test_overlaps_are_shares_of_the_size(made):
    _, pool, dsir, picked, report = made
    shares = {(o["of"], o["with"]): o["share"] for o in report["overlap"]}
    best = dsir.select(pool, k=80, method="topk")
    expected = len(np.intersect1d(best.indices, picked.indices)) / 80
    assert shares["this selection", "top-k"] == pytest.approx(expected)
    control = len(np.intersect1d(picked.control.indices, picked.indices)) / 80
    assert shares["this selection", "random"] == pytest.approx(control)
    hot = dsir.select(pool, k=80, temperature=100.0)
    expected = len(np.intersect1d(best.indices, hot.indices)) / 80
    assert shares["top-k", "Gumbel, temperature 100"] == pytest.approx(expected)


def test_examples_are_chosen_and_refused_rows_with_their_texts(made):
    _, pool, _, picked, report = made
    chosen, refused = report["chosen"], report["refused"]
    assert len(chosen) == len(refused) == 20
    assert len({example["row"] for example in chosen + refused}) == 40
    assert {example["row"] for example in chosen} <= set(picked.indices.tolist())
    assert not {example["row"] for example in refused} & set(picked.indices.tolist())
    assert all(pool[example["row"]]["text"] == example["text"] for example in chosen + refused)
    weights = {row: reason["log_weight"] for row, reason in zip(picked.indices.tolist(), picked.reasons, strict=True)}
    assert chosen[0]["log_weight"] == pytest.approx(max(weights.values()))
    assert chosen[-1]["log_weight"] == pytest.approx(min(weights.values()))


class Checker(HTMLParser):
    """Tags that are not closed in order, tags seen, and outside addresses."""

    void = {"meta", "line", "rect", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.addresses, self.data = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


def test_the_page_is_whole_escaped_and_alone(tmp_path, made):
    _, pool, dsir, _, _ = made
    rows = [{"text": f"{EVIL} sea1 sea2 sea3 {row['text']}", "source": EVIL} for row in pool]
    own = Dsir().fit(target={EVIL: [EVIL + " sea1"]}, raw=rows)
    report = selection_report(own, own.select(rows, k=30), target={EVIL: [EVIL + " sea1"]})
    path = write_report(report, tmp_path)
    content = path.read_text()
    page = Checker()
    page.feed(content)
    assert page.open == []
    assert not page.seen & {"script", "img", "link", "iframe", "object"}
    assert not page.addresses
    assert "http" not in content and "url(" not in content and "@import" not in content
    assert {"svg", "table", "details"} <= page.seen
    assert EVIL in "".join(page.data)
    assert "NaN" not in content and "nan" not in re.sub(r"<pre>.*?</pre>", "", content, flags=re.DOTALL)
    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert saved == json.loads(json.dumps(report))


def test_several_targets_are_reported_each(tmp_path):
    rng = random.Random(3)
    targets = {name: [text_of(rng, name) for _ in range(30)] for name in ("sea", "sky")}
    pool = datasets.Dataset.from_list(rows_of(200, seed=4))
    dsir = Dsir().fit(target=targets, raw=pool)
    picked = dsir.select(pool, k=40)
    report = selection_report(dsir, picked, target=targets)
    assert [part["name"] for part in report["targets"]] == ["sea", "sky"]
    assert [part["picked"] for part in report["targets"]] == [20, 20]
    for part in report["targets"]:
        expected = dsir.kl_reduction(picked, target=part["name"])
        assert part["kl_reduction"]["picked"] == pytest.approx(expected)
    assert "Target: sky" in write_report(report, tmp_path).read_text()


def test_chunks_and_scores_in_a_folder_give_the_same_report(tmp_path):
    pool = rows_of(60, seed=5)
    dsir = Dsir(chunk_words=8).fit(target=[text_of(random.Random(6), "sea") for _ in range(20)], raw=pool)
    picked = dsir.select(pool, k=30)
    report = selection_report(dsir, picked)
    assert report["pool"] == picked.pool_size > 60
    assert all(len(example["text"].split()) <= 8 for example in report["chosen"])
    assert selection_report(dsir, picked, out_dir=tmp_path) == report


def test_a_pool_that_is_gone_or_has_changed_is_refused(made, tmp_path):
    _, pool, dsir, picked, _ = made
    picked.save(tmp_path)
    with pytest.raises(DataSelectionError, match="does not hold its pool"):
        selection_report(dsir, Selection.load(tmp_path))
    shorter = Selection(picked.indices[:5], picked.reasons[:5], 500, 0, "topk", pool)
    with pytest.raises(DataSelectionError, match="had 500 texts and has 401 now"):
        selection_report(dsir, shorter)
    with pytest.raises(DataSelectionError, match="oracle is of a pool of 3"):
        selection_report(dsir, picked, oracle=Selection(np.array([0]), [{}], 3, 0, "right"))
    with pytest.raises(DataSelectionError, match="empty"):
        selection_report(dsir, Selection(np.array([], np.int64), [], 401, 0, "topk", pool))


def test_a_selection_of_the_whole_pool_has_a_report(tmp_path):
    pool = rows_of(12, seed=7)
    dsir = Dsir().fit(target=["sea1 sea2"], raw=pool)
    report = selection_report(dsir, dsir.select(pool, k=12))
    assert report["refused"] == []
    assert write_report(report, tmp_path).exists()
