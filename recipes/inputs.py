"""What the result of a step depends on. Where none of it has changed, a finished step is not run again."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .checkpoints import SAVING
from .content import Digests, Inputs, key_of
from .lifelong import is_sequence
from .links import feeder, own_sources, rl_of
from .masking import hidden
from .own import is_own, source_of
from .pool import KEPT
from .schema import Recipe, Rl, Sft, Verify
from .schema_rows import AdaptInfSelect, Dedup, Select
from .schema_sources import Columns, HubRows, RowSource, Source
from .select import BALANCED, CONTROL, SELECTED
from .select_adapt_inf import DATASETS, WARM_UP, adapter_section
from .steps import Step
from .trainer_args import given
from .training import ADAPTER


def inputs_of(recipe: Recipe, step: Step, run: Path, digests: Digests) -> Inputs:
    """All that the result of the step depends on, but for the versions of the libraries: its section of the recipe, the
    base model, the seed, the data files and the files of the user's own code, and what the steps before it made."""
    found = settings_of(recipe, step)
    found["files"] = {str(path): digests.of(path) for path in _files(recipe, step)}
    found["needs"] = {name: made_by(name, run, digests) for name in step.needs}
    return found


def settings_of(recipe: Recipe, step: Step) -> Inputs:
    """The part of the inputs that stands in the recipe; defaults are left out, so that a key that a later version adds
    changes nothing."""
    found: Inputs = {"seed": recipe.seed, "stage": _section(step.stage), "control": step.control}
    if not isinstance(step.stage, Select | Dedup):
        found["base"] = recipe.base.model_dump(exclude_defaults=True)
    if isinstance(step.stage, AdaptInfSelect):  # it may warm up a later stage's adapter
        found["adapter"] = adapter_section(recipe, step.stage).model_dump(exclude_defaults=True)
    if isinstance(step.stage, Sft) and is_sequence(recipe, step.stage):  # it picks itself
        found["select"] = _section(feeder(recipe, step.stage))
    if isinstance(step.stage, Verify) and (rl := rl_of(recipe, step.stage)) is not None:
        found["rl"] = _section(rl) if recipe.place(rl) < recipe.place(step.stage) else _rewarded(rl)
    # Written down: without secrets, and with every other value, whatever its key is called.
    return hidden(json.loads(json.dumps(found, default=str)))


def _rewarded(rl: Rl) -> dict[str, Any]:
    """What a verify stage reads of an rl stage that comes after it: the reward that it checks, and the size of the
    groups that it looks for head-room in."""
    values = _section(rl)
    kept = {key: values[key] for key in ("task", "reward", "reward_options", "guard") if key in values}
    return kept | {"num_generations": given(rl.trainer).get("num_generations")}


def _section(stage: Any) -> dict[str, Any]:
    values = stage.model_dump(exclude_defaults=True, exclude={"controls"})
    if isinstance(stage, Sft | Rl):
        values["trainer"] = {key: value for key, value in given(stage.trainer).items() if key not in SAVING}
    for key in ("credit", "risk", "guard"):
        if isinstance(values.get(key), dict):
            values[key] = given(getattr(stage, key))
    if isinstance(stage, Sft) and not values.get("adapter"):  # spelled out or not, it is the same
        values.pop("adapter", None)
    return values


def made_by(name: str, run: Path, digests: Digests) -> str:
    """The content of what a finished step hands on: an adapter, or the picked rows."""
    folder = run / name
    made = [path for part in (ADAPTER, WARM_UP, DATASETS) for path in (folder / part).rglob("*")]
    made += [folder / KEPT, folder / SELECTED, folder / CONTROL, folder / BALANCED]
    files = {str(path.relative_to(folder)): digests.of(path) for path in sorted(made) if path.is_file()}
    return key_of(files)


def _files(recipe: Recipe, step: Step) -> Iterator[Path]:
    stage = step.stage
    if isinstance(stage, AdaptInfSelect):
        yield from _paths([*own_sources(stage), *(one for skill in stage.datasets or [] for one in skill.test or [])])
        if stage.adapter_from is not None:
            yield from sorted(Path(stage.adapter_from).glob("adapter_*"))
        for member in stage.members if isinstance(stage.members, list) else ():
            yield from sorted(Path(member).glob("adapter_*"))
    elif isinstance(stage, Select):
        sources = own_sources(stage)
        sources += [*(stage.target or []), *(one for some in (stage.targets or {}).values() for one in some)]
        if stage.duplicates is not None:
            sources += [one for some in stage.duplicates.against.values() for one in some]
        yield from _paths(sources)
    elif isinstance(stage, Dedup):
        yield from _paths([*own_sources(stage), *(one for some in stage.against.values() for one in some)])
    elif isinstance(stage, Sft):
        yield from _paths(own_sources(stage))
        select = feeder(recipe, stage)
        if is_sequence(recipe, stage) and select.adapter_from is not None:  # with which every policy begins
            yield from sorted(Path(select.adapter_from).glob("adapter_*"))
    else:
        rl = rl_of(recipe, stage) if isinstance(stage, Verify) else stage
        named = [one.task.name for one in (stage, rl) if one is not None and one.task is not None]
        named += [] if rl is None else [rl.reward]
        yield from (path for name in named if is_own(name) and (path := source_of(name)) is not None)
        yield from _paths(stage.data or ()) if isinstance(stage, Rl) else ()


def _paths(sources: Iterable[Source | RowSource]) -> Iterator[Path]:
    """The files on this machine; a data set of the Hub is told by its name and revision."""
    for source in sources:
        if isinstance(source, str):
            yield Path(source)
        elif isinstance(source, Columns):
            yield Path(source.path)
        elif isinstance(source, HubRows) and Path(source.hub).is_dir():
            yield from sorted(path for path in Path(source.hub).rglob("*") if path.is_file())
