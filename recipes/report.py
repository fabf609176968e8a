"""The end of a run on the terminal: what was selected, what was learned, and what the heuristics get."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .chain import Run
from .figures import COLUMNS, cells, check_name, heuristic_name, model_name, number
from .names import is_control, order, parts
from .verify import verification

# The solution stands in the lines of changes; as a column it would make the table wider than most terminals.
SHOWN = {key: heading for key, heading in COLUMNS.items() if key != "solution"}
FILE_WIDTH = 120  # of a pipe or a file, which has none of its own; the widest table needs 118


def print_report(run: Run) -> None:
    # Sources and folders are shown as they are written, brackets and colons too.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    stages = run.record["stages"]
    for name in sorted((name for name in stages if not is_control(name)), key=order):
        found, kind = stages[name], parts(name).kind
        if kind == "dedup":
            console.print(_dedup(name, found), highlight=False)
        elif kind == "select" and "sources" in found:
            console.print(_selection(name, found))
        elif kind == "rl" and found["reward"]:
            console.print(_reward(name, found))
        elif kind == "verify":
            _print_verified(console, name, verification(run.path, name))
    seconds = sum(stage["seconds"] for stage in stages.values())
    console.print(f"run folder: {run.path}", soft_wrap=True, highlight=False)
    if run.adapter.is_dir():
        console.print(f"adapter:    {run.adapter}", soft_wrap=True, highlight=False)
    console.print(f"time:       {seconds / 60:.1f} min in {len(stages)} stages", highlight=False)


def _print_verified(console: Console, name: str, result: dict[str, Any]) -> None:
    console.print(_verification(name, result))
    for change in result["changes"]:
        console.print(_change(change), highlight=False)
    if result.get("checks"):
        console.print(_checks(result["checks"]))


def _dedup(name: str, found: dict[str, Any]) -> str:
    why = ", ".join(f"{count} {kind}" for kind, count in found["left_out"].items())
    return f"{name}: {found['kept']} of {found['rows']} rows kept" + (f"; left out: {why}" if why else "")


def _selection(name: str, select: dict[str, Any]) -> Table:
    sources = select["sources"]
    table = Table(title=f"{name}: {select['n']} of {select['pool']} rows", title_justify="left")
    table.add_column("source")
    for column in ("pool", "selected", "random control"):
        table.add_column(column, justify="right")
    for source in sorted(sources["pool"], key=lambda name: (-sources["selected"].get(name, 0), name))[:8]:
        table.add_row(source, *(str(sources[part].get(source, 0)) for part in ("pool", "selected", "control")))
    if "kl_reduction" not in select:  # adapt_inf has no target
        return table
    kl = select["kl_reduction"]
    table.add_row("KL to the target, reduced by (nats)", "", f"{kl['selected']:.2f}", f"{kl['control']:.2f}")
    return table


def _reward(name: str, rl: dict[str, Any]) -> str:
    first, last = rl["reward"]["first"], rl["reward"]["last"]
    return (
        f"{name}: mean reward {first['mean']:.2f} over the first {first['steps']} steps, {last['mean']:.2f} over the "
        f"last {last['steps']}"
    )


def _verification(name: str, result: dict[str, Any]) -> Table:
    task = result["task"]
    low, high = task["n"]
    title = (
        f"{name}: {result['instances']} held-out {task['name']} instances, n {low} to {high}; 95 % intervals; "
        f"weights {result['weights']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in SHOWN.values():
        table.add_column(column, justify="right")
    for name, scores in result["models"].items():
        table.add_row(model_name(name), *cells(scores, SHOWN), style="bold" if name != "base" else None)
    table.add_section()
    for name, scores in result["heuristics"].items():
        table.add_row(heuristic_name(name), *cells(scores, SHOWN))
    return table


def _change(change: dict[str, Any]) -> str:
    after, before = (model_name(change[key]) for key in ("to", "from"))
    interval = f"[{change['low']:+.2f}, {change['high']:+.2f}]"
    line = f"certificate, {after} less {before}: {change['value']:+.2f} {interval}, paired over {change['n']} instances"
    sure = change.get("solution")  # runs of older versions have none
    if sure is None:
        return line
    return f"{line}; solution {sure['value']:+.3f} [{sure['low']:+.3f}, {sure['high']:+.3f}]"


def _checks(results: list[dict[str, Any]]) -> Table:
    table = Table(title="checks: each stands for itself, see rlvr_report.json", title_justify="left")
    table.add_column("")
    for column in ("value", "threshold", "n", "verdict"):
        table.add_column(column, justify="right")
    for one in results:
        threshold = number(one["threshold"])
        table.add_row(check_name(one), number(one["value"], one["ci"]), threshold, str(one["n"]), one["verdict"])
    return table
