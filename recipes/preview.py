"""What `check` shows of a recipe without faults: the adapters, and a row of each training stage."""

from typing import Any

from rich.console import Console
from rich.text import Text

from .links import fresh_adapter
from .rendered import Rendered, rendered_rows
from .schema import Recipe, Rl, Sft
from .targets import targets_of

TRAINED = "bold green"


def print_preview(recipe: Recipe) -> None:
    """On a terminal trained tokens are coloured; elsewhere they stand between [[ and ]]."""
    console = Console(highlight=False, soft_wrap=True)
    for line in adapter_lines(recipe):
        console.print(Text(line))
    for row in rendered_rows(recipe):
        console.print(styled(row) if console.is_terminal else Text(row.plain()))


def adapter_lines(recipe: Recipe) -> list[str]:
    lines = []
    for name, stage in zip(recipe.names, recipe.stages, strict=True):
        trains = isinstance(stage, Sft | Rl)
        adapter: Any = fresh_adapter(recipe, stage) if trains else getattr(stage, "adapter", None)
        targets = None if adapter is None else targets_of(recipe.base, adapter)
        if targets is not None:
            first, *others = targets.lines()
            lines += [f"{name} adapter: {first}", *others]
    return lines


def styled(row: Rendered) -> Text:
    text = Text(row.title + "\n", style="bold")
    for piece, trained in row.shortened():
        text.append(piece, TRAINED if trained else "not bold dim")
    return text
