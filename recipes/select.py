"""The select stage: which rows of the pool to train on."""

import json
from collections import Counter
from typing import Any

from ..data_selection import Dsir
from ..data_selection.selection import write_atomic
from .rows import Row, fingerprint, read_sources
from .run_folder import RunFolder
from .schema import Recipe, Select

SELECTED, CONTROL = "selected.jsonl", "control.jsonl"


def run_select(recipe: Recipe, stage: Select, run: RunFolder) -> None:
    """Write the picked rows, the random control, and why each row was picked."""
    folder = run.begin("select")
    raw, target = read_sources(stage.raw, "raw"), read_sources(stage.target, "target")
    run.add_data("raw", rows=len(raw), sha256=fingerprint(raw))
    run.add_data("target", rows=len(target), sha256=fingerprint(target))

    dsir = Dsir(stage.ngrams, stage.buckets, stage.smoothing, stage.normalize).fit(target=target, raw=raw)
    picked = dsir.select(raw, stage.k, stage.sampler, stage.temperature, recipe.seed)
    dsir.save(folder / "dsir")
    picked.save(folder / "selection")
    chosen = {"pool": raw, "selected": picked.apply(raw), "control": picked.control.apply(raw)}
    _write_rows(folder / SELECTED, chosen["selected"])
    _write_rows(folder / CONTROL, chosen["control"])
    run.add_data("selected", rows=len(picked), sha256=fingerprint(chosen["selected"]))
    run.finish(
        "select",
        **picked.summary(),
        kl_reduction={"selected": dsir.kl_reduction(picked), "control": dsir.kl_reduction(picked.control)},
        sources={name: dict(Counter(str(row.get("source")) for row in rows)) for name, rows in chosen.items()},
    )


def selected_rows(run: RunFolder, control: bool = False) -> list[Row]:
    """What the select stage picked, or its random control."""
    lines = (run.path / "select" / (CONTROL if control else SELECTED)).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write_rows(path: Any, rows: list[Row]) -> None:
    write_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())
