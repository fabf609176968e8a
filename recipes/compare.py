"""Reports of finished runs: the page of one, and several side by side."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..data_selection.selection import write_atomic
from .card import CARD, model_card
from .figures import COLUMNS, check_name, model_name, rate, storage
from .page import comparison_page, run_page
from .run_report import RunFiles, read_run, write_report
from .training import ADAPTER

PAGE = "report.html"


def publish(path: Path) -> Path:
    """Write a run folder's rlvr_report.json, report.html and, beside its adapter, the model card.

    Returns the page's path.

    Raises:
        RunError: it is no run folder, or a file of it is damaged.
    """
    run = read_run(path)
    write_report(run)
    page = path / PAGE
    write_atomic(page, run_page(run).encode())
    adapter = path / ADAPTER
    if (adapter / "adapter_config.json").is_file():
        write_atomic(adapter / CARD, model_card(run, adapter).encode())
    return page


def compare(paths: Sequence[Path], out: Path | None = None) -> None:
    """Print one table with a column a run; `out` gets it as a page too."""
    runs = [read_run(path) for path in paths]
    names = [str(path) if len({p.name for p in paths}) < len(paths) else path.name for path in paths]
    rows = comparison(runs, names)
    table = Table(title="runs side by side; certificates with 95 % intervals", title_justify="left")
    for number, cell in enumerate(rows[0]):
        table.add_column(cell, justify="left" if not number else "right")
    for row in rows[1:]:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)
    if out:
        write_atomic(out, comparison_page(runs, rows).encode())


def comparison(runs: Sequence[RunFiles], names: Sequence[str]) -> list[list[str]]:
    """The table as rows of text, the header first; what a run does not have is left empty."""
    columns = [_column(run) for run in runs]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    return [["", *names], *([label, *(column.get(label, "") for column in columns)] for label in labels)]


def _column(run: RunFiles) -> dict[str, str]:
    base = run.recipe["base"]
    found = {"base model": f"{base['model']}, {storage(base) or 'unquantised'}", "seed": str(run.record["seed"])}
    for name, stage in run.stages.items():
        if "steps" in stage:
            found[f"{name}: steps"] = str(stage["steps"])
        if stage.get("trainable_parameters"):
            found["trained parameters"] = f"{stage['trainable_parameters']:,}"
        if stage.get("reward"):
            found[f"{name}: mean reward, first and last quarter"] = " to ".join(
                f"{stage['reward'][part]['mean']:.2f}" for part in ("first", "last")
            )
    if run.verify:
        task = run.verify["task"]
        found["task"] = f"{task['name']}, n {task['n'][0]} to {task['n'][1]}, {run.verify['instances']} instances"
        for name, scores in run.verify["models"].items():
            for key, heading in COLUMNS.items():
                if key in scores:
                    found[f"{heading}, {model_name(name)}"] = rate(scores[key])
    for one in run.report["checks"]:
        value = "" if one["value"] is None else f" {one['value']:.2f}"
        found[f"{check_name(one)} ({one['stage']})"] = one["verdict"] + value
    found["minutes"] = f"{sum(stage['seconds'] for stage in run.stages.values()) / 60:.1f}"
    return found
