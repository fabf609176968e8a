"""What can be found out about a recipe before anything is trained: all faults at once."""

import difflib
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from ..adapters.base import resolve_model
from ..adapters.embedded import NAME
from .faults import Fault
from .rl import make_task
from .rows import read_sources
from .schema import Recipe, Source
from .training import moka_config, trainer_arguments

# Where in the stage, and what.
Found = Iterator[tuple[tuple[str | int, ...], str]]


def check(recipe: Recipe) -> list[Fault]:
    """Read the data, build the task, the adapter's and the trainers' configurations; the model is only looked up."""
    faults = [*_model_faults(recipe)]
    for number, stage in enumerate(recipe.stages):
        finder = {"select": _select_faults, "sft": _sft_faults, "rl": _rl_faults, "verify": _verify_faults}[stage.stage]
        faults += [Fault(recipe.where(("stages", number, *path)), message) for path, message in finder(recipe, stage)]
    return faults


def _model_faults(recipe: Recipe) -> Iterator[Fault]:
    if recipe.base.model == NAME:
        return
    where = recipe.where(("base", "model"))
    if difflib.get_close_matches(recipe.base.model, [NAME], cutoff=0.8):
        yield Fault(where, f"unknown model {recipe.base.model!r}; did you mean {NAME!r}?")
    source = resolve_model(recipe.base.model)
    looks_like_folder = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_folder and not (Path(source) / "config.json").is_file():
        yield Fault(recipe.where(("base", "model")), f"model folder {source!r} does not exist or holds no config.json")


def _select_faults(recipe: Recipe, stage: Any) -> Found:
    pool = yield from _source_faults("raw", stage.raw)
    yield from _source_faults("target", stage.target)
    if pool and stage.k > pool:
        yield ("k",), f"k is {stage.k} and the pool has {pool} rows; give at most {pool}"


def _sft_faults(recipe: Recipe, stage: Any) -> Found:
    yield from _tried(("adapter",), lambda: moka_config(stage.adapter))
    if not isinstance(stage.data, str):
        yield from _source_faults("data", stage.data)
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
        try:
            getattr(trl, config_class)(**trainer_arguments(recipe, stage.trainer, Path(folder)))
        except Exception as error:  # the libraries refuse values with whatever error comes up, ZeroDivisionError too
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            yield ("trainer",), f"trl.{config_class} refuses these values: {kind}{' '.join(str(error).split())}"


def _source_faults(key: str, sources: list[Source]) -> Generator[tuple[tuple[str | int, ...], str], None, int]:
    """Reads all sources of a key; returns how many rows they hold, 0 where one cannot be read."""
    rows, readable = 0, True
    for number, source in enumerate(sources):
        try:
            rows += len(read_sources([source], key))
        except (ValueError, OSError) as error:
            readable = False
            yield (key, number), str(error)
    if readable and not rows:
        yield (key,), f"{key} is empty: its sources hold no rows"
    return rows if readable else 0


def _tried(path: tuple[str, ...], build: Callable[[], Any]) -> Found:
    try:
        build()
    except ValueError as error:
        yield path, str(error)
