"""Texts cut in chunks of equal length, as the DSIR paper cuts its pool (arXiv 2302.03169: 128 words)."""

from collections.abc import Iterator

from .shards import Batch, read_all
from .texts import TextSource


def cut(text: str, words: int) -> list[str]:
    """The text in pieces of so many words between single spaces, the last one shorter; line ends stay as they are."""
    parts = text.split(" ")
    return [" ".join(parts[at : at + words]) for at in range(0, len(parts), words)]


def cut_batch(batch: Batch, words: int) -> Batch:
    """The chunks of a batch; each keeps the source of its text."""
    texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
    pieces = [cut(text, words) for text in texts]
    sources = batch.sources
    if sources is not None:
        sources = [source for source, found in zip(sources, pieces, strict=True) for _ in found]
    return Batch([piece for found in pieces for piece in found], sources)


class Chunks:
    """The chunks of a source as rows: `text`, `row` (of the text in the source), `chunk` (0, 1, ... within it) and,
    where the row has one, `source`. They can be read again as often as the source can: the pool of a selection made
    with `Dsir(chunk_words=...)`.

    Args:
        source: texts, as `texts.read_texts` takes them.
        words: the length of a chunk.
    """

    def __init__(self, source: TextSource, words: int) -> None:
        self.source, self.words = source, words

    def __iter__(self) -> Iterator[dict[str, str | int]]:
        row = 0
        for batch in read_all(self.source, "raw"):
            texts = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
            for number, text in enumerate(texts):
                origin = {} if batch.sources is None else {"source": batch.sources[number]}
                for chunk, piece in enumerate(cut(text, self.words)):
                    yield {"text": piece, "row": row, "chunk": chunk, **origin}
                row += 1
