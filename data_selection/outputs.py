"""What becomes of a selection: rows, files, a dataset on the Hub with a card that says how it was made."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .files import open_atomic
from .selection import Selection, files_state
from .texts import DataSelectionError, TextSource, checked_source, file_paths, is_dataset, read_rows, source_name

if TYPE_CHECKING:
    from .dsir import Dsir

DATA, CARD = "data/train.parquet", "README.md"
GROUP_ROWS = 10_000  # rows of a parquet file that are held at a time


def picked_rows(picked: Selection, pool: TextSource | None = None) -> Iterator[dict[str, Any]]:
    """As `Selection.rows`."""
    pool = picked.pool if pool is None else pool
    if pool is None:
        raise DataSelectionError(
            "this selection does not hold its pool (it was loaded, or made from an iterator); pass it"
        )
    _check_unchanged(picked, pool)
    chosen = np.zeros(picked.pool_size, bool)
    chosen[picked.indices] = True
    rows = 0
    for rows, row in enumerate(pool_rows(checked_source(pool, "pool")), start=1):
        if rows <= picked.pool_size and chosen[rows - 1]:
            yield dict(row) if not isinstance(row, str) else {"text": row}
    if rows != picked.pool_size:
        raise DataSelectionError(f"the pool had {picked.pool_size} rows and has {rows}; pass the one that was scored")


def _check_unchanged(picked: Selection, pool: TextSource) -> None:
    now = {path: rest for path, *rest in files_state(pool)}  # none where a file is gone, which its reader says
    changed = [path for path, *rest in picked._pool_state if now.get(path, rest) != rest]
    if changed:
        raise DataSelectionError(
            f"{', '.join(changed)} was changed after it was picked from, so that other rows may stand at the row "
            "numbers; pick again, or pass the pool that was scored"
        )


def pool_rows(pool: Any) -> Iterator[Any]:
    """The rows of a pool as they are, strings among them."""
    paths = file_paths(pool)
    for path in paths:
        for row, _ in read_rows(path, "pool"):
            yield row
    if not paths:
        yield from pool.with_format(None) if is_dataset(pool) else pool


def write_picked(picked: Selection, path: Path, pool: TextSource | None = None) -> None:
    """As `Selection.write`. Of types that JSON lacks, such as dates, `.jsonl` gets the string. The pool is read
    twice for `.parquet`, whose columns are those of all picked rows."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataSelectionError(f"{str(path)!r} must end in .jsonl or .parquet")
    with open_atomic(path) as file:
        if path.suffix == ".jsonl":
            for row in picked_rows(picked, pool):
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n")
        else:
            _write_parquet(picked, pool, file)


def _write_parquet(picked: Selection, pool: TextSource | None, file: BinaryIO) -> None:
    """The picked rows in groups, in two readings of the pool: the first finds the columns of all rows, since a pool
    may mix rows of several forms. Memory holds one group; of a pool that can be read once only, all picked rows."""
    import pyarrow
    from pyarrow import parquet

    held = list(picked_rows(picked, pool)) if isinstance(pool, Iterator) else None
    schema = pyarrow.schema([])
    try:
        for rows in _groups(picked_rows(picked, pool) if held is None else iter(held)):
            schema = pyarrow.unify_schemas([schema, _table(rows).schema], promote_options="permissive")
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for rows in _groups(picked_rows(picked, pool) if held is None else iter(held)):
                writer.write_table(_table(rows, schema))
    except pyarrow.ArrowException as error:
        raise DataSelectionError(
            f"the picked rows do not go into one parquet file: {error}; a column must hold one type, so change the "
            "rows, or write .jsonl"
        ) from error


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while group := list(islice(rows, GROUP_ROWS)):
        yield group


def _table(rows: list[dict[str, Any]], schema: Any = None) -> Any:
    """A `pyarrow.Table` of rows that need not have the same keys, with the columns of `schema` or of all rows."""
    import pyarrow

    names = dict.fromkeys(key for row in rows for key in row) if schema is None else schema.names
    types = {} if schema is None else {field.name: field.type for field in schema}
    arrays = {name: pyarrow.array([row.get(name) for row in rows], types.get(name)) for name in names}
    return pyarrow.table(arrays, schema=schema)


def push(
    picked: Selection,
    repo_id: str,
    pool: TextSource | None = None,
    *,
    dsir: "Dsir | None" = None,
    private: bool = True,
    token: str | None = None,
    api: Any = None,
) -> str:
    """Put the picked rows on the Hub as a dataset: `data/train.parquet`, the selection (`selection/`), and a card that
    says how they were picked, in one commit.

    Args:
        picked: the selection.
        repo_id: "user/name"; made where it is new.
        pool: where the selection does not hold its pool.
        dsir: the estimator; the card then names its settings and the KL reduction beside that of the random control.
        private: of a new dataset.
        token: of the Hub; default: the one that is logged in.
        api: a `huggingface_hub.HfApi` to use instead of a new one.

    Returns:
        The address of the commit.

    Raises:
        DataSelectionError: the pool cannot be read. Errors of the Hub come through as they are.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        write_dataset(picked, Path(folder), pool, dsir)
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message=f"{len(picked)} rows by krontune"
        )
    return str(commit.commit_url)


def write_dataset(picked: Selection, folder: Path, pool: TextSource | None = None, dsir: "Dsir | None" = None) -> None:
    """Write what `push` puts on the Hub into an empty folder."""
    write_picked(picked, folder / DATA, pool)
    picked.save(folder / "selection")
    (folder / CARD).write_text(card(picked, pool if picked.pool is None else picked.pool, dsir), encoding="utf-8")


def card(picked: Selection, pool: TextSource | None = None, dsir: "Dsir | None" = None) -> str:
    """The dataset card: where the rows are from, how they were picked, and what a random pick would have reached."""
    pool = picked.pool if pool is None else pool
    facts: dict[str, Any] = {
        "pool": "not recorded" if pool is None else source_name(pool, "texts in memory"),
        "rows of the pool": f"{picked.pool_size:,}",
        "rows picked": f"{len(picked):,}",
        "method": picked.method,
        "seed": picked.seed,
        **picked.details,
    }
    if dsir is not None:
        facts |= {"targets": ", ".join(dsir.target_names), **dsir.settings()}
        if picked.pool is not None:
            facts["KL reduction (nats)"] = f"{dsir.kl_reduction(picked):.4f}"
            facts["KL reduction of a random pick of equal size"] = f"{dsir.kl_reduction(picked.control):.4f}"
    how = "by importance resampling (DSIR, arXiv 2302.03169)" if dsir is not None else f"(method {picked.method})"
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {DATA}
tags:
- krontune
- data-selection
---

# Rows picked from a larger pool

krontune {version("krontune")} picked these rows {how}. The licence is that of the pool.
`selection/picks.jsonl` has the row number of each pick and why it was chosen.

| | |
| --- | --- |
{rows}

A pick that looks like its target does not make a better model by itself: train on a random pick of the same size too.
"""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
