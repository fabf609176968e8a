"""Texts to hashed n-grams, in numpy, many documents at a time.

A token is a run of word bytes or a run of punctuation bytes of the lower-cased UTF-8 text; a document's
n-grams are its tokens, its pairs of neighbouring tokens, and so on up to n; each n-gram falls into one of
`buckets` by its hash.

The hash is fixed (it depends on no seed, platform or Python build), so counts can be kept and compared. It is
not the sha256 of the original DSIR package: other n-grams collide, selections are as precise.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Documents are hashed together up to this many characters: the working arrays then stay in a core's cache.
BATCH_CHARS = 1 << 17
# Of a longer token the first 64 bytes and the length count: a megabyte of base64 must not take a pass a word.
MAX_TOKEN_BYTES = 64

SPACE, WORD, PUNCTUATION = 0, 1, 2
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class HashedNgrams(NamedTuple):
    """The n-grams of N documents, M in all; of each document first the single tokens, then the pairs, ..."""

    buckets: NDArray[np.int64]  # (M,) in [0, buckets)
    documents: NDArray[np.int64]  # (M,) in [0, N)
    counts: NDArray[np.int64]  # (N,) how many n-grams each document has


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
    lowered = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    # Spaces on all sides: no token crosses an edge, and eight bytes can be read at every token.
    data = b"\n" + b"\n".join(lowered) + b"\n" * 8
    ends = np.cumsum([1 + len(document) for document in lowered], dtype=np.int64)  # (N,)
    hashes, starts = hash_tokens(data)
    token_counts = np.diff(np.searchsorted(starts, ends, side="right"), prepend=0)  # (N,)
    token_documents = np.repeat(np.arange(len(texts)), token_counts)  # (tokens,)

    grams, all_hashes, all_documents = hashes, [hashes], [token_documents]
    for order in range(2, ngrams + 1):
        grams = mix64(grams[:-1] * _GOLDEN + hashes[order - 1 :])
        inside = token_documents[: -(order - 1)] == token_documents[order - 1 :]
        all_hashes.append(grams[inside])
        all_documents.append(token_documents[order - 1 :][inside])
    documents = np.concatenate(all_documents)
    counts = np.bincount(documents, minlength=len(texts))
    return HashedNgrams(to_buckets(np.concatenate(all_hashes), buckets), documents, counts)


def hash_tokens(data: bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The 64-bit hash and the first byte's position of every token of `data`, which must begin with a space
    byte and end in eight of them. Tokens are read eight bytes at a time, as little-endian numbers.
    """
    codes = np.frombuffer(data, np.uint8)
    classes = _BYTE_CLASSES[codes]  # (bytes,)
    edges = np.flatnonzero(classes[1:] != classes[:-1]) + 1
    token_edges = np.flatnonzero(classes[edges[:-1]] != SPACE)  # the last edge opens the closing spaces
    starts = edges[token_edges]
    lengths = edges[token_edges + 1] - starts

    words = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))  # the eight bytes from each position on
    first = words[starts] & _FIRST_BYTES[np.minimum(lengths, 8)]
    hashes = mix64(first + lengths.astype(np.uint64) * _GOLDEN)
    for at in range(8, MAX_TOKEN_BYTES, 8):
        longer = np.flatnonzero(lengths > at)
        if not len(longer):
            break
        rest = words[starts[longer] + at] & _FIRST_BYTES[np.minimum(lengths[longer] - at, 8)]
        hashes[longer] = mix64(hashes[longer] * _GOLDEN + rest)
    return hashes, starts


def iter_hashed(texts: Iterable[str], ngrams: int, buckets: int) -> Iterator[HashedNgrams]:
    """`hash_ngrams` over a stream of texts, in batches of one text or more, about BATCH_CHARS characters."""
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield hash_ngrams(batch, ngrams, buckets)
            batch, chars = [], 0
    if batch:
        yield hash_ngrams(batch, ngrams, buckets)


def count_ngrams(texts: Iterable[str], ngrams: int, buckets: int) -> tuple[NDArray[np.int64], int]:
    """How often each bucket occurs in all texts together, (buckets,), and how many texts there were."""
    totals, documents = np.zeros(buckets, np.int64), 0
    for hashed in iter_hashed(texts, ngrams, buckets):
        totals += np.bincount(hashed.buckets, minlength=buckets)
        documents += len(hashed.counts)
    return totals, documents


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


_BYTE_CLASSES = _byte_classes()
_FIRST_BYTES = np.array([(1 << 8 * kept) - 1 for kept in range(9)], np.uint64)  # masks that keep 0 to 8 bytes
