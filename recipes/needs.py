"""What a recipe needs beyond this machine: the Hub, a GPU."""

import dataclasses
import socket
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, try_to_load_from_cache
from trl import GRPOConfig

from ..adapters.base import resolve_model
from ..adapters.embedded import NAME
from ..data_selection import DataSelectionError
from ..data_selection.texts import read_rows
from .links import feeder, own_sources
from .schema import Recipe, Rl, Sft, Stage
from .schema_rows import AdaptInfSelect, Dedup, Select
from .schema_sources import HubRows, RowSource, Source
from .trainer_args import given

HUB_TIMEOUT_S = 5.0
COUNTED_BYTES = 1 << 28
MANY_TOKENS = 10_000_000  # hours on a CPU, for the smallest models


def notes(recipe: Recipe) -> list[str]:
    """What a recipe needs and what could not be checked here: no faults, but good to know before it is run."""
    found = []
    source = resolve_model(recipe.base.model)
    if recipe.base.model != NAME and not Path(source).is_dir() and not _is_cached(source, recipe.base.revision):
        reach = "" if hub_answers() else ", which does not answer; that the model exists was not checked"
        found.append(f"model {recipe.base.model!r} is not on this machine and comes from the Hub{reach}")
        if not hub_answers():
            found.append("without the model's config.json its modules, its context and its memory were not looked at")
    for stage in recipe.stages:
        for data in _sources(stage):
            if isinstance(data, HubRows) and not Path(data.hub).is_dir():
                unchecked = "its rows and the reward on them were" if isinstance(stage, Rl) else "its rows were"
                reach = f", which does not answer; {unchecked} not checked" if out_of_reach(data) else ""
                found.append(f"data set {data.hub!r} comes from the Hub{reach}")
        if isinstance(stage, Rl) and not torch.accelerator.is_available():
            found += _work(stage, recipe.name_of(stage))
        if isinstance(stage, Dedup):
            found += _unread(recipe, stage)
    from .hub_check import hub_notes  # which takes the timeout from here

    return [*found, *hub_notes(recipe)]


def _sources(stage: Stage) -> Sequence[Source | RowSource]:
    """All data that the stage reads."""
    if isinstance(stage, AdaptInfSelect):
        return [*own_sources(stage), *(one for skill in stage.datasets or () for one in skill.test or ())]
    if isinstance(stage, Select):
        return [*own_sources(stage), *(stage.target or ()), *chain.from_iterable((stage.targets or {}).values())]
    if isinstance(stage, Dedup):
        return [*own_sources(stage), *chain.from_iterable(stage.against.values())]
    if isinstance(stage, Sft):
        return own_sources(stage)
    return (isinstance(stage, Rl) and stage.data) or ()


def _unread(recipe: Recipe, stage: Dedup) -> Iterator[str]:
    """A dedup stage before others, of which none takes its rows."""
    after = recipe.stages[recipe.place(stage) + 1 :]
    if any(isinstance(one, Select | AdaptInfSelect | Sft) for one in after) and not any(
        feeder(recipe, one) is stage for one in after
    ):
        yield (
            f"no stage reads the rows that {recipe.name_of(stage)} keeps: leave raw out of a select stage after it, or "
            "give an sft stage data: dedup"
        )


def _work(stage: Rl, name: str) -> Iterator[str]:
    """What an rl stage generates, where that is too much for a CPU."""
    steps = steps_of(stage)
    if steps is None:
        yield (
            f"how many steps the {name} stage takes is not known, as its rows were not counted: whether it needs a "
            "GPU, which is not here, cannot be said; max_steps would bound it"
        )
        return
    length = _given_or_default(given(stage.trainer), "max_completion_length") or 0
    tokens = steps * batch_of(stage) * length * (1 + len(stage.controls))
    if tokens > MANY_TOKENS:
        yield (
            f"the {name} stage generates up to {tokens / 1e6:.0f} million tokens in {steps} steps: that needs a GPU, "
            "and there is none here"
        )


def steps_of(stage: Rl) -> int | None:
    """Of the optimiser, by TRL's defaults where the recipe says nothing; None where the rows are not known."""
    trainer = given(stage.trainer)
    most = _given_or_default(trainer, "max_steps")
    if most > 0:
        return most
    rows = stage.instances if stage.task is not None else count_rows(stage.data or ())
    if rows is None:
        return None
    group = _given_or_default(trainer, "num_generations") or 1
    return ceil(_given_or_default(trainer, "num_train_epochs") * rows * group / batch_of(stage))


def batch_of(stage: Rl) -> int:
    """Completions a step."""
    trainer = given(stage.trainer)
    each = _given_or_default(trainer, "per_device_train_batch_size")
    return max(1, each * _given_or_default(trainer, "gradient_accumulation_steps"))


def count_rows(sources: Sequence[RowSource]) -> int | None:
    """How many rows there are; None for data of the Hub, a large file, and one that cannot be read."""
    total = 0
    for source in sources:
        if isinstance(source, HubRows) or not Path(source).is_file() or Path(source).stat().st_size > COUNTED_BYTES:
            return None
        try:
            total += sum(1 for _ in read_rows(source))
        except DataSelectionError:  # which the check reports
            return None
    return total


def _given_or_default(trainer: dict[str, Any], key: str) -> Any:
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    return trainer.get(key, defaults[key])


def out_of_reach(source: Any) -> bool:
    """A data set of the Hub that nothing can be said of without a network."""
    return isinstance(source, HubRows) and not Path(source.hub).is_dir() and not hub_answers()


@cache
def hub_answers() -> bool:
    """Whether the Hub can be asked, found out once and quickly: its own client tries for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    where = urlparse(constants.ENDPOINT)
    try:
        port = where.port or (443 if where.scheme == "https" else 80)
        socket.create_connection((where.hostname, port), HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _is_cached(repo: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str)
