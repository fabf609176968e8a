"""The dedup stage: rows without copies.

The folder of the stage holds the rows that stay (`kept.jsonl`) and those that do not (`removed.jsonl`), each with the
kept row that it is a copy of and how similar they are; and what a stage that was cut goes on with: the rows as files
(`pool/`) and what was found to be copies (`duplicates/`). These are thrown away where a data file changed.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data_selection import Selection
from ..data_selection.duplicates import deduplicate
from ..data_selection.files import open_atomic
from ..data_selection.selection import write_atomic
from ..data_selection.texts import row_text
from .links import own_sources
from .pictures import located
from .pool import (
    INPUTS,
    KEPT,
    POOL,
    as_files,
    content_of,
    fed,
    file_inputs,
    read_if_there,
    rows_of_pool,
    write_row,
)
from .rows import Row, check_row, fingerprint
from .run_folder import RunError, RunFolder
from .schema import Recipe
from .schema_rows import Dedup
from .steps import Step

REMOVED, COPIES = "removed.jsonl", "duplicates"


def run_dedup(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Write the rows that stay, those that do not, and counts of both."""
    stage: Dedup = fed(step, run.path, "data")
    sources = own_sources(stage)
    groups = {"data": sources, **{f"against.{name}": given for name, given in stage.against.items()}}
    inputs = json.dumps(file_inputs(groups), indent=1)
    same = read_if_there(run.path / step.name / INPUTS) == inputs
    folder = run.begin(step.name, (INPUTS, POOL, COPIES) if same else ())
    write_atomic(folder / INPUTS, inputs.encode())

    pool = as_files(sources, folder / POOL / "data")
    run.add_data(f"{step.name} (all)", **content_of(pool))
    found = _copies(recipe, stage, folder, pool)
    of_sources, digest = _split(found, pool, folder)
    removed = found.details["left_out"]
    kept = found.pool_size - sum(removed.values())
    if not kept:
        raise RunError(f"{step.name}: no row is left ({removed}); look at 'against'")
    run.add_data(step.name, rows=kept, sha256=digest)
    counts = {"rows": found.pool_size, "kept": kept, "removed": found.pool_size - kept}
    run.log(step.name, 1, {**counts, **{f"removed/{kind}": count for kind, count in removed.items()}})
    clusters = {key: found.details[key] for key in ("clusters", "largest_cluster")}
    run.finish(step.name, **counts, left_out=removed, **clusters, method=stage.method, sources=of_sources)


def _copies(recipe: Recipe, stage: Dedup, folder: Path, pool: list[str]) -> Selection:
    """All rows; the reasons of those that go say why."""
    if (folder / COPIES / "selection.json").exists():
        return Selection.load(folder / COPIES)
    against = {
        name: as_files(given, folder / POOL / f"against-{number}")
        for number, (name, given) in enumerate(stage.against.items())
    }
    found = deduplicate(pool, **stage.rules(), against=against, report_only=True, seed=recipe.seed)
    found.save(folder / COPIES)
    return found


def _split(found: Selection, pool: list[str], folder: Path) -> tuple[dict[str, dict[str, int]], str]:
    """Write both files in one reading of the rows. Returns how many rows of each source there are and stay, and the
    fingerprint of those that stay."""
    stays = np.array(["copy" not in reason and "against" not in reason for reason in found.reasons], bool)
    lines = np.cumsum(stays)  # (rows,) the line in `kept.jsonl`, from 1, of a row that stays
    counts: dict[str, Counter[str]] = {"pool": Counter(), "kept": Counter()}
    row = -1
    with open_atomic(folder / KEPT) as kept, open_atomic(folder / REMOVED) as removed:
        for row, content in enumerate(rows_of_pool(pool)):
            if row >= found.pool_size:
                break
            where = f"row {row + 1} of the data"
            check_row(content, where)
            counts["pool"][str(content["source"])] += 1
            if stays[row]:
                counts["kept"][str(content["source"])] += 1
                write_row(kept, content, folder)
            else:
                why = {"row": row, **_why(found.reasons[row], lines), "text": row_text(content, where)}
                write_row(removed, why, folder)
    if row + 1 != found.pool_size:
        raise RunError(
            f"the data had {found.pool_size} rows and has {row + 1}: a file changed while it was read; run again"
        )
    return {name: dict(of) for name, of in counts.items()}, fingerprint(kept_rows(folder))


def _why(reason: Any, lines: Any) -> Row:
    """Of a row that goes."""
    if "against" in reason:
        return dict(reason)
    of = reason["cluster"]
    about = {"duplicate_of": of, "kept_line": int(lines[of])}
    return {**about, "copy": reason["copy"], "similarity": reason["similarity"]}


def kept_rows(folder: Path) -> Iterator[Row]:
    """The rows that stay, from the folder of a finished stage."""
    with (folder / KEPT).open(encoding="utf-8") as file:
        yield from (located(json.loads(line), folder) for line in file)


def removed_rows(folder: Path) -> Iterator[Row]:
    """Each row that does not stay, as `row`, its number from 0 among all rows, and `text`, with either `duplicate_of`,
    the number of the row that stays in its place, `kept_line`, that row's line in `kept.jsonl`, `copy` (exact, near or
    code) and `similarity`; or `against`, the name of the forbidden texts, `against_row` and `overlap`."""
    with (folder / REMOVED).open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)
