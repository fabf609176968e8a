"""Pieces of HTML that the report's sections are made of. Whatever comes from a run goes through `html.escape`."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from ..rl.checks.svg import lines


def curve(title: str, series: Mapping[str, list[tuple[float, float]]]) -> str:
    drawn = {name: points for name, points in series.items() if len(points) > 1}
    return f"<figure>{lines(title, drawn, 'step')}</figure>" if drawn else ""


def grid(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: int = 0) -> str:
    """A table that scrolls sideways on its own. An interval stands in small under its number."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = ""
    for place, row in enumerate(rows):
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row)
        body += f'<tr class="strong">{cells}</tr>' if place < strong else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    value, bracket, rest = text.partition(" [")
    return f"{escape(value)}<br><small>{escape(bracket.strip() + rest)}</small>" if bracket and rest else escape(text)


def escaped(value: Any) -> str:
    return escape(str(value))


def plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def whose(name: str, all_of_them: Collection[str]) -> str:
    """The name of the stage, where there are several."""
    return f" ({escape(name)})" if len(all_of_them) > 1 else ""
