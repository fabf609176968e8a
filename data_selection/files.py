"""Files that appear whole or not at all, and headers that say what they belong to."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .texts import DataSelectionError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, making its folder where needed."""
    with open_atomic(path) as file:
        file.write(content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends well: written beside it, flushed to the disk, renamed.

    The folder is flushed too, so that after a power cut the name leads to the old content or to the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle of a folder to flush
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: Path, kind: str, version: int = 1) -> dict[str, Any]:
    """The JSON header of a saved folder.

    Raises:
        DataSelectionError: it is missing, is no JSON object, or is of another kind or version.
    """
    try:
        header = json.loads(path.read_bytes())
    except OSError as error:
        raise DataSelectionError(f"cannot read {path}: {error.strerror}; give a folder that save() wrote") from error
    except ValueError as error:
        raise DataSelectionError(f"{path} is not JSON: {error}; save again") from error
    found = (header.get("format"), header.get("version")) if isinstance(header, dict) else None
    if found != (kind, version):
        raise DataSelectionError(f"{path} holds {found}; this version reads ({kind!r}, {version})")
    return header


def read_checked(path: Path, crc32: int) -> bytes:
    """The bytes of a saved file.

    Raises:
        DataSelectionError: it is missing, or its checksum is not the one that its header holds.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataSelectionError(f"cannot read {path}: {error.strerror}; save the folder again") from error
    if zlib.crc32(content) != crc32:
        raise DataSelectionError(f"{path} does not belong to the header beside it (a save was cut short?); save again")
    return content
