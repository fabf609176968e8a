"""The byte kernel against a twin that takes one text, one token and one n-gram at a time."""

import random
import re

import numpy as np
import pytest

from krontune.data_selection.ngrams import MAX_TOKEN_BYTES, count_ngrams, hash_ngrams, iter_hashed

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
    assert [len(part) for part in hashed] == [0, 0, 0]


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
    totals, _ = count_ngrams([words], 1, 1000)
    # Poisson with mean 100: a bucket beyond 100 +- 50 is five standard deviations away.
    assert totals.min() > 50 and totals.max() < 150
    assert abs(totals.var() - 100) < 20


def test_batches_do_not_change_the_counts(monkeypatch):
    texts = [f"text {i} of many, {'long ' * (i % 7)}" for i in range(300)]
    whole = hash_ngrams(texts, 2, 1000)
    monkeypatch.setattr("krontune.data_selection.ngrams.BATCH_CHARS", 100)
    batches = list(iter_hashed(iter(texts), 2, 1000))
    assert len(batches) > 10
    assert np.concatenate([batch.counts for batch in batches]).tolist() == whole.counts.tolist()
    totals, documents = count_ngrams(iter(texts), 2, 1000)
    assert documents == 300
    assert totals.tolist() == np.bincount(whole.buckets, minlength=1000).tolist()


def test_one_long_token_costs_no_pass_per_word(monkeypatch):
    import krontune.data_selection.ngrams as module

    calls = []
    mix64 = module.mix64
    monkeypatch.setattr(module, "mix64", lambda values: calls.append(1) or mix64(values))
    hash_ngrams(["z" * 100_000], 2, 1000)
    assert len(calls) < 15
