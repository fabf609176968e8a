"""Where texts come from: lists, datasets and files, all read as one stream of strings in a fixed order."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

# One path, several paths, a datasets.Dataset, or an iterable of strings or rows.
TextSource: TypeAlias = str | os.PathLike[str] | Iterable[Any]
# A row of a file and where it stands, "pool.jsonl:12".
Row: TypeAlias = tuple[dict[str, Any], str]

SUFFIXES = (".jsonl", ".parquet", ".txt")
ROWS_PER_READ = 1000


class DataSelectionError(ValueError):
    """Data cannot be read, weighed or picked as asked; the message names the value and says what to do."""


def read_texts(source: TextSource, name: str = "texts") -> Iterator[str]:
    """The texts of `source`, one a row, in order, read as they are asked for.

    - A path, as string or Path: `.jsonl` (one object a line; blank lines are no rows), `.parquet`, or `.txt`
      (one text a line; blank lines are empty texts, so that row numbers are line numbers).
    - A list of paths: the files one after the other. Strings count as paths where every one of them ends in
      one of the three suffixes and is a single line.
    - A `datasets.Dataset`, or an iterable of rows or strings, `datasets.IterableDataset` among them.

    A row is a mapping; see `row_text` for the columns that are read.

    Args:
        source: as above.
        name: what the source is to the caller ("target", "raw"), for the error messages.

    Raises:
        DataSelectionError: the source is of another kind, a file is missing or of another suffix, a line is
            not JSON (file and line number are named), a column is missing, a text is no string.
    """
    if isinstance(source, (str, os.PathLike)):
        yield from _file_texts(Path(source), name)
    elif isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise DataSelectionError(_wrong_kind(source, name))
    elif type(source).__name__ == "DataFrame":
        # Iterating over a data frame gives its column names, which are strings: texts nobody meant.
        raise DataSelectionError(f"{name} is a DataFrame; pass its column of texts, or Dataset.from_pandas(frame)")
    elif _is_dataset(source):
        yield from _dataset_texts(source, name)
    elif _is_path_list(source):
        for path in source:
            yield from _file_texts(Path(path), name)
    else:
        for number, item in enumerate(source):
            yield _item_text(item, f"{name}, item {number}")


def source_name(source: TextSource, otherwise: str) -> str:
    """The file names of a source that is made of files, else `otherwise`."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).name
    if _is_path_list(source):
        return ", ".join(Path(path).name for path in source)
    return otherwise


def row_text(row: Mapping[str, Any], where: str) -> str:
    """One text from one row: its `text`; or the contents of its `messages`; or `prompt` and `completion`,
    each a string or a list of messages. Parts are joined by a newline; role names are left out.

    Raises:
        DataSelectionError: none of these columns is there, or a value is neither text nor messages.
    """
    parts = [_value_text(row[column], f"{where}, column {column!r}") for column in _text_columns(row, where)]
    return "\n".join(parts)


def _text_columns(columns: Iterable[str], where: str) -> list[str]:
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


def _item_text(item: Any, where: str) -> str:
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
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataSelectionError(
            f"{name}: {str(path)!r} does not end in one of {', '.join(SUFFIXES)}; convert the file, or pass "
            "texts as a list of strings"
        )
    if not path.is_file():
        raise DataSelectionError(f"{name}: there is no file {str(path)!r} (looked in {Path.cwd()})")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    return _txt_rows(path) if path.suffix == ".txt" else _parquet_rows(path, text_only)


def _file_texts(path: Path, name: str) -> Iterator[str]:
    for row, where in read_rows(path, name, text_only=True):
        yield row_text(row, where)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
                raise DataSelectionError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataSelectionError(f"{path}:{number}: a {type(row).__name__}, not an object; give one row a line")
            yield row, f"{path}:{number}"


def _txt_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield {"text": line.decode("utf-8").rstrip("\r\n")}, f"{path}:{number}"
            except UnicodeDecodeError as error:
                raise DataSelectionError(f"{path}:{number}: not UTF-8: {error}; convert the file") from error


def _parquet_rows(path: Path, text_only: bool) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataSelectionError(f"{path}: not a parquet file: {error}") from error
    with file:
        columns = _text_columns(file.schema_arrow.names, str(path)) if text_only else None
        number = 0
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
            for row in batch.to_pylist():
                yield row, f"{path}, row {number}"
                number += 1


def _dataset_texts(dataset: Any, name: str) -> Iterator[str]:
    columns = _text_columns(dataset.column_names, name)
    plain = dataset.with_format(None).select_columns(columns)
    number = 0
    for batch in plain.iter(ROWS_PER_READ):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield row_text(dict(zip(columns, values, strict=True)), f"{name}, row {number}")
            number += 1


def _is_dataset(source: Any) -> bool:
    # Whoever holds a Dataset has imported datasets; importing it here would cost everyone else a second.
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.Dataset)


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
