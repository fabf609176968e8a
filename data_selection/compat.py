"""N-grams and hash of the package `data-selection` 1.0.3, the official DSIR, for `Dsir(compat="dsir-1.0.3")`.

A token is `\\w+` or `[^\\w\\s]+` of the lower-cased text in Python's `re`, as in NLTK 3.9's WordPunctTokenizer (from
3.10 on NLTK uses another engine, which splits one text in 10,000 otherwise); the tokens of an n-gram are joined by
a space; its bucket is sha256, as one big number, modulo the number of buckets. Slow: a Python loop over n-grams.
"""

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from .ngrams import Scores

NAME = "dsir-1.0.3"
BUCKETS = 10_000
EPSILON = 1e-8
_TOKEN = re.compile(r"\w+|[^\w\s]+")


def count(texts: Sequence[str], longest: int, buckets: int, totals: NDArray[np.int64]) -> None:
    """As `ngrams.count`, of strings."""
    for text in texts:
        for bucket in text_buckets(_tokens(text), longest, buckets):
            totals[bucket] += 1


def score(texts: Sequence[str], longest: int, buckets: int, table: NDArray[np.float64]) -> Scores:
    """As `ngrams.score`, of strings."""
    found = Scores(
        np.zeros((len(texts), table.shape[1])), np.zeros(len(texts), np.int64), np.zeros(len(texts), np.uint64)
    )
    for row, text in enumerate(texts):
        tokens = _tokens(text)
        if tokens:
            found.sums[row] = table[list(text_buckets(tokens, longest, buckets))].sum(axis=0)
            found.tokens[row] = len(tokens)
            found.prints[row] = _number(" ".join(tokens)) >> 192
    return found


def text_buckets(tokens: Sequence[str], longest: int, buckets: int) -> Iterator[int]:
    """The bucket of every token, then of every pair, ..."""
    for order in range(1, longest + 1):
        for at in range(len(tokens) - order + 1):
            yield _number(" ".join(tokens[at : at + order])) % buckets


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _number(ngram: str) -> int:
    return int.from_bytes(sha256(ngram.encode("utf-8", "surrogatepass")).digest())
