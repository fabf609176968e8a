"""The pieces of work of a recipe, in order: each stage and each of its controls."""

from dataclasses import dataclass

from .schema import Recipe, Rl, Sft, Verify
from .schema_rows import AdaptInfSelect, Select


@dataclass(frozen=True)
class Step:
    """A stage, or a control of one.

    name: of its folder, "sft", "sft-random". needs: the steps whose results it reads.
    """

    name: str
    stage: Select | AdaptInfSelect | Sft | Rl | Verify
    control: str | None = None
    needs: tuple[str, ...] = ()


def steps(recipe: Recipe) -> list[Step]:
    found: list[Step] = []
    for stage in recipe.stages:
        adapters = tuple(step.name for step in found if isinstance(step.stage, Sft | Rl))
        if isinstance(stage, AdaptInfSelect):
            own = stage.adapter_from is not None or "sft" not in adapters
            found.append(Step("select", stage, needs=() if own else ("sft",)))
        elif isinstance(stage, Select):
            found.append(Step("select", stage))
        elif isinstance(stage, Verify):
            found.append(Step("verify", stage, needs=adapters))
        else:
            if isinstance(stage, Sft):
                needs = ("select",) if isinstance(stage.data, str) else ()
            else:
                needs = ("sft",) if stage.adapter is None else ()
            name = stage.stage
            found += [
                Step(f"{name}-{control}" if control else name, stage, control, needs)
                for control in (None, *stage.controls)
            ]
    return found
