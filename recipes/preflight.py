"""What can be found out about a recipe before anything is trained: all faults at once."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..adapters import AdapterError
from ..adapters.base import resolve_model
from ..data_selection import DataSelectionError
from ..rl import RlError
from .rows import read_sources
from .faults import Fault
from .rl import make_task
from .schema import Recipe
from .training import moka_config, trainer_arguments

KNOWN_ERRORS = (AdapterError, DataSelectionError, RlError, ValueError)


def check(recipe: Recipe) -> list[Fault]:
    """Read the data, build the task, the adapter's and the trainers' configurations; the model is only looked up."""
    faults = [*_model_faults(recipe)]
    for number, stage in enumerate(recipe.stages):
        finder = {"select": _select_faults, "sft": _sft_faults, "rl": _rl_faults, "verify": _verify_faults}[stage.stage]
        faults += [Fault(recipe.where(("stages", number, *path)), message) for path, message in finder(recipe, stage)]
    return faults


Found = Iterator[tuple[tuple[str, ...], str]]


def _model_faults(recipe: Recipe) -> Iterator[Fault]:
    source = resolve_model(recipe.base.model)
    looks_like_folder = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_folder and not (Path(source) / "config.json").is_file():
        yield Fault(recipe.where(("base", "model")), f"model folder {source!r} does not exist or holds no config.json")


def _select_faults(recipe: Recipe, stage: Any) -> Found:
    rows: dict[str, list] = {}
    for key in ("raw", "target"):
        try:
            rows[key] = read_sources(getattr(stage, key), key)
        except (DataSelectionError, RlError) as error:
            yield (key,), str(error)
            continue
        if not rows[key]:
            yield (key,), f"{key} is empty: its sources hold no rows"
    pool = len(rows.get("raw", []))
    if pool and stage.k > pool:
        yield ("k",), f"k is {stage.k} and the pool has {pool} rows; give at most {pool}"


def _sft_faults(recipe: Recipe, stage: Any) -> Found:
    yield from _tried(("adapter",), lambda: moka_config(stage.adapter))
    if not isinstance(stage.data, str):
        yield from _tried(("data",), lambda: read_sources(stage.data, "data"))
    yield from _trainer_faults(recipe, stage, "SFTConfig")


def _rl_faults(recipe: Recipe, stage: Any) -> Found:
    if stage.adapter is not None:
        yield from _tried(("adapter",), lambda: moka_config(stage.adapter))
    yield from _tried(("task",), lambda: make_task(stage.task).instances(stage.instances, stage.task.n, recipe.seed))
    yield from _trainer_faults(recipe, stage, "GRPOConfig")


def _verify_faults(recipe: Recipe, stage: Any) -> Found:
    task = stage.task or recipe.stage("rl").task
    yield from _tried(("task",), lambda: make_task(task).instances(stage.instances, task.n, stage.seed, "test"))


def _trainer_faults(recipe: Recipe, stage: Any, config_class: str) -> Found:
    import trl

    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(recipe, stage.trainer, Path(folder))
        yield from _tried(("trainer",), lambda: getattr(trl, config_class)(**arguments))


def _tried(path: tuple[str, ...], build: Callable[[], Any]) -> Found:
    try:
        build()
    except KNOWN_ERRORS as error:
        yield path, str(error)
