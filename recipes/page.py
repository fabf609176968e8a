"""report.html: one run, or several, as one file of HTML with its pictures inside, for screens small and large and for
paper. It asks nothing of the network. Whatever comes from a run goes through `html.escape`."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from ..rl.checks import CheckResult
from ..rl.checks.svg import lines, pictures
from .figures import ASKS, COLUMNS, cells, check_name, heuristic_name, model_name, number, storage
from .html_parts import curve, escaped, grid, plain, table, whose
from .names import is_control, order
from .page_rows import copies, selection, sequence
from .run_report import RunFiles

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --pass: #1a7f37; --warn: #9a6700; --fail: #c0322b }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
       background: #fff }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p, figcaption, small { color: var(--soft) } p { margin: .3rem 0 } small { white-space: nowrap }
figure { margin: .5rem 0; break-inside: avoid }
figure text { font-size: 14px } figure > svg { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto } .scroll > img { max-width: none }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .5rem 2rem }
table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; vertical-align: top }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left } tr.strong td { font-weight: 600 }
td:last-child, th:last-child { padding-right: 0 }
details { padding: .15rem 0 } summary { cursor: pointer; color: var(--soft) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.4 ui-monospace, monospace; margin: .3rem 0 }
.check { border-top: 1px solid var(--line); padding: .5rem 0; break-inside: avoid }
.check figure { max-width: 36rem }
.check h3 { margin: 0; display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap }
.verdict { font-size: .8rem; font-weight: 600; border: 1px solid currentColor; border-radius: .25rem;
           padding: 0 .4rem; white-space: nowrap }
.pass { color: var(--pass) } .warn { color: var(--warn) } .fail { color: var(--fail) } .not-run { color: var(--soft) }
.evidence { font-size: .85rem; overflow-x: auto } .evidence td { padding: .1rem .8rem .1rem 0; text-align: left }
.evidence td:first-child { color: var(--soft) }
@media print { body { max-width: none; font-size: 10pt; padding: 0 } h2 { break-after: avoid }
               .scroll { overflow: visible } .scroll > img { max-width: 100%; height: auto } }
"""
CREDIT = "credit.svg"  # what the verify stage calls its picture
PHASES = {"before": "Before training", "during": "During training", "after": "After training"}


def run_page(run: RunFiles, texts: bool = True) -> str:
    """The report of one run. texts: show some of the selected rows, with the reasons for them."""
    name = run.record["name"]
    about = run.recipe.get("description", "")
    return _page(
        name,
        [
            f"<h1>{escape(name)}</h1>",
            f"<p>{escape(about)}</p>" if about else "",
            f"<p>{escape(_facts(run))}</p>",
            *_models(run),
            *_training(run),
            *copies(run, texts),
            *selection(run, texts),
            *sequence(run),
            *_checks(run),
            *_credit(run),
            *_record(run),
        ],
    )


def comparison_page(runs: Sequence[RunFiles], rows: Sequence[Sequence[str]]) -> str:
    """Several runs side by side. rows: the first is the header."""
    head, *body = rows
    figures = []
    for key, kind in (("reward", "rl"), ("loss", "sft")):
        stages = {name for run in runs for name in run.names(kind) if not is_control(name)}
        for stage in sorted(stages, key=order):
            series = {name: run.series(stage, key) for name, run in zip(head[1:], runs, strict=True)}
            figures.append(curve(f"{key} of {stage}", series))
    return _page("comparison", ["<h1>Runs side by side</h1>", table(head, body), grid(figures)])


def _page(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            *filter(None, parts),
            "</body></html>\n",
        ]
    )


def _facts(run: RunFiles) -> str:
    base = run.recipe["base"]
    seconds = sum(stage["seconds"] for stage in run.stages.values())
    weights = f" in {storage(base)}" if storage(base) else ""
    facts = [f"{base['model']}{weights}", f"seed {run.record['seed']}", f"{seconds / 60:.1f} minutes"]
    trained = [stage for stage in run.stages.values() if "trainable_parameters" in stage]
    if trained:
        facts.append(f"{trained[-1]['trainable_parameters']:,} trained parameters")
    counts = {verdict: count for verdict, count in run.report["verdicts"].items() if count}
    if counts:
        facts.append("checks: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return "; ".join(facts)


# ---------------------------------------------------------------- models


def _models(run: RunFiles) -> Iterator[str]:
    if not run.verified:
        yield "<p>The verify stage has not run, so nothing is known of the models.</p>"
    for name, result in reversed(run.verified.items()):  # the last one is what the run came to
        yield f"<h2>Models{whose(name, run.verified)}</h2>"
        yield from _verified(result)


def _verified(result: Mapping[str, Any]) -> Iterator[str]:
    task = result["task"]
    low, high = task["n"]
    yield (
        f"<p>{escaped(result['instances'])} held-out {escaped(task['name'])} instances of {escaped(low)} to "
        f"{escaped(high)} rows, one greedy answer each; 95 % intervals; weights {escaped(result['weights'])}. "
        "Answer: the stated result is right. "
        "Certificate: the chosen rows are feasible and optimal. Gap: right answers that no certificate backs. "
        "Solution: how probably sampling writes the worked one.</p>"
    )
    rows = [[model_name(name), *cells(one)] for name, one in result["models"].items()]
    floors = [[heuristic_name(name), *cells(one)] for name, one in result["heuristics"].items()]
    yield table(["", *COLUMNS.values()], [*rows, *floors], strong=len(rows))
    samples = result.get("samples") or {}
    if samples:
        yield f"<h3>{escaped(max(next(iter(samples.values()))['pass_answer']['k']))} samples an instance</h3>"
        yield f"<p>Temperature {result['temperature']:g}. pass@k: one of k is right; con@k: the most frequent is.</p>"
        yield grid(_sample_curves(samples))


def _sample_curves(samples: Mapping[str, Any]) -> list[str]:
    figures = []
    for key, title in (
        ("pass_certificate", "pass@k, certificate"),
        ("pass_answer", "pass@k, answer"),
        ("con_certificate", "con@k, certificate"),
        ("con_answer", "con@k, answer"),
    ):
        series = {name: _points(one[key]) for name, one in samples.items()}
        bands = {
            name: list(zip(one[key]["k"], one[key]["low"], one[key]["high"], strict=True))
            for name, one in samples.items()
        }
        if all(len(points) > 1 for points in series.values()):
            figures.append(f"<figure>{lines(title, series, 'k', bands)}</figure>")
    return figures


def _points(curve: Mapping[str, Any]) -> list[tuple[float, float]]:
    return list(zip(curve["k"], curve["value"], strict=True))


# ---------------------------------------------------------------- training and selection


def _training(run: RunFiles) -> Iterator[str]:
    paid = run.names("rl")
    figures = [
        curve("loss of sft", {name: run.series(name, "loss") for name in run.names("sft")}),
        curve("mean reward of rl", {name: run.series(name, "reward") for name in paid}),
    ]
    for stage in (name for name in paid if not is_control(name)):
        figures.append(curve(f"samples of {stage}", _course(run, stage)))
    figures.append(curve("entropy of rl", {name: run.series(name, "entropy") for name in paid}))
    if any(figures):
        yield "<h2>Training</h2>"
        yield grid(figures)


def _course(run: RunFiles, stage: str) -> dict[str, list[tuple[float, float]]]:
    """What an rl stage logged of its samples, under the name that its task gives itself, whatever paid them."""
    keys = {"answer": "answer", "certificate": "optimal", "gap": "gap"}
    known = [key for line in run.metrics if line["stage"] == stage for key in line]
    return {
        name: run.series(stage, found)
        for name, key in keys.items()
        if (found := next((one for one in known if one.endswith(f"/all/{key}")), None))
    }


# ---------------------------------------------------------------- checks


def _checks(run: RunFiles) -> Iterator[str]:
    checks = run.report["checks"]
    if not checks:
        return
    yield "<h2>Checks</h2>"
    yield (
        "<p>Each stands for itself; there is no blended score. pass or fail: the whole 95 % interval lies on one side "
        "of the threshold; warn: it covers it, or the check says why. N counts instances.</p>"
    )
    for phase, title in PHASES.items():
        mine = [one for one in checks if one["phase"] == phase]
        for group, some in groupby(mine, lambda one: (one["stage"], one["model"]) if one["phase"] == "after" else None):
            stage, model = group or ("", None)
            about = f": {escape(model_name(model))}{whose(stage, run.verified)}" if model else ""
            yield f"<h3>{title}{about}</h3>"
            yield from map(_check, some)


def _check(one: Mapping[str, Any]) -> str:
    fields = {key: one[key] for key in ("name", "value", "ci", "n", "threshold", "verdict", "details")}
    # The models' pass@k curves stand together above.
    drawn = {} if one["name"] == "base_vs_tuned" else pictures([CheckResult(**fields)])
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn.values())
    said = [f"{number(one['value'], one['ci'])}"] if one["value"] is not None else []
    said += [f"threshold {number(one['threshold'])}"] if one["threshold"] is not None else []
    said += [f"N {one['n']}"] if one["n"] else []
    if one["details"].get("crossing") and "models" in one["details"]:
        said.append(f"{one['details']['models'][0]} is ahead from k = {one['details']['crossing']}")
    said += [one["details"]["reason"]] if one["verdict"] == "not run" and "reason" in one["details"] else []
    stage = f" ({one['stage']})" if one["phase"] == "during" else ""
    verdict = escaped(one["verdict"])
    return (
        f'<div class="check"><h3>{escape(check_name(one))}{escape(stage)} '
        f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span></h3>'
        f"<p>{escape(ASKS.get(one['name'], ''))}</p><div>{escape('; '.join(said))}</div>{figures}"
        f'<details><summary>evidence</summary><div class="evidence">{_evidence(one["details"])}</div></details></div>'
    )


def _evidence(value: Any) -> str:
    """Nested values as nested tables; what looks like a measured rate as one number with its interval."""
    if isinstance(value, Mapping):
        if set(value) == {"value", "ci", "n"}:
            return escape(f"{number(value['value'], value['ci'])}, N {value['n']}")
        body = "".join(
            f"<tr><td>{escape(str(key).replace('_', ' '))}</td><td>{_evidence(item)}</td></tr>"
            for key, item in value.items()
        )
        return f"<table>{body}</table>" if body else "none"
    if isinstance(value, list):
        if any(isinstance(item, Mapping | list) for item in value):
            return "<br>".join(_evidence(item) for item in value)
        return escape(", ".join(map(plain, value))) or "none"
    return escape(plain(value))


def _credit(run: RunFiles) -> Iterator[str]:
    for name, result in run.verified.items():
        picture = run.path / name / CREDIT
        if result.get("credit_picture") != CREDIT or not picture.is_file() or picture.is_symlink():
            continue
        yield f"<h2>Token credit on one answer{whose(name, run.verified)}</h2>"
        yield (
            "<p>WAAD: how far back each token looks; FAI: how much later tokens look at it. Anchors and preplan tokens "
            "are those that the credit favours.</p>"
        )
        # As an image: a browser runs no script of it and fetches nothing for it.
        packed = base64.b64encode(picture.read_bytes()).decode()
        yield f'<div class="scroll"><img alt="token credit" src="data:image/svg+xml;base64,{packed}"></div>'


# ---------------------------------------------------------------- the record


def _record(run: RunFiles) -> Iterator[str]:
    yield "<h2>Record</h2>"
    rows = [
        [
            name,
            f"{stage['seconds']:.0f}",
            str(stage.get("steps", "")),
            ((stage.get("git") or {}).get("commit") or "")[:10],
        ]
        for name, stage in run.stages.items()
    ]
    yield table(["stage", "seconds", "steps", "commit"], rows)
    data = [[name, _size(one), one["sha256"][:16]] for name, one in run.record.get("data", {}).items()]
    if data:
        yield table(["data", "size", "sha256"], data)
    versions = ", ".join(f"{name} {value}" for name, value in run.record.get("versions", {}).items())
    machine = ", ".join(map(str, run.record.get("machine", {}).values()))
    yield f"<p>{escape(versions)}</p><p>{escape(machine)} CPUs</p>"
    yield f"<details><summary>the recipe</summary><pre>{escape(run.recipe_text)}</pre></details>"


def _size(data: dict[str, Any]) -> str:
    """Rows, or of files that were never held whole their bytes."""
    return f"{data['rows']:,} rows" if "rows" in data else f"{data['bytes']:,} bytes in {data['files']} files"
