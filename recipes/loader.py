"""From a file name and overrides to a checked recipe."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .adapt_inf_faults import adapt_inf_order
from .data_faults import select_gaps
from .faults import Fault, RecipeError, faults_from_validation
from .inherit import inherited
from .masking import learn, learn_override
from .overrides import apply_overrides
from .own import ALLOW_LATER, is_own, not_allowed
from .run_folder import recipe_text
from .schema import Recipe, Rl
from .schema_rows import Select
from .shipped import shipped_text
from .trainer_args import set_by_krontune
from .yaml12 import Document, read, shorten


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and check all of it that needs no data.

    Args:
        path: a file, or the name of a shipped recipe, such as "quickstart".
        overrides: "path.to.key=value", applied before the check, e.g. "stages.sft.trainer.max_steps=10".

    Raises:
        RecipeError: with every fault, each with file, line and column.
    """
    name, text = _find(path)
    folder = Path(path).parent if Path(path).is_file() else None
    overrides = list(overrides)
    for override in overrides:
        learn_override(override)
    document = apply_overrides(inherited(read(text, name), folder, shipped_text), overrides)
    learn(document.data)
    recipe = _loaded(document)
    faults = []
    for values in itertools.product(*recipe.sweep.values()):
        try:
            point(recipe, dict(zip(recipe.sweep, values, strict=True)))
        except RecipeError as error:
            faults += error.faults
    if faults:
        raise RecipeError(faults)
    return recipe


def point(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The recipe with these values, by their path as in an override, and no sweep.

    Raises:
        RecipeError: it is none then; each fault stands where the path stands under `sweep`.
    """
    document = recipe._document or read(recipe_text(recipe), recipe.name)
    places = {f"override {shorten(override)}": recipe.where(("sweep", path)) for path, override in _written(given)}
    data = {key: value for key, value in document.data.items() if key != "sweep"}
    try:
        changed = apply_overrides(
            Document(document.name, data, document.marks), [override for _, override in _written(given)]
        )
        return _loaded(changed)
    except RecipeError as error:
        values = ", ".join(f"{path}={value}" for path, value in given.items())
        raise RecipeError(
            Fault(places[fault.where], f"with {values}: {fault.message}") if fault.where in places else fault
            for fault in error.faults
        ) from None


def _written(given: dict[str, Any]) -> list[tuple[str, str]]:
    """Each path, and the override that sets its value."""
    return [(path, f"{path}={json.dumps(value)}") for path, value in given.items()]


def _loaded(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.data, context=ALLOW_LATER)
    except ValidationError as error:
        raise RecipeError(_with_own_keys(document, faults_from_validation(error, document, Recipe))) from None
    faults = [Fault(document.where(path), message) for path, message in (*_order_faults(recipe), *not_allowed(recipe))]
    if faults:
        raise RecipeError(faults)
    recipe._document = document
    return recipe


def _find(path: str | Path) -> tuple[str, bytes | str]:
    file = Path(path)
    if file.is_file():
        return str(path), file.read_bytes()
    if file.suffix in (".yaml", ".yml") or len(file.parts) > 1:
        raise RecipeError([Fault(str(path), f"there is no such file (looked in {Path.cwd()})")])
    return f"{path}.yaml", shipped_text(str(path))


def _with_own_keys(document: Document, faults: list[Fault]) -> list[Fault]:
    """The faults, with a better word than 'unknown key' for trainer keys that TRL knows and krontune sets itself."""
    for where, key, reason in _own_keys(document):
        generic = f"unknown key {key!r}"
        faults = [fault for fault in faults if fault.where != where or not fault.message.startswith(generic)]
        faults.append(Fault(where, f"{key!r} is not set under trainer: {reason}"))
    return faults


def _own_keys(document: Document) -> Iterator[tuple[str, str, str]]:
    stages = document.data.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        trainer: Any = stage.get("trainer") if isinstance(stage, dict) else None
        for key in trainer if isinstance(trainer, dict) else ():
            if reason := set_by_krontune(key):
                yield document.where(("stages", number, "trainer", key)), key, reason


def _order_faults(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What no single section can know: which stages there are, and in which order."""
    before: list[str] = []
    for number, stage in enumerate(recipe.stages):
        at = ("stages", number, "stage")
        if stage.stage in before:
            yield at, f"a second {stage.stage} stage; a recipe has at most one of each kind"
        if isinstance(stage, Select):
            yield from ((("stages", number, *path), message) for path, message in select_gaps(stage))
        if stage.stage == "sft" and stage.data == "select" and "select" not in before:
            yield at, "the sft stage trains on what 'select' picked, and none comes before; add one, or give data"
        if stage.stage == "sft" and stage.controls and stage.data != "select":
            yield ("stages", number, "controls"), "a random control needs the pool of a select stage; give data: select"
        yield from ((("stages", number, *path), message) for path, message in adapt_inf_order(recipe, number))
        if stage.stage == "rl" and "sft" not in before and stage.adapter is None:
            yield at, "the rl stage continues an sft stage's adapter, and none comes before; add one, or give adapter"
        if stage.stage == "rl" and "sft" in before and stage.adapter is not None:
            yield ("stages", number, "adapter"), "the rl stage continues the sft stage's adapter; leave 'adapter' out"
        if stage.stage == "verify" and stage.task is None:
            rl = recipe.stage("rl") if "rl" in before else None
            if rl is None:
                yield at, "the verify stage takes its task from an rl stage, and none comes before it; give task"
            elif rl.task is None:
                yield at, "the verify stage takes its task from the rl stage, which has data and no task; give task"
        if isinstance(stage, Rl):
            yield from ((("stages", number, *path), message) for path, message in _rl_faults(stage))
        before.append(stage.stage)


def _rl_faults(stage: Rl) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Which keys of an rl stage go together."""
    if (stage.task is None) == (stage.data is None):
        what = "task and data exclude each other; leave one out" if stage.task else "the rl stage needs a task or data"
        yield ("data" if stage.task else "stage",), what
        return
    shipped = not is_own(stage.reward)
    if stage.data is not None:
        for key in ("instances", "hints"):
            if key in stage.model_fields_set and getattr(stage, key) != type(stage).model_fields[key].default:
                yield (key,), f"{key!r} is of a task; over data all rows are used, as they are"
        if shipped and stage.reward != "math":
            yield (
                ("reward",),
                f"reward {stage.reward!r} needs a task; over data give math, or your own package.module:name",
            )
        if "format" in stage.controls and not shipped:
            yield ("controls",), "the control 'format' knows a task's form or the box of reward math; leave it out here"
    else:
        if stage.reward == "math":
            yield ("reward",), "reward 'math' compares with a column of data; a task is checked by 'certificate'"
        if stage.instruction is not None:
            yield ("instruction",), "'instruction' is put after the prompts of data; a task writes its own"
    if stage.reward == "random" and not isinstance(stage.guard, str) and stage.guard is not None:
        yield ("guard",), "reward 'random' reads nothing and runs without a guard; leave 'guard' out"
