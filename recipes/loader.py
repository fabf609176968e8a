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
from .links import feeder
from .masking import learn, learn_override
from .overrides import apply_overrides
from .own import ALLOW_LATER, is_own, not_allowed
from .run_folder import recipe_text
from .schema import Recipe, Rl, Sft, Verify
from .schema_rows import AdaptInfSelect, Dedup, Select
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
    for number, stage in enumerate(recipe.stages):
        found = [*_row_faults(recipe, stage), *adapt_inf_order(recipe, number)]
        if isinstance(stage, Sft | Rl):
            found += _adapter_faults(recipe, stage)
        if isinstance(stage, Rl):
            found += _rl_faults(stage)
        if isinstance(stage, Verify) and stage.task is None:
            rl = recipe.before(stage, "rl")
            if rl is None:
                why = "an rl stage, and none comes before it; give task"
                found.append((("stage",), f"the verify stage takes its task from {why}"))
            elif rl.task is None:
                why = "the rl stage, which has data and no task; give task"
                found.append((("stage",), f"the verify stage takes its task from {why}"))
        yield from ((("stages", number, *path), message) for path, message in found)


def _row_faults(recipe: Recipe, stage: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where the rows of a stage come from: a stage of which there is none before, or one that writes none."""
    before = feeder(recipe, stage)
    if isinstance(stage, Select):
        if before is None and not isinstance(stage.raw, list):
            yield ("stage",), "missing key 'raw' (The pool to pick from; or put a dedup stage before)"
        yield from select_gaps(stage)
    if isinstance(stage, Sft):
        if stage.data == "select" and before is None:
            other = ", or data: dedup" if recipe.before(stage, "dedup") else ""
            what = f"what 'select' picked, and none comes before; add one, or give data{other}"
            yield ("stage",), f"the sft stage trains on {what}"
        if stage.data == "dedup" and before is None:
            yield ("data",), "the sft stage trains on what 'dedup' kept, and none comes before; add one, or give data"
        if stage.controls and stage.data != "select":
            yield ("controls",), "a random control needs the pool of a select stage; give data: select"
    if isinstance(stage, Dedup) and stage.data == "select":
        if before is None:
            yield ("data",), "the dedup stage looks through what 'select' picked, and none comes before; give sources"
        elif isinstance(before, AdaptInfSelect) and before.datasets is not None:
            yield ("data",), "over datasets the select stage writes no picks; give sources"


def _adapter_faults(recipe: Recipe, stage: Sft | Rl) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """A training stage begins with an adapter of its own or with the newest one, and not with both."""
    before = recipe.before(stage, "sft", "rl")
    if before is None and isinstance(stage, Rl) and stage.adapter is None:
        what = "an sft stage's adapter, and none comes before; add one, or give adapter"
        yield ("stage",), f"the rl stage continues {what}"
    if before is not None and stage.adapter is not None:
        continued = recipe.name_of(before)
        yield ("adapter",), f"the {stage.stage} stage continues the {continued} stage's adapter; leave 'adapter' out"


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
