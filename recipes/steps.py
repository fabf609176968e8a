"""The pieces of work of a recipe, in order: each stage and each of its controls."""

from dataclasses import dataclass

from .links import feeder, start
from .schema import Recipe, Rl, Sft, Stage, Verify


@dataclass(frozen=True)
class Step:
    """A stage, or a control of one."""

    name: str
    """Of its folder, see `names`."""
    stage: Stage
    control: str | None = None
    rows: str | None = None
    """The step whose rows it takes."""
    start: str | None = None
    """The step whose adapter it continues, or scores with."""
    adapters: tuple[str, ...] = ()
    """The steps whose adapters it compares."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps whose results it reads."""
        return tuple(name for name in (self.rows, self.start, *self.adapters) if name is not None)


def steps(recipe: Recipe) -> list[Step]:
    found: list[Step] = []
    for name, stage in zip(recipe.names, recipe.stages, strict=True):
        rows, begins = (
            None if one is None else recipe.name_of(one) for one in (feeder(recipe, stage), start(recipe, stage))
        )
        if isinstance(stage, Sft | Rl):
            for control in (None, *stage.controls):
                found.append(Step(f"{name}-{control}" if control else name, stage, control, rows, begins))
        else:
            trained = tuple(step.name for step in found if isinstance(step.stage, Sft | Rl))
            found.append(Step(name, stage, None, rows, begins, trained if isinstance(stage, Verify) else ()))
    return found
