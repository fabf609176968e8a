"""A pool cut in shards that can be read alone, and read in batches that the kernels take.

A shard is a range of bytes of a `.jsonl` or `.txt` file (it owns the lines that start there), a range of row groups of
a `.parquet` file, a whole compressed file, or a range of rows of a Dataset or list. The texts are those of
`texts.read_texts`, in its order; plain columns of text go from Arrow to the kernel without becoming Python objects.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .texts import (
    COMPRESSED,
    ROWS_PER_READ,
    DataSelectionError,
    TextSource,
    checked_file,
    checked_source,
    file_kind,
    file_paths,
    is_dataset,
    item_text,
    open_bytes,
    open_parquet,
    parse_row,
    parse_text,
    row_text,
    text_columns,
    unreadable,
)

SHARD_BYTES, SHARD_ROWS = 64 << 20, 100_000
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Shard:
    """A part of a pool: the units `start` to `stop`, `stop` excluded, of one file or of a source in memory."""

    number: int
    file: str  # the path below the folder that all files of the pool share; "" for a source in memory
    path: str | None  # as the caller spelled it
    unit: Literal["bytes", "groups", "rows", "all"]
    start: int
    stop: int


class Batch(NamedTuple):
    """Texts, and where each comes from: its row's `source`, "" where it has none."""

    texts: list[str] | Any  # strings or a pyarrow.StringArray without nulls
    sources: list[str] | None  # None where no row has one


class NamedFiles(list[str]):
    """Paths of a pool, and the names that its files go by: the noise of a row depends on its file's name, which is
    otherwise the path below the folder that all share.

    Args:
        paths: of the files.
        names: as many, all different.
    """

    def __init__(self, paths: Iterable[str], names: Iterable[str]) -> None:
        super().__init__(paths)
        self.names = list(names)
        if len(set(self.names)) != len(self):
            raise DataSelectionError(f"{len(self)} files go by the names {self.names}; give each its own")


def plan(source: TextSource, name: str, size: int = SHARD_BYTES, rows: int = SHARD_ROWS) -> list[Shard]:
    """The shards of a source, in order; each has about `size` bytes of a file, or `rows` rows in memory.

    Raises:
        DataSelectionError: the source is of another kind, or a file is missing or damaged.
    """
    source = checked_source(source, name)
    paths = [checked_file(path, name) for path in file_paths(source)]
    shards: list[Shard] = []
    if paths:
        given = [source] if isinstance(source, (str, os.PathLike)) else source
        for spelled, path, short in zip(given, paths, file_names(source, paths), strict=True):
            for unit, start, stop in _ranges(path, size):
                shards.append(Shard(len(shards), short, os.fspath(spelled), unit, start, stop))
    elif is_dataset(source) or isinstance(source, (list, tuple)):
        for start in range(0, len(source), rows):  # type: ignore[arg-type]
            stop = min(start + rows, len(source))  # type: ignore[arg-type]
            shards.append(Shard(len(shards), "", None, "rows", start, stop))
    else:
        shards.append(Shard(0, "", None, "all", 0, 0))
    return shards


def file_names(source: TextSource, paths: Sequence[Path]) -> list[str]:
    """What the files of a source go by: the names that came with them, or `short_names`."""
    return source.names if isinstance(source, NamedFiles) else short_names(paths)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Each path below the folder that all share, so that the folder may be mounted elsewhere."""
    whole = [path.absolute() for path in paths]
    folder = Path(os.path.commonpath([path.parent for path in whole]))
    return [path.relative_to(folder).as_posix() for path in whole]


def _ranges(path: Path, size: int) -> Iterator[tuple[Any, int, int]]:
    if path.suffix in COMPRESSED:
        yield "all", 0, 0
    elif file_kind(path) == ".parquet":
        with open_parquet(path) as file:
            start, held = 0, 0
            for group in range(file.num_row_groups):
                held += file.metadata.row_group(group).total_byte_size
                if held >= size or group == file.num_row_groups - 1:
                    yield "groups", start, group + 1
                    start, held = group + 1, 0
    else:
        total = path.stat().st_size
        for start in range(0, total, size):
            yield "bytes", start, min(start + size, total)


def fingerprint(source: TextSource, name: str) -> str:
    """What tells one content of a source from another: of files their names, sizes and times of change, of a Dataset
    its fingerprint, of a list its texts.

    Raises:
        DataSelectionError: the source can be read once only, or not at all.
    """
    source = checked_source(source, name)
    digest = hashlib.sha256()
    paths = [checked_file(path, name) for path in file_paths(source)]
    if paths:
        for path, short in zip(paths, file_names(source, paths), strict=True):
            found = path.stat()
            digest.update(f"{short}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    elif is_dataset(source):
        digest.update(f"{source._fingerprint}\0{len(source)}".encode())  # type: ignore[union-attr, arg-type]
    elif isinstance(source, (list, tuple)):
        for number, item in enumerate(source):
            text = item_text(item, f"{name}, item {number}").encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(8) + text)
    else:
        raise DataSelectionError(
            f"{name} is a {type(source).__name__}, which cannot be cut in shards to be scored in parts; give files, a "
            "datasets.Dataset or a list"
        )
    return digest.hexdigest()


def read_batches(source: TextSource, shard: Shard, name: str) -> Iterator[Batch]:
    """The texts of one shard of `source`.

    Raises:
        DataSelectionError: as in `texts.read_texts`.
    """
    source = checked_source(source, name)
    if shard.path is not None:
        path = Path(shard.path)
        kind = file_kind(path)
        if kind == ".parquet":
            return _parquet(path, shard)
        return _jsonl(path, shard) if kind == ".jsonl" else _txt(path, shard)
    if is_dataset(source):
        return _dataset(source, shard, name)
    items = source[shard.start : shard.stop] if shard.unit == "rows" else source  # type: ignore[index]
    return _items(items, shard.start, name)  # type: ignore[arg-type]


def read_all(source: TextSource, name: str) -> Iterator[Batch]:
    """The batches of all shards, in order."""
    for shard in plan(source, name):
        yield from read_batches(source, shard, name)


def _items(items: Iterable[Any], first: int, name: str) -> Iterator[Batch]:
    items = iter(items)
    while part := list(islice(items, ROWS_PER_READ)):
        texts = [item_text(item, f"{name}, item {number}") for number, item in enumerate(part, start=first)]
        yield Batch(texts, _sources(part))
        first += len(part)


def _sources(rows: Sequence[Any]) -> list[str] | None:
    named = [row.get("source") if not isinstance(row, str) else None for row in rows]
    return ["" if name is None else str(name) for name in named] if any(name is not None for name in named) else None


def _blocks(path: Path, shard: Shard) -> Iterator[tuple[bytes, int]]:
    """Whole lines, some megabytes at a time, and the byte where they start."""
    stop = shard.stop if shard.unit == "bytes" else 2**63
    try:
        with open_bytes(path) as file:
            at = shard.start
            if at:  # the line that the shard's start cuts belongs to the shard before
                file.seek(at - 1)
                at += len(file.readline()) - 1
            while at < stop:
                block = file.read(min(BLOCK_BYTES, stop - at))
                if not block:
                    return
                if not block.endswith(b"\n"):
                    block += file.readline()
                yield block, at
                at += len(block)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _txt(path: Path, shard: Shard) -> Iterator[Batch]:
    for block, at in _blocks(path, shard):
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        try:
            yield Batch([parse_text(line, "") for line in lines], None)
        except DataSelectionError:
            for number, line in enumerate(lines, start=_line_number(path, at)):
                parse_text(line, f"{path}:{number}")
            raise


def _jsonl(path: Path, shard: Shard) -> Iterator[Batch]:
    fast = True
    for block, at in _blocks(path, shard):
        batch = _arrow_rows(block) if fast else None
        if batch is None:
            fast = False  # rows of another form tend to fill the file
            batch = _python_rows(block, path, at)
        yield batch


def _arrow_rows(block: bytes) -> Batch | None:
    """The column `text` of rows that are plain; None where a row needs a closer look."""
    import pyarrow
    from pyarrow import json

    schema = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string())])
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    reading = json.ReadOptions(use_threads=False, block_size=len(block) + 1)
    try:
        rows = json.read_json(pyarrow.BufferReader(block), reading, options).combine_chunks()
        rows.validate(full=True)
    except pyarrow.ArrowException:
        return None
    if rows.num_rows != block.count(b"\n") + (not block.endswith(b"\n")):  # blank lines, or two rows in one
        return None
    return _columns(rows)


def _columns(rows: Any) -> Batch | None:
    """Of a pyarrow.Table; None where a text is null."""
    import pyarrow

    texts = rows.column("text")
    if texts.null_count or not len(texts):
        return None if texts.null_count else Batch([], None)
    texts = texts.cast(pyarrow.string()).combine_chunks() if isinstance(texts, pyarrow.ChunkedArray) else texts
    if isinstance(texts, pyarrow.ChunkedArray):
        texts = pyarrow.concat_arrays(texts.chunks)
    sources = rows.column("source") if "source" in rows.column_names else None
    if sources is None or sources.null_count == len(sources):
        return Batch(texts, None)
    return Batch(texts, ["" if source is None else str(source) for source in sources.to_pylist()])


def _python_rows(block: bytes, path: Path, at: int) -> Batch:
    lines = block.split(b"\n")
    try:
        rows = [parse_row(line, "") for line in lines if line.strip()]
        return Batch([row_text(row, "") for row in rows], _sources(rows))
    except DataSelectionError:
        # Only now the line is worth counting: the file before the shard may be a terabyte.
        for number, line in enumerate(lines, start=_line_number(path, at)):
            if line.strip():
                row_text(parse_row(line, f"{path}:{number}"), f"{path}:{number}")
        raise


def _line_number(path: Path, at: int) -> int:
    """The number, from 1, of the line that starts at byte `at`."""
    number = 1
    with open_bytes(path) as file:
        while at > 0 and (block := file.read(min(at, BLOCK_BYTES))):
            number += block.count(b"\n")
            at -= len(block)
    return number


def _parquet(path: Path, shard: Shard) -> Iterator[Batch]:
    import pyarrow

    with open_parquet(path) as file:
        columns = text_columns(file.schema_arrow.names, str(path))
        wanted = [*columns, *(["source"] if "source" in file.schema_arrow.names else [])]
        number = sum(file.metadata.row_group(group).num_rows for group in range(shard.start))
        batches = file.iter_batches(row_groups=range(shard.start, shard.stop), columns=wanted, use_threads=False)
        while True:
            try:
                rows = next(batches, None)
            except (OSError, pyarrow.ArrowException) as error:
                raise unreadable(path, error) from error
            if rows is None:
                return
            yield _table_batch(pyarrow.Table.from_batches([rows]), columns, str(path), number)
            number += rows.num_rows


def _dataset(dataset: Any, shard: Shard, name: str) -> Iterator[Batch]:
    columns = text_columns(dataset.column_names, name)
    wanted = [*columns, *(["source"] if "source" in dataset.column_names else [])]
    plain = dataset.with_format("arrow").select_columns(wanted)
    step = 10 * ROWS_PER_READ
    for start in range(shard.start, shard.stop, step):
        yield _table_batch(plain[start : min(start + step, shard.stop)], columns, name, start)


def _table_batch(rows: Any, columns: list[str], place: str, first: int) -> Batch:
    import pyarrow

    strings = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    if columns == ["text"] and any(check(rows.schema.field("text").type) for check in strings):
        batch = _columns(rows)
        if batch is not None:
            return batch
    listed = rows.to_pylist()
    texts = [row_text(row, f"{place}, row {number}") for number, row in enumerate(listed, start=first)]
    return Batch(texts, _sources(listed))
