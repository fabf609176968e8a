"""The rows of a stage as files: those of its sources, or what a stage before it wrote."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..data_selection import Chunks
from ..data_selection.files import open_atomic
from ..data_selection.shards import NamedFiles
from ..data_selection.shards import fingerprint as file_fingerprint
from ..data_selection.texts import read_rows
from .names import parts
from .pictures import kept
from .rows import Row, source_rows, sourced
from .schema_sources import Columns, Source
from .steps import Step

INPUTS, POOL = "inputs.json", "pool"
KEPT, SELECTED = "kept.jsonl", "selected.jsonl"


def rows_file(run: Path, name: str) -> Path:
    """The rows that a finished dedup or select step hands on."""
    return run / name / (KEPT if parts(name).kind == "dedup" else SELECTED)


def fed(step: Step, run: Path, key: str) -> Any:
    """The stage of a step with the file of the rows that a stage before it made in the place of its sources."""
    if step.rows is None:
        return step.stage
    return step.stage.model_copy(update={key: [str(rows_file(run, step.rows))]})


def labelled(name: str, what: str) -> str:
    """How the record calls data of a step: as it is for the first of its kind."""
    found = parts(name)
    return what if found.stage == found.kind else f"{what} ({name})"


def file_inputs(groups: Mapping[str, Sequence[Source]]) -> dict[str, Any]:
    """What tells whether the files of some groups of sources are those of an earlier attempt."""
    paths = {name: [path for source in given if (path := path_of(source))] for name, given in groups.items()}
    return {name: file_fingerprint(found, name) for name, found in paths.items() if found}


def path_of(source: Source) -> str | None:
    return source if isinstance(source, str) else source.path if isinstance(source, Columns) else None


def as_files(sources: list[Source], made: Path) -> list[str]:
    """The sources as paths: a file that can be read as it is by its own, what is made or has a template of columns by
    that of a file in the stage's folder.

    Where that folder is must not matter to what is picked, so that the files are named by their place in the recipe.
    """
    paths = []
    for number, source in enumerate(sources):
        if isinstance(source, str):
            paths.append(source)
            continue
        path = Path(f"{made}-{number}.jsonl")
        if not path.exists():  # it is there whole or not at all
            with open_atomic(path) as file:
                for row in source_rows(source, made.name):
                    write_row(file, row, path.parent)
        paths.append(str(path))
    if all(isinstance(source, str) for source in sources):
        return paths
    return NamedFiles(paths, [f"{made.name}-{number}" for number in range(len(paths))])


def content_of(paths: list[str]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    return {"files": len(paths), "bytes": size, "sha256": digest.hexdigest()}


def rows_of_pool(pool: list[str], words: int | None = None) -> Iterator[Row]:
    """The rows of the pool, or their chunks; one without `source` has its file's path there."""
    first = 0
    for path in pool:
        if words is None:
            for row, _ in read_rows(path, "raw"):
                yield sourced(row, path)
            continue
        last = -1
        for piece in Chunks(path, words):
            last = int(piece["row"])
            yield sourced({**piece, "row": first + last}, path)
        first += last + 1


def write_row(file: BinaryIO, row: Row, folder: Path) -> None:
    """A line of a file in this folder."""
    file.write(json.dumps(kept(row, folder), default=str).encode() + b"\n")


def read_if_there(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
