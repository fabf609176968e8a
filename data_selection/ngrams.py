"""Texts to hashed n-grams, in numpy, many documents at a time; `ngrams_numba` does the same faster.

A token is a run of word bytes or a run of punctuation bytes of the lower-cased UTF-8 text; a document's
n-grams are its tokens, its pairs of neighbouring tokens, and so on up to n; each n-gram falls into one of
`buckets` by its hash.

The hash is fixed (it depends on no seed, platform or Python build), so counts can be kept and compared. It is
not the sha256 of the original DSIR package: other n-grams collide, selections are as precise.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .packing import ASCII_LOWER, Packed, pack

# Documents are hashed together up to this many bytes: the working arrays then stay in a core's cache.
BATCH_BYTES = 1 << 17
# Of a longer token the first 64 bytes and the length count: a megabyte of base64 must not take a pass a word.
MAX_TOKEN_BYTES = 64

SPACE, WORD, PUNCTUATION = 0, 1, 2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class HashedNgrams(NamedTuple):
    """The n-grams of N documents, M in all: first the single tokens of all documents, then their pairs, ..."""

    buckets: NDArray[np.int64]  # (M,) in [0, buckets)
    documents: NDArray[np.int64]  # (M,) in [0, N)
    counts: NDArray[np.int64]  # (N,) how many n-grams each document has
    orders: NDArray[np.int64]  # (ngrams + 1,) where the n-grams of each length begin, and M


class Scores(NamedTuple):
    """What a kernel finds out about N documents."""

    sums: NDArray[np.float64]  # (N, targets) sums of the table's rows over the n-grams
    tokens: NDArray[np.int64]  # (N,)
    prints: NDArray[np.uint64]  # (N,) equal where the tokens are; 0 for a document without tokens


class Tokens(NamedTuple):
    """The tokens of N documents."""

    hashes: NDArray[np.uint64]  # (tokens,)
    documents: NDArray[np.int64]  # (tokens,) in [0, N)
    counts: NDArray[np.int64]  # (N,)


def count(packed: Packed, ngrams: int, buckets: int, totals: NDArray[np.int64]) -> None:
    """Add to `totals`, (buckets,), how often each bucket occurs."""
    for part in _batches(packed):
        totals += np.bincount(hash_packed(part, ngrams, buckets).buckets, minlength=buckets)


def score(packed: Packed, ngrams: int, buckets: int, table: NDArray[np.float64]) -> Scores:
    """Sum the rows of `table`, (buckets, targets), over the n-grams of each document.

    A document's sums do not depend on the documents around it, to the last bit. Between the kernels they differ by
    rounding alone: numpy adds in pairs, numba in the order of the text.
    """
    sums = np.zeros((len(packed), table.shape[1]))
    token_counts = np.zeros(len(packed), np.int64)
    prints = np.zeros(len(packed), np.uint64)
    first = 0
    for part in _batches(packed):
        rows = slice(first, first + len(part))
        first += len(part)
        tokens = hash_tokens(part)
        hashed = _ngrams(tokens, ngrams, buckets)
        for order in range(ngrams):
            found = hashed.buckets[hashed.orders[order] : hashed.orders[order + 1]]
            sums[rows] += _sum_runs(table.take(found, axis=0), np.maximum(tokens.counts - order, 0))
        token_counts[rows] = tokens.counts
        prints[rows] = _prints(tokens)
    return Scores(sums, token_counts, prints)


def hash_ngrams(texts: Sequence[str], ngrams: int, buckets: int) -> HashedNgrams:
    """The bucket of every 1-, 2-, ... `ngrams`-gram of every text; none crosses from one text into the next.

    Tokens follow the WordPunct rule of DSIR (arXiv 2302.03169; `\\w+` or `[^\\w\\s]+` after `str.lower`), on
    bytes: word bytes are ASCII letters, digits, `_` and every byte >= 0x80; space bytes are what ASCII
    characters `str.isspace` holds; the rest is punctuation. So non-ASCII punctuation and spaces are parts of
    words, which the original counts apart; selections are as precise either way.

    Args:
        texts: N documents; lone surrogates are allowed.
        ngrams: the longest n-gram, >= 1.
        buckets: number of buckets, 1 to 2**32.
    """
    return hash_packed(pack(texts), ngrams, buckets)


def hash_packed(packed: Packed, ngrams: int, buckets: int) -> HashedNgrams:
    """`hash_ngrams` of packed texts."""
    return _ngrams(hash_tokens(packed), ngrams, buckets)


def _ngrams(tokens: Tokens, ngrams: int, buckets: int) -> HashedNgrams:
    hashes, documents, token_counts = tokens
    grams, all_hashes, all_documents = hashes, [hashes], [documents]
    for order in range(2, ngrams + 1):
        grams = mix64(grams[:-1] * _GOLDEN + hashes[order - 1 :])
        inside = documents[: -(order - 1)] == documents[order - 1 :]
        all_hashes.append(grams[inside])
        all_documents.append(documents[order - 1 :][inside])
    orders = np.cumsum([0, *map(len, all_hashes)])
    counts = ngram_counts(token_counts, ngrams)
    return HashedNgrams(to_buckets(np.concatenate(all_hashes), buckets), np.concatenate(all_documents), counts, orders)


def ngram_counts(tokens: NDArray[np.int64], ngrams: int) -> NDArray[np.int64]:
    """(N,) how many n-grams of 1 to `ngrams` tokens a document of so many tokens has."""
    return np.sum([np.maximum(tokens - order, 0) for order in range(ngrams)], axis=0)


def hash_tokens(packed: Packed) -> Tokens:
    """The 64-bit hash and the document of every token. Tokens are read eight bytes at a time, as little-endian
    numbers."""
    size = int(packed.offsets[-1])
    codes = np.full(size + 9, ord("\n"), np.uint8)  # a space before and behind: no token crosses an edge
    codes[1 : size + 1] = ASCII_LOWER[packed.data[:size]]
    classes = BYTE_CLASSES[codes]  # (bytes,)
    changes = classes[1:] != classes[:-1]
    changes[packed.offsets] = True  # nor from one document into the next
    edges = np.flatnonzero(changes) + 1
    token_edges = np.flatnonzero(classes[edges[:-1]] != SPACE)  # the last edge opens the closing spaces
    starts = edges[token_edges]
    lengths = edges[token_edges + 1] - starts

    words = np.ndarray((len(codes) - 7,), "<u8", codes.data, strides=(1,))  # the eight bytes from each position on
    first = words[starts] & _FIRST_BYTES[np.minimum(lengths, 8)]
    hashes = mix64(first + lengths.astype(np.uint64) * _GOLDEN)
    for at in range(8, MAX_TOKEN_BYTES, 8):
        longer = np.flatnonzero(lengths > at)
        if not len(longer):
            break
        rest = words[starts[longer] + at] & _FIRST_BYTES[np.minimum(lengths[longer] - at, 8)]
        hashes[longer] = mix64(hashes[longer] * _GOLDEN + rest)
    counts = np.diff(np.searchsorted(starts, packed.offsets[1:] + 1), prepend=0)  # (N,)
    return Tokens(hashes, np.repeat(np.arange(len(packed)), counts), counts)


def _prints(tokens: Tokens) -> NDArray[np.uint64]:
    """(N,) the sum over a document's tokens j = 0, 1, ... of (2 j + 1) hash_j, modulo 2**64."""
    firsts = np.cumsum(tokens.counts) - tokens.counts
    places = np.arange(len(tokens.hashes)) - np.repeat(firsts, tokens.counts)  # (tokens,) within the document
    return _sum_runs(tokens.hashes * (2 * places + 1).astype(np.uint64), tokens.counts)


def _sum_runs(values: NDArray[Any], lengths: NDArray[np.int64]) -> NDArray[Any]:
    """(N, ...) sums over runs of so many rows of `values`, which follow each other; a run may have none."""
    sums = np.zeros((len(lengths), *values.shape[1:]), values.dtype)
    full = np.flatnonzero(lengths)
    if len(full):
        sums[full] = np.add.reduceat(values, (np.cumsum(lengths) - lengths)[full], axis=0)
    return sums


def _batches(packed: Packed) -> Iterator[Packed]:
    """The texts in batches of one or more, about BATCH_BYTES bytes."""
    first, offsets = 0, packed.offsets
    while first < len(packed):
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BATCH_BYTES)))
        last = min(last, len(packed))
        yield Packed(packed.data[offsets[first] :], offsets[first : last + 1] - offsets[first])
        first = last


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection of 64-bit numbers; every bit comes to depend on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def to_buckets(hashes: NDArray[np.uint64], buckets: int) -> NDArray[np.int64]:
    """The upper 32 bits of each hash, scaled to [0, buckets): as even as a remainder, and faster."""
    return (((hashes >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def _byte_classes() -> NDArray[np.uint8]:
    classes = np.full(256, WORD, np.uint8)
    for code in range(128):
        character = chr(code)
        if character.isspace():
            classes[code] = SPACE
        elif not character.isalnum() and character != "_":
            classes[code] = PUNCTUATION
    return classes


BYTE_CLASSES = _byte_classes()
_FIRST_BYTES = np.array([(1 << 8 * kept) - 1 for kept in range(9)], np.uint64)  # masks that keep 0 to 8 bytes
