"""Where texts come from: lists, datasets and files, all read as one stream of strings in a fixed order."""

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

# One path, several paths, a datasets.Dataset, or an iterable of strings or rows.
TextSource: TypeAlias = str | os.PathLike[str] | Iterable[Any]
# A row of a file and where it stands, "pool.jsonl:12".
Row: TypeAlias = tuple[dict[str, Any], str]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".txt.zst")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
ROWS_PER_READ = 1000


class DataSelectionError(ValueError):
    """Data cannot be read, weighed or picked as asked; the message names the value and says what to do."""


def read_texts(source: TextSource, name: str = "texts") -> Iterator[str]:
    """The texts of `source`, one a row, in order, read as they are asked for.

    - A path, as string or Path: `.jsonl` (one object a line; blank lines are no rows), `.parquet`, or `.txt`
      (one text a line; blank lines are empty texts, so that row numbers are line numbers). `.jsonl` and `.txt` may
      be compressed: `.gz`, `.zst`.
    - A list of paths: the files one after the other. Strings count as paths where every one of them ends in
      one of these suffixes and is a single line.
    - A `datasets.Dataset`, or an iterable of rows or strings, `datasets.IterableDataset` among them.
    - A `datasets.DatasetDict`: its only split, or of several the split "train".

    A row is a mapping; see `row_text` for the columns that are read.

    Args:
        source: as above.
        name: what the source is to the caller ("target", "raw"), for the error messages.

    Raises:
        DataSelectionError: the source is of another kind, a file is missing or of another suffix, a line is
            not JSON (file and line number are named), a column is missing, a text is no string.
    """
    checked = checked_source(source, name)
    paths = file_paths(checked)
    if paths:
        for path in paths:
            for row, where in read_rows(path, name, text_only=True):
                yield row_text(row, where)
    elif is_dataset(checked):
        yield from _dataset_texts(checked, name)
    else:
        for number, item in enumerate(checked):
            yield item_text(item, f"{name}, item {number}")


def checked_source(source: TextSource, name: str) -> Any:
    """The source, of a `DatasetDict` the split that is read.

    Raises:
        DataSelectionError: it is of a kind that cannot be read.
    """
    if is_dataset_dict(source):
        if len(source) != 1 and "train" not in source:  # type: ignore[arg-type]
            raise DataSelectionError(f"{name} has the splits {list(source)}; pass one of them")  # type: ignore[arg-type]
        return source["train"] if "train" in source else next(iter(source.values()))  # type: ignore[index, union-attr]
    if isinstance(source, (str, os.PathLike)):
        return source
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise DataSelectionError(_wrong_kind(source, name))
    if type(source).__name__ == "DataFrame":
        # Iterating over a data frame gives its column names, which are strings: texts nobody meant.
        raise DataSelectionError(f"{name} is a DataFrame; pass its column of texts, or Dataset.from_pandas(frame)")
    return source


def file_paths(source: TextSource) -> list[Path]:
    """The paths of a source that is made of files, else none."""
    if isinstance(source, (str, os.PathLike)):
        return [Path(source)]
    return [Path(path) for path in source] if _is_path_list(source) else []


def source_name(source: TextSource, otherwise: str) -> str:
    """The file names of a source that is made of files, else `otherwise`."""
    return ", ".join(path.name for path in file_paths(source)) or otherwise


def row_text(row: Mapping[str, Any], where: str) -> str:
    """One text from one row: its `text`; or the contents of its `messages`; or `prompt` and `completion`,
    each a string or a list of messages. Parts are joined by a newline; role names are left out.

    Raises:
        DataSelectionError: none of these columns is there, or a value is neither text nor messages.
    """
    parts = [_value_text(row[column], f"{where}, column {column!r}") for column in text_columns(row, where)]
    return "\n".join(parts)


def text_columns(columns: Iterable[str], where: str) -> list[str]:
    columns = list(columns)
    for wanted in (["text"], ["messages"], ["prompt", "completion"]):
        if all(column in columns for column in wanted):
            return wanted
    raise DataSelectionError(
        f"{where}: no text in the columns {columns}; give rows with 'text', with 'messages', or with "
        "'prompt' and 'completion'"
    )


def _value_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise DataSelectionError(f"{where}: {value!r} is neither a string nor a list of messages; fill or drop the row")
    return "\n".join(_message_text(message, f"{where}, message {i}") for i, message in enumerate(value))


def _message_text(message: Any, where: str) -> str:
    if isinstance(message, Mapping):
        content = message.get("content")
        if content is None:
            return ""  # an assistant turn that only calls tools has no content
        if isinstance(content, str):
            return content
        if isinstance(content, (list, tuple)):
            texts = [part.get("text") for part in content if isinstance(part, Mapping)]
            return "\n".join(text for text in texts if isinstance(text, str))
    raise DataSelectionError(f"{where}: {message!r} is no message; give mappings with 'role' and 'content'")


def item_text(item: Any, where: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        return row_text(item, where)
    raise DataSelectionError(f"{where}: {item!r} is a {type(item).__name__}; give strings or rows (mappings)")


def read_rows(path: str | os.PathLike[str], name: str = "data", text_only: bool = False) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.parquet` or `.txt` file (one {"text": line} a line), each with its place, which
    names file and line for error messages. With `text_only` a parquet file gives only the columns of `row_text`.

    Raises:
        DataSelectionError: as in `read_texts`.
    """
    path = checked_file(path, name)
    kind = file_kind(path)
    if kind == ".jsonl":
        return _jsonl_rows(path)
    return _txt_rows(path) if kind == ".txt" else _parquet_rows(path, text_only)


def checked_file(path: str | os.PathLike[str], name: str) -> Path:
    """The path of a file that is there and of a known kind.

    Raises:
        DataSelectionError: it is not.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise DataSelectionError(
            f"{name}: {str(path)!r} does not end in one of {', '.join(SUFFIXES)}; convert the file, or pass "
            "texts as a list of strings"
        )
    if not path.is_file():
        raise DataSelectionError(f"{name}: there is no file {str(path)!r} (looked in {Path.cwd()})")
    return path


def file_kind(path: Path) -> str:
    """ ".jsonl", ".txt" or ".parquet": the suffix, of a compressed file the one before."""
    return path.suffixes[-2] if path.suffix in COMPRESSED else path.suffix


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, decompressed where its name says so."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=COMPRESSED[path.suffix]), 1 << 20)


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line of jsonl.

    Raises:
        DataSelectionError: it is none, or not UTF-8.
    """
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataSelectionError(f"{where}: not UTF-8: {error}; convert the file") from error
    except (ValueError, RecursionError) as error:  # bad JSON, brackets without end
        raise DataSelectionError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataSelectionError(f"{where}: a {type(row).__name__}, not an object; give one row a line")
    return row


def parse_text(line: bytes, where: str) -> str:
    """The text of one line of a text file.

    Raises:
        DataSelectionError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataSelectionError(f"{where}: not UTF-8: {error}; convert the file") from error


def unreadable(path: Path, error: Exception) -> DataSelectionError:
    """What to say of a file that breaks off or is damaged."""
    return DataSelectionError(f"{path}: cannot be read: {error}; the file is damaged or cut short, copy it again")


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                yield line, f"{path}:{number}"
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for line, where in _lines(path):
        if line.strip():
            yield parse_row(line, where), where


def _txt_rows(path: Path) -> Iterator[Row]:
    for line, where in _lines(path):
        yield {"text": parse_text(line, where)}, where


def _parquet_rows(path: Path, text_only: bool) -> Iterator[Row]:
    with open_parquet(path) as file:
        columns = text_columns(file.schema_arrow.names, str(path)) if text_only else None
        number = 0
        try:
            for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
                for row in batch.to_pylist():
                    yield row, f"{path}, row {number}"
                    number += 1
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`.

    Raises:
        DataSelectionError: it is none.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataSelectionError(f"{path}: not a parquet file: {error}") from error


def _dataset_texts(dataset: Any, name: str) -> Iterator[str]:
    columns = text_columns(dataset.column_names, name)
    plain = dataset.with_format(None).select_columns(columns)
    number = 0
    for batch in plain.iter(ROWS_PER_READ):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield row_text(dict(zip(columns, values, strict=True)), f"{name}, row {number}")
            number += 1


def is_dataset(source: Any) -> bool:
    """Whether the source is a `datasets.Dataset`."""
    # Whoever holds a Dataset has imported datasets; importing it here would cost everyone else a second.
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset)


def is_dataset_dict(source: Any) -> bool:
    """Whether the source is a `datasets.DatasetDict` or `IterableDatasetDict`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict))


def _is_path_list(source: Any) -> bool:
    if not isinstance(source, (list, tuple)) or not source:
        return False
    return all(
        isinstance(item, os.PathLike)
        or (isinstance(item, str) and item.endswith(SUFFIXES) and len(item.splitlines()) == 1)
        for item in source
    )


def _wrong_kind(source: Any, name: str) -> str:
    if isinstance(source, Mapping):
        return f"{name} is a mapping with the keys {list(source)}; pass one split, or a list of rows"
    return (
        f"{name} is a {type(source).__name__}; pass a list of strings, a datasets.Dataset, or a path or list "
        f"of paths to {', '.join(SUFFIXES)} files"
    )
