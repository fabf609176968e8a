"""What the report says of the rows: copies that were taken out, what was selected, what was learned over a sequence of
datasets."""

import heapq
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..data_selection import DataSelectionError, Selection
from ..data_selection.texts import row_text
from ..rl.checks.svg import lines
from .dedup import kept_rows, removed_rows
from .html_parts import grid, plain, table, whose
from .names import parts
from .run_report import RunFiles
from .select import SELECTED
from .selection_pictures import selection_pictures

SHOWN = 300  # characters of a row's text
CLUSTERS_SHOWN = 12
PAIRS_SHOWN = 4


def copies(run: RunFiles, texts: bool) -> Iterator[str]:
    """What the dedup stages left out."""
    for stage in run.names("dedup"):
        found = run.stages[stage]
        yield f"<h2>Copies taken out{whose(stage, run.names('dedup'))}</h2>"
        yield f"<p>{found['kept']:,} of {found['rows']:,} rows stay; method {escape(str(found['method']))}. "
        yield f"{found['clusters']:,} of them had copies, one as many as {max(found['largest_cluster'] - 1, 0):,}.</p>"
        if found["left_out"]:
            yield table(["left out", "rows"], [[kind, f"{count:,}"] for kind, count in found["left_out"].items()])
        sources = found["sources"]
        names = sorted(sources["pool"], key=lambda name: (-sources["pool"][name], name))[:12]
        rows = [[name, *(f"{sources[part].get(name, 0):,}" for part in ("pool", "kept"))] for name in names]
        yield table(["source", "rows", "stay"], rows)
        if texts:
            yield from _pairs(run.path / stage)


def _pairs(folder: Path) -> Iterator[str]:
    """The removed rows that are least like the row that stays in their place."""
    try:
        near = [row for row in removed_rows(folder) if row.get("similarity", 1.0) < 1.0]
        shown = heapq.nsmallest(PAIRS_SHOWN, near, key=lambda row: row["similarity"])
        wanted = {row["kept_line"] for row in shown}
        kept = {line: row for line, row in enumerate(kept_rows(folder), start=1) if line in wanted}
    except OSError:
        return
    if shown:
        yield "<h3>The least alike</h3><p>Of the rows that were left out; first what stays, then the row itself.</p>"
    for row in shown:
        said = f"row {row['row']}: {row['copy']} copy of row {row['duplicate_of']}, similarity {row['similarity']:.2f}"
        both = "\n\n".join(_cut(text) for text in (row_text(kept[row["kept_line"]], "kept"), row["text"]))
        yield f"<details><summary>{escape(said)}</summary><pre>{escape(both)}</pre></details>"


def selection(run: RunFiles, texts: bool) -> Iterator[str]:
    picked = [name for name in run.names("select") if "sources" in run.stages[name]]
    for name in picked:
        yield f"<h2>Selected data{whose(name, picked)}</h2>"
        yield from _selected(run, name, texts)


def _selected(run: RunFiles, stage: str, texts: bool) -> Iterator[str]:
    select = run.stages[stage]
    sources = select["sources"]
    yield f"<p>{select['n']:,} of {select['pool']:,} rows by {escape(str(select['method']))}; what was picked, by "
    yield "source, beside a random pick of the same size.</p>"
    names = sorted(sources["pool"], key=lambda name: (-sources["selected"].get(name, 0), name))[:12]
    rows = [[name, *(f"{sources[part].get(name, 0):,}" for part in ("pool", "selected", "control"))] for name in names]
    if "kl_reduction" in select:
        kl = select["kl_reduction"]
        rows.append(["nearer to the target by (nats)", "", f"{kl['selected']:.2f}", f"{kl['control']:.2f}"])
    yield table(["source", "pool", "selected", "random control"], rows)
    drawn = selection_pictures(run.path / stage)
    if drawn:
        yield "<h3>Clusters and scores</h3>"
        yield "<p>The two directions in which the pool's gradients differ most; each cluster's selector is the score "
        yield "that tells its rows apart best.</p>"
        yield grid([f"<figure>{picture}</figure>" for picture in drawn])
    if texts:
        yield from _picked_texts(run.path / stage)


def sequence(run: RunFiles) -> Iterator[str]:
    """What was learned and forgotten over a sequence of datasets, by Adapt-inf and by its controls."""
    runs = {name: stage["lifelong"] for name, stage in run.stages.items() if "lifelong" in stage}
    if not runs:
        return
    yield "<h2>Over the datasets</h2>"
    yield "<p>All trained for as many steps. probability: of an answer token, the geometric mean; accuracy: answers "
    yield "given word for word. Gain: in per cent of the model before training. Forgotten: lost since each skill's "
    yield "best, in per cent.</p>"
    body = []
    for name, one in runs.items():
        for measure, found in one["measures"].items():
            numbers = [found[key] for key in ("final", "relative_gain", "forgetting")]
            body.append([f"{_policy(name)}, {measure}", *("" if n is None else f"{n:.3g}" for n in numbers)])
    yield table(["", "mean at the end", "relative gain", "forgotten"], body)
    for measure in next(iter(runs.values()))["measures"]:
        skills = next(iter(runs.values()))["skills"]
        figures = []
        for place, skill in enumerate(skills):
            series = {
                _policy(name): [(t, row[place]) for t, row in enumerate(one["measures"][measure]["matrix"])]
                for name, one in runs.items()
            }
            figures.append(f"<figure>{lines(f'{measure}: {skill}', series, 'datasets learned')}</figure>")
        yield grid(figures)


def _policy(stage: str) -> str:
    found = parts(stage)
    return (found.control or "adapt_inf") + (f" ({found.stage})" if found.number > 1 else "")


def _picked_texts(folder: Path) -> Iterator[str]:
    """Some of what was picked, each with its reason: by weight the best and the last, else one of each cluster."""
    try:
        picked = Selection.load(folder / "selection")
        texts = (folder / SELECTED).read_text(encoding="utf-8").splitlines()
    except (DataSelectionError, OSError):
        return
    scored = [i for i, reason in enumerate(picked.reasons) if isinstance(reason.get("log_weight"), float)]
    order = sorted(scored, key=lambda i: -picked.reasons[i]["log_weight"])
    of_cluster = {str(reason["cluster"]): i for i, reason in enumerate(picked.reasons) if "cluster" in reason}
    if not (order or of_cluster) or len(texts) != len(picked):
        return
    places = [*order[:2], order[len(order) // 2], order[-1]] if order else list(of_cluster.values())[:CLUSTERS_SHOWN]
    what = (
        "The two highest weights among the picks, the middle and the lowest." if order else "One pick of each cluster."
    )
    yield f"<h3>Why these</h3><p>{what}.</p>"
    for place in dict.fromkeys(places):
        reason = "; ".join(f"{key.replace('_', ' ')} {plain(value)}" for key, value in picked.reasons[place].items())
        shown = _cut(row_text(json.loads(texts[place]), SELECTED))
        row = int(picked.indices[place])
        yield f"<details><summary>row {row}: {escape(reason)}</summary><pre>{escape(shown)}</pre></details>"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."
