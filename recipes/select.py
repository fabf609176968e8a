"""The select stage: which rows of the pool to train on.

The folder of the stage holds what was picked (`selected.jsonl`, `selection/`), the random control (`control.jsonl`), a
report, and what a stage that was cut goes on with: the pool as files (`pool/`), what was found to be copies
(`duplicates/`), the estimator (`dsir/`) and the scores (`scores/`). These are thrown away where a data file changed.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data_selection import Chunks, Dsir, Selection
from ..data_selection.duplicates import deduplicate
from ..data_selection.files import open_atomic
from ..data_selection.outputs import pool_rows
from ..data_selection.report import selection_report, write_report
from ..data_selection.selection import write_atomic
from .links import own_sources, sources_behind
from .pictures import located
from .pool import (
    INPUTS,
    POOL,
    SELECTED,
    as_files,
    content_of,
    fed,
    file_inputs,
    labelled,
    path_of,
    read_if_there,
    rows_of_pool,
    write_row,
)
from .rows import Row, check_row, fingerprint
from .run_folder import RunError, RunFolder
from .schema import Recipe
from .schema_rows import Neural, Select
from .schema_sources import Source
from .steps import Step

CONTROL, BALANCED = "control.jsonl", "balanced.jsonl"
COPIES, ESTIMATOR, SCORES = "duplicates", "dsir", "scores"


def run_select(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Write the picked rows, the random control, why each row was picked, and the report."""
    name, written = step.name, step.stage
    assert isinstance(written, Select)
    behind = sources_behind(recipe, written)
    stage: Select = fed(step, run.path, "raw")
    inputs = json.dumps(_inputs(stage), indent=1)
    same = read_if_there(run.path / name / INPUTS) == inputs
    folder = run.begin(name, (INPUTS, POOL, COPIES, ESTIMATOR, SCORES) if same else ())
    write_atomic(folder / INPUTS, inputs.encode())

    pool = as_files(own_sources(stage), folder / POOL / "raw")
    targets = {name: as_files(given, folder / POOL / f"target-{n}") for n, (name, given) in _targets(stage).items()}
    target: Any = targets if stage.targets is not None else targets["target"]
    run.add_data(labelled(name, "raw"), **content_of(pool))
    run.add_data(labelled(name, "target"), **content_of([path for paths in targets.values() for path in paths]))

    unique = _unique(recipe, stage, folder, pool, targets)
    if unique is not None and not stage.duplicates.report_only:  # type: ignore[union-attr]
        pool = [_kept_rows(pool, unique, folder / POOL / "kept.jsonl")]
    dsir = _fitted(recipe, stage, folder, target, pool)
    picked = _picked(recipe, stage, behind, folder, dsir, target, pool)
    if unique is not None:
        picked = _with_copies(picked, unique, stage)

    picked.save(folder / "selection")
    sources, digest = _write_picks(picked, pool, stage.chunk_words, folder)
    run.add_data(labelled(name, "selected"), rows=len(picked), sha256=digest)
    if stage.report:
        write_report(selection_report(dsir, picked, target=target, out_dir=folder / SCORES), folder)
    facts = {
        **picked.summary(),
        "kl_reduction": {"selected": dsir.kl_reduction(picked), "control": dsir.kl_reduction(picked.control)},
        "sources": sources,
    }
    if unique is not None:
        facts["duplicates"] = {"pool": unique.pool_size, "kept": len(unique), **unique.details}
    if stage.push is not None:
        facts["pushed"] = _pushed(name, picked, stage.push, behind, dsir)
    run.finish(name, **facts)


def _pushed(name: str, picked: Selection, repo: str, sources: list[Source], dsir: Dsir) -> str:
    try:
        return picked.push_to_hub(repo, pool=_Published(picked, sources), dsir=dsir)
    except Exception as error:  # the Hub's and the network library's own errors, which differ between their versions
        raise RunError(
            f"{name}: the picks are written, but were not pushed to {repo!r}: {' '.join(str(error).split())}; "
            "look at the network and at your login, then run again: it goes on with the scores that are there"
        ) from error


def selected_rows(run: RunFolder, name: str, control: str | None = None) -> list[Row]:
    """What the select stage of this name picked, or its control: "random", or of adapt_inf "balanced"."""
    file_name = {None: SELECTED, "random": CONTROL, "balanced": BALANCED}[control]
    with (run.path / name / file_name).open(encoding="utf-8") as file:
        return [located(json.loads(line), run.path / name) for line in file]


# ---------------------------------------------------------------- the data as files


def _targets(stage: Select) -> dict[int, tuple[str, list[Source]]]:
    named = stage.targets if stage.targets is not None else {"target": stage.target or []}
    return dict(enumerate(named.items()))


def _inputs(stage: Select) -> dict[str, Any]:
    """The files that the stage reads, by what they are for."""
    groups = {"raw": own_sources(stage), **{f"targets.{name}": given for name, given in _targets(stage).values()}}
    if stage.duplicates is not None:
        groups |= {f"against.{name}": given for name, given in stage.duplicates.against.items()}
    return file_inputs(groups)


class _Published:
    """The pool for the Hub: where `source` is a path of the recipe it is cut to the file's name, lest the folders of
    this machine are published. It can be read more than once."""

    def __init__(self, picked: Selection, sources: list[Source]) -> None:
        self.pool = picked.pool
        self.names = {path: Path(path).name for source in sources if (path := path_of(source))}

    def __iter__(self) -> Iterator[Row]:
        for row in pool_rows(self.pool):
            source = row.get("source")
            yield {**row, "source": self.names[source]} if source in self.names else row


# ---------------------------------------------------------------- the steps


def _kept_rows(pool: list[str], unique: Selection, path: Path) -> str:
    if not path.exists():
        kept = np.zeros(unique.pool_size, bool)
        kept[unique.indices] = True
        with open_atomic(path) as file:
            for row, keep in zip(rows_of_pool(pool), kept.tolist(), strict=True):
                if keep:
                    write_row(file, row, path.parent)
    return str(path)


def _unique(
    recipe: Recipe, stage: Select, folder: Path, pool: list[str], targets: dict[str, list[str]]
) -> Selection | None:
    """The rows that are no copies, with what they resemble; None where nobody asked."""
    if stage.duplicates is None:
        return None
    if (folder / COPIES / "selection.json").exists():
        return Selection.load(folder / COPIES)
    given = stage.duplicates
    against = {
        name: as_files(sources, folder / POOL / f"against-{number}")
        for number, (name, sources) in enumerate(given.against.items())
    }
    if given.against_target:
        against |= {"target" if name == "target" else f"target {name}": paths for name, paths in targets.items()}
    rules: dict[str, Any] = {**given.rules(), "report_only": given.report_only}
    found = deduplicate(pool, **rules, against=against, seed=recipe.seed)
    if not len(found):
        raise RunError(f"duplicates: no row of the pool is left ({found.details['left_out']}); look at 'against'")
    found.save(folder / COPIES)
    return found


def _fitted(recipe: Recipe, stage: Select, folder: Path, target: Any, pool: list[str]) -> Dsir:
    if (folder / ESTIMATOR / "dsir.json").exists():
        return Dsir.load(folder / ESTIMATOR)
    dsir = Dsir(**dsir_settings(stage)).fit(target=target, raw=pool, raw_sample=stage.raw_sample, seed=recipe.seed)
    dsir.save(folder / ESTIMATOR)
    return dsir


def dsir_settings(stage: Select) -> dict[str, Any]:
    """The arguments of `Dsir`."""
    return {name: getattr(stage, name) for name in Dsir.__dataclass_fields__}


def _picked(
    recipe: Recipe, stage: Select, sources: list[Source], folder: Path, dsir: Dsir, target: Any, pool: list[str]
) -> Selection:
    rules = {
        name: getattr(stage, name)
        for name in ("temperature", "tokens", "source_caps", "min_tokens", "max_tokens", "exclude_copies", "num_proc")
    }
    rules["source_caps"] = spelled_caps(stage, sources)
    rules |= {"method": stage.sampler, "seed": recipe.seed, "out_dir": folder / SCORES}
    if stage.engine == "ray":
        from ..data_selection.ray_engine import score_with_ray

        score_with_ray(dsir, pool, folder / SCORES, workers=stage.num_proc)
    if stage.neural is None:
        return dsir.select(pool, stage.k, **rules, proportions=stage.proportions)
    neural = make_neural(recipe, stage.neural)
    words = stage.chunk_words
    if isinstance(target, dict):  # check lets only one through
        [target] = target.values()
    sides = [Chunks(side, words) if words else side for side in (target, pool)]
    neural.fit(target=sides[0], raw=sides[1], raw_sample=stage.neural.raw_sample)
    return neural.select(pool, stage.k, dsir, stage.neural.alpha, **rules)


def spelled_caps(stage: Select, sources: list[Source]) -> dict[str, int | float] | None:
    """The caps, those on files with the path as one of the pool's sources spells it, which is the source of the file's
    rows."""
    if stage.source_caps is None:
        return None
    files = [path for source in sources if (path := path_of(source))]
    spelled = {str(Path(path)): path for path in files}
    return {
        source if source in files else spelled.get(str(Path(source)), source): cap
        for source, cap in stage.source_caps.items()
    }


def make_neural(recipe: Recipe, section: Neural) -> Any:
    """The `NeuralDsir` of a recipe."""
    from ..data_selection.neural import NeuralDsir

    return NeuralDsir(section.components, section.model, section.batch_size, recipe.seed)


def _with_copies(picked: Selection, unique: Selection, stage: Select) -> Selection:
    """With the row of the pool before copies were taken out, and what it stands for, in each reason. Chunks have the
    row of their text in the file instead."""
    if stage.chunk_words is not None:
        return picked
    reasons = [
        {**why, "pool_row": int(unique.indices[row]), **unique.reasons[row]}
        for row, why in zip(picked.indices.tolist(), picked.reasons, strict=True)
    ]
    return Selection(picked.indices, reasons, picked.pool_size, picked.seed, picked.method, picked.pool, picked.details)


def _write_picks(
    picked: Selection, pool: list[str], words: int | None, folder: Path
) -> tuple[dict[str, dict[str, int]], str]:
    """Write both files in one reading of the pool. Returns how many rows of each source there are, and the fingerprint
    of the picked rows."""
    marks = {SELECTED: np.zeros(picked.pool_size, bool), CONTROL: np.zeros(picked.pool_size, bool)}
    marks[SELECTED][picked.indices], marks[CONTROL][picked.control.indices] = True, True
    counts: dict[str, Counter[str]] = {"pool": Counter(), "selected": Counter(), "control": Counter()}
    rows = 0
    with open_atomic(folder / SELECTED) as selected, open_atomic(folder / CONTROL) as control:
        parts = (("selected", SELECTED, selected), ("control", CONTROL, control))
        for rows, row in enumerate(rows_of_pool(pool, words), start=1):
            if rows > picked.pool_size:
                break
            counts["pool"][str(row["source"])] += 1
            for part, name, file in parts:
                if marks[name][rows - 1]:
                    check_row(row, f"row {rows} of the pool")
                    counts[part][str(row["source"])] += 1
                    write_row(file, row, folder)
    if rows != picked.pool_size:
        raise RunError(
            f"the pool had {picked.pool_size} rows and has {rows}: a file changed while it was read; run again"
        )
    with (folder / SELECTED).open(encoding="utf-8") as file:
        digest = fingerprint(json.loads(line) for line in file)
    return {name: dict(found) for name, found in counts.items()}, digest
