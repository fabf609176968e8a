"""What a stage takes from the stages around it: rows, an adapter, a task. It is always the newest one before."""

from typing import Any

from .schema import Recipe, Rl, Sft, Stage, Verify
from .schema_model import Adapter
from .schema_rows import AdaptInfSelect, Dedup, Select
from .schema_sources import Source


def feeder(recipe: Recipe, stage: Stage) -> Any:
    """The dedup or select stage whose rows this one takes; None where it has sources of its own, or reads no rows."""
    if isinstance(stage, Sft | Dedup):
        named = stage.data
    elif isinstance(stage, Select) or isinstance(stage, AdaptInfSelect) and stage.datasets is None:
        named = stage.raw or "dedup"
    else:
        return None
    return recipe.before(stage, named) if isinstance(named, str) else None


def start(recipe: Recipe, stage: Stage) -> Any:
    """The sft or rl stage whose adapter this one continues, or scores with; None where it begins with another."""
    given = isinstance(stage, Rl) and stage.adapter is not None
    given = given or isinstance(stage, AdaptInfSelect) and stage.adapter_from is not None
    return None if given or isinstance(stage, Select | Dedup | Verify) else recipe.before(stage, "sft", "rl")


def rl_of(recipe: Recipe, stage: Verify) -> Any:
    """The rl stage that a verify stage is about: the newest before it, else the first after it, or None."""
    found = recipe.before(stage, "rl")
    return found or next((one for one in recipe.stages if isinstance(one, Rl)), None)


def own_sources(stage: Dedup | Select | AdaptInfSelect | Sft) -> list[Source]:
    """Where the rows of a stage come from, but for those of a stage before it."""
    named = stage.data if isinstance(stage, Sft | Dedup) else stage.raw
    skills = stage.datasets or [] if isinstance(stage, AdaptInfSelect) else []
    return [*(named if isinstance(named, list) else []), *(source for skill in skills for source in skill.raw)]


def sources_behind(recipe: Recipe, stage: Dedup | Select | AdaptInfSelect | Sft) -> list[Source]:
    """Where the rows of a stage come from in the end."""
    before = feeder(recipe, stage)
    return own_sources(stage) if before is None else sources_behind(recipe, before)


def fresh_adapter(recipe: Recipe, stage: Sft | Rl) -> Adapter | None:
    """The adapter that a training stage begins with; None where it continues another."""
    return None if start(recipe, stage) is not None else stage.adapter or Adapter()
