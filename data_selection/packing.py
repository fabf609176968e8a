"""Many texts as one array of lower-cased UTF-8 bytes: what the n-gram kernels read."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]

# The bytes of the last text are followed by as many zeros, so that eight bytes can be read at every position.
PADDING = 8
ASCII_LOWER = np.arange(256, dtype=np.uint8)
ASCII_LOWER[ord("A") : ord("Z") + 1] += 32


class Packed(NamedTuple):
    """N texts: text i is `data[offsets[i] : offsets[i + 1]]`, UTF-8, as `str.lower` gives it but for A to Z, which
    may be left for the kernel; PADDING more bytes follow the last."""

    data: Bytes  # (bytes + PADDING,)
    offsets: NDArray[np.int64]  # (N + 1,)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(texts: Sequence[str]) -> Packed:
    """Pack strings; lone surrogates are allowed."""
    joined = "".join(texts)
    if joined.isascii():
        return _packed([joined.encode()], [len(text) for text in texts])
    encoded = joined.encode("utf-8", "surrogatepass")
    lengths = [len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts]
    if sum(lengths) != len(encoded):  # halves of a surrogate pair in two texts have met
        return _packed(lowered := [_lower(text) for text in texts], [len(text) for text in lowered])
    return _settled(_packed([encoded], lengths))


def pack_arrow(texts: Any) -> Packed:
    """Pack a `pyarrow.StringArray` without nulls, of valid UTF-8. Texts with letters beyond ASCII that `str.lower` may
    change go through it one by one; the others stay where they are."""
    _, offset_buffer, data_buffer = texts.buffers()
    all_offsets = np.frombuffer(offset_buffer, np.int32) if offset_buffer else np.zeros(1, np.int32)
    offsets = all_offsets[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    if not len(texts) or offsets[0] == offsets[-1]:
        return Packed(np.zeros(PADDING, np.uint8), np.zeros(len(texts) + 1, np.int64))
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1] + PADDING]  # Arrow pads to 64 bytes
    offsets -= offsets[0]
    size = int(offsets[-1])
    if len(data) < size + PADDING:
        data = np.concatenate([data[:size], np.zeros(PADDING, np.uint8)])
    return _settled(Packed(data, offsets))


def _settled(packed: Packed) -> Packed:
    """With the texts that `str.lower` may change beyond ASCII replaced by what it gives."""
    data, offsets = packed
    size = int(offsets[-1])
    changed = needs_lower(data[:size])
    if not len(changed):
        return packed
    whole = data.data
    rows = np.unique(np.searchsorted(offsets, changed, side="right") - 1)
    bounds = zip(rows.tolist(), offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
    lengths = np.diff(offsets)
    parts, kept = [], 0
    for row, start, end in bounds:
        text = _lower(str(whole[start:end], "utf-8", "surrogatepass"))
        parts += [whole[kept:start], text]
        lengths[row] = len(text)
        kept = end
    parts.append(whole[kept:size])
    return _packed(parts, lengths)


def _lower(text: str) -> bytes:
    return text.lower().encode("utf-8", "surrogatepass")


def _packed(parts: Sequence[bytes | memoryview], lengths: Sequence[int] | NDArray[np.int64]) -> Packed:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Packed(np.frombuffer(b"".join([*parts, bytes(PADDING)]), np.uint8), offsets)


def needs_lower(data: Bytes) -> NDArray[np.int64]:
    """Positions of the characters beyond ASCII that `str.lower` may change, found by their first bytes.

    Left out are characters without case: U+0080 to U+00BF, the accented lower-case letters of Latin-1, and of U+2000 to
    U+EFFF all but the blocks that hold letters with case; that is, punctuation, symbols, CJK and Hangul.
    """
    found = np.flatnonzero(data >= 0xC3)
    lead = data[found]
    follow = data[np.minimum(found + 1, len(data) - 1)]
    quiet = (lead == 0xC3) & (follow > 0x9E)
    quiet |= (lead == 0xE2) & ~_CASED_AFTER_E2[follow]
    quiet |= (lead == 0xEA) & (follow >= 0xB0)
    quiet |= (lead >= 0xE3) & (lead < 0xEF) & (lead != 0xEA)
    return found[~quiet]


# Of U+2000 to U+2FFF: letter-like symbols, Roman numerals, circled letters; Glagolitic, Latin, Coptic.
_CASED_AFTER_E2 = np.zeros(256, bool)
_CASED_AFTER_E2[[0x84, 0x85, 0x86, 0x92, 0x93, 0xB0, 0xB1, 0xB2, 0xB3]] = True
