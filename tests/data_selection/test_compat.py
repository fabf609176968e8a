"""`Dsir(compat="dsir-1.0.3")` against the package's method, written down once more in plain Python."""

import math
import re
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir

TEXTS = [
    "Alice went to the rabbit-hole; Alice fell!",
    "Ünïcode — “curly”, 中文 ΑΣ",
    "ten 10 ten_10 10.5%",
    "",
    "wonder wonder wonder",
    "the the the rabbit",
]
TARGET = ["Alice and the rabbit", "a rabbit-hole, a wonder; “curly” 中文"]


def naive_bucket(ngram):
    return int(sha256(ngram.encode()).hexdigest(), 16) % 10_000


def naive_features(text, longest=2):
    tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
    grams = [" ".join(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)]
    return Counter(map(naive_bucket, grams))


def naive_weights(texts, target, raw):
    def distribution(texts):
        counts = sum(map(naive_features, texts), Counter())
        return {bucket: count / counts.total() for bucket, count in counts.items()}

    p, q = distribution(target), distribution(raw)
    log_ratio = {b: math.log(p.get(b, 0) + 1e-8) - math.log(q.get(b, 0) + 1e-8) for b in range(10_000)}
    return [math.fsum(count * log_ratio[b] for b, count in naive_features(text).items()) for text in texts]


def test_weights_equal_the_reference():
    dsir = Dsir(compat="dsir-1.0.3").fit(target=TARGET, raw=TEXTS)
    others = ["never seen, Alice", "rabbit"]
    expected = naive_weights([*TEXTS, *others], TARGET, TEXTS)
    weights = dsir.log_weights([*TEXTS, *others])
    assert np.isneginf(weights[3])  # the package gives a text without words 0, amid all others
    weights[3] = 0
    assert weights == pytest.approx(expected, abs=1e-9)


def test_the_buckets_are_the_published_ones():
    from krontune.data_selection.compat import text_buckets

    assert list(text_buckets(["alice", "went"], 2, 10_000)) == [6720, naive_bucket("went"), 114]


def test_settings_that_contradict_it_are_refused():
    assert Dsir(compat="dsir-1.0.3", buckets=10_000, normalize="sum").smoothing == 1e-8
    for setting in ({"buckets": 2**17}, {"normalize": "mean"}, {"smoothing_kind": "laplace"}):
        with pytest.raises(DataSelectionError, match="with compat: leave it out"):
            Dsir(compat="dsir-1.0.3", **setting)
    with pytest.raises(DataSelectionError, match="compat='dsir'"):
        Dsir(compat="dsir")  # type: ignore[arg-type]


def test_it_is_saved_and_selects(tmp_path):
    dsir = Dsir(compat="dsir-1.0.3").fit(target=TARGET, raw=TEXTS)
    dsir.save(tmp_path)
    assert Dsir.load(tmp_path).select(TEXTS, k=2, method="topk") == dsir.select(TEXTS, k=2, method="topk")
