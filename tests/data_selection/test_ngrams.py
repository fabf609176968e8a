"""The byte kernel against a twin that takes one text, one token and one n-gram at a time."""

import random
import re

import numpy as np
import pytest

from krontune.data_selection import ngrams as numpy_kernel
from krontune.data_selection.ngrams import MAX_TOKEN_BYTES, hash_ngrams
from krontune.data_selection.packing import needs_lower, pack, pack_arrow

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
TOKEN = re.compile(rb"[0-9A-Za-z_\x80-\xff]+|[^0-9A-Za-z_\x80-\xff\x09-\x0d\x1c-\x20]+")


def naive_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def naive_token_hash(token):
    words = [token[at : at + 8] for at in range(0, min(len(token), MAX_TOKEN_BYTES), 8)]
    value = naive_mix((int.from_bytes(words[0], "little") + len(token) * GOLDEN) & MASK)
    for word in words[1:]:
        value = naive_mix((value * GOLDEN + int.from_bytes(word, "little")) & MASK)
    return value


def naive_buckets(text, ngrams, buckets):
    tokens = TOKEN.findall(text.lower().encode("utf-8", "surrogatepass"))
    found = []
    for order in range(1, ngrams + 1):
        for at in range(len(tokens) - order + 1):
            value = naive_token_hash(tokens[at])
            for token in tokens[at + 1 : at + order]:
                value = naive_mix((value * GOLDEN + naive_token_hash(token)) & MASK)
            found.append((value >> 32) * buckets >> 32)
    return found


def per_text(hashed):
    return [hashed.buckets[hashed.documents == i].tolist() for i in range(len(hashed.counts))]


ODD_TEXTS = [
    "",
    " ",
    "\n\t\x1c\x00 \x00",
    "a",
    "a.b..c",
    "don't stop_here, v1.2-rc3!",
    "ΑΣ ΟΔΥΣΣΕΥΣ",
    "İstanbul ẞ ﬁ",
    "价格是三块钱。 ok",
    "em—dash no\u00a0break",
    "lone \ud800 surrogate",
    "x" * 8 + " " + "x" * 9 + " " + "x" * 16 + " " + "x" * 17,
    "y" * 63 + " " + "y" * 64 + " " + "y" * 65 + " " + "y" * 200,
    "😀😀 \U0001f468\u200d\U0001f469",
]


@pytest.mark.parametrize("ngrams", [1, 2, 3, 5])
@pytest.mark.parametrize("buckets", [1, 7, 10_000, 2**17, 2**32])
def test_buckets_of_odd_texts_equal_those_of_the_twin(ngrams, buckets):
    expected = [naive_buckets(text, ngrams, buckets) for text in ODD_TEXTS]
    hashed = hash_ngrams(ODD_TEXTS, ngrams, buckets)
    assert per_text(hashed) == expected
    assert hashed.counts.tolist() == [len(found) for found in expected]


@pytest.mark.parametrize("seed", range(20))
def test_buckets_of_random_texts_equal_those_of_the_twin(seed):
    rng = random.Random(seed)
    alphabet = [*"abcXYZ019_  .,;-\n\t\r\x0b\x1d\x7f'", "é", "Σ", "ß", "中", "\u2028", "\u0301", "😀"]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(120))) for _ in range(rng.randrange(1, 40))]
    ngrams = rng.randrange(1, 5)
    buckets = rng.randrange(2, 2**20)
    assert per_text(hash_ngrams(texts, ngrams, buckets)) == [naive_buckets(t, ngrams, buckets) for t in texts]


def test_no_texts_give_no_ngrams():
    hashed = hash_ngrams([], 2, 100)
    assert [len(part) for part in hashed[:3]] == [0, 0, 0]


def test_case_does_not_count_and_order_does():
    def buckets(text):
        return hash_ngrams([text], 2, 2**32).buckets.tolist()

    assert buckets("The CAT sat") == buckets("the cat sat")
    assert sorted(buckets("the cat")) != sorted(buckets("cat the"))


def test_hashes_stay_what_they_are():
    # Saved counts are only good as long as the hash does not change; a change needs a new format version.
    assert hash_ngrams(["alice went"], 2, 2**17).buckets.tolist() == [89374, 99893, 93351]


def test_distinct_words_fill_buckets_evenly():
    words = " ".join(f"w{i}" for i in range(100_000))
    totals = np.zeros(1000, np.int64)
    numpy_kernel.count(pack([words]), 1, 1000, totals)
    # Poisson with mean 100: a bucket beyond 100 +- 50 is five standard deviations away.
    assert totals.min() > 50 and totals.max() < 150
    assert abs(totals.var() - 100) < 20


@pytest.mark.parametrize("kernel", ["numpy", "numba"])
def test_batches_do_not_change_counts_nor_scores(monkeypatch, kernel):
    module = kernel_module(kernel)
    texts = [f"text {i} of many, {'long ' * (i % 7)}" for i in range(300)]
    whole = hash_ngrams(texts, 2, 1000)
    table = np.random.default_rng(0).normal(size=(1000, 2))
    together = module.score(pack(texts), 2, 1000, table)
    monkeypatch.setattr(numpy_kernel, "BATCH_BYTES", 100)
    totals = np.zeros(1000, np.int64)
    module.count(pack(texts), 2, 1000, totals)
    assert totals.tolist() == np.bincount(whole.buckets, minlength=1000).tolist()
    for apart, all_at_once in zip(module.score(pack(texts), 2, 1000, table), together, strict=True):
        assert np.array_equal(apart, all_at_once)
    alone = module.score(pack(texts[7:8]), 2, 1000, table)
    assert np.array_equal(alone.sums[0], together.sums[7]) and alone.prints[0] == together.prints[7]


def kernel_module(name):
    return numpy_kernel if name == "numpy" else pytest.importorskip("krontune.data_selection.ngrams_numba")


def naive_print(text):
    tokens = TOKEN.findall(text.lower().encode("utf-8", "surrogatepass"))
    return sum((2 * j + 1) * naive_token_hash(token) for j, token in enumerate(tokens)) & MASK


@pytest.mark.parametrize("kernel", ["numpy", "numba"])
@pytest.mark.parametrize("ngrams", [1, 2, 3, 5])
@pytest.mark.parametrize("targets", [1, 3, 9])
def test_scores_of_odd_texts_equal_those_of_the_twin(kernel, ngrams, targets):
    module, table = kernel_module(kernel), np.random.default_rng(ngrams).normal(size=(997, targets))
    found = module.score(pack(ODD_TEXTS), ngrams, 997, table)
    expected = [table[naive_buckets(text, ngrams, 997)].sum(axis=0) for text in ODD_TEXTS]
    assert found.sums == pytest.approx(np.array(expected), abs=1e-12)
    assert found.tokens.tolist() == [len(naive_buckets(text, 1, 7)) for text in ODD_TEXTS]
    assert found.prints.tolist() == [naive_print(text) for text in ODD_TEXTS]
    totals = np.zeros(997, np.int64)
    module.count(pack(ODD_TEXTS), ngrams, 997, totals)
    buckets = [bucket for text in ODD_TEXTS for bucket in naive_buckets(text, ngrams, 997)]
    assert totals.tolist() == np.bincount(buckets, minlength=997).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_the_kernels_agree_on_random_texts(seed):
    numba_kernel = kernel_module("numba")
    rng = random.Random(seed)
    alphabet = [*"abcXYZ@[`{019_  .,;-\n\t\r\x0b\x1d\x7f'", "\x00", "é", "É", "Σ", "中", "\u2028", "😀"]
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(200))) for _ in range(rng.randrange(1, 60))]
    ngrams, buckets = rng.randrange(1, 9), rng.randrange(2, 2**18)
    table = np.random.default_rng(seed).normal(size=(buckets, 2))
    ours, theirs = (module.score(pack(texts), ngrams, buckets, table) for module in (numba_kernel, numpy_kernel))
    assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.prints, theirs.prints)
    assert ours.sums == pytest.approx(theirs.sums, rel=1e-12, abs=1e-12)
    counts = [np.zeros(buckets, np.int64) for _ in range(2)]
    for module, totals in zip((numba_kernel, numpy_kernel), counts, strict=True):
        module.count(pack(texts), ngrams, buckets, totals)
    assert np.array_equal(*counts)


def test_arrow_texts_are_packed_as_strings_are():
    pyarrow = pytest.importorskip("pyarrow")
    texts = [text for text in ODD_TEXTS if "\ud800" not in text] + [
        "É",
        "naïve – “quoted”",
        "ὈΔΥΣΣΕΎΣ ΑΣ",
        "ＡＢＣ",
        "ß",
    ]
    for part in (texts, texts[3:], texts[-2:], ["plain", "Ascii"], [""], []):
        for array in (
            pyarrow.array(part, pyarrow.string()),
            pyarrow.array(["é x", *part, "y"], pyarrow.string())[1:-1],
        ):
            packed, expected = pack_arrow(array), pack(part)
            lengths = np.diff(packed.offsets)
            table = np.random.default_rng(0).normal(size=(97, 1))
            assert lengths.tolist() == np.diff(expected.offsets).tolist()
            for found, wanted in zip(
                numpy_kernel.score(packed, 2, 97, table), numpy_kernel.score(expected, 2, 97, table), strict=True
            ):
                assert np.array_equal(found, wanted)


def test_every_character_that_lower_changes_is_found():
    characters = [chr(code) for code in range(128, 0x110000) if not 0xD800 <= code < 0xE000]
    changing = [char for char in characters if char.lower() != char]
    assert len(changing) > 1000
    for char in changing:
        assert len(needs_lower(np.frombuffer(char.encode(), np.uint8))) == 1
    quiet = "naïve – “quoted” 中文 한국어 … \u00a0 æøå"
    assert not len(needs_lower(np.frombuffer(quiet.encode(), np.uint8)))


def test_one_long_token_costs_no_pass_per_word(monkeypatch):
    import krontune.data_selection.ngrams as module

    calls = []
    mix64 = module.mix64
    monkeypatch.setattr(module, "mix64", lambda values: calls.append(1) or mix64(values))
    hash_ngrams(["z" * 100_000], 2, 1000)
    assert len(calls) < 15


def test_halves_of_a_surrogate_pair_in_neighbouring_texts_stay_apart():
    texts = ["a \ud83d", "\ude00 É", "b"]
    found = numpy_kernel.score(pack(texts), 2, 97, np.ones((97, 1)))
    assert found.prints.tolist() == [naive_print(text) for text in texts]
