"""What a recipe needs beyond this machine: the Hub, a GPU."""

import dataclasses
import socket
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from huggingface_hub import constants, try_to_load_from_cache
from trl import GRPOConfig

from ..adapters.base import resolve_model
from ..adapters.embedded import NAME
from .schema import HubRows, Recipe, Rl
from .trainer_args import given

HUB_TIMEOUT_S = 5.0
MANY_TOKENS = 10_000_000  # hours on a CPU, for the smallest models


def notes(recipe: Recipe) -> list[str]:
    """What a recipe needs and what could not be checked here: no faults, but good to know before it is run."""
    found = []
    source = resolve_model(recipe.base.model)
    if recipe.base.model != NAME and not Path(source).is_dir() and not _is_cached(source, recipe.base.revision):
        reach = "" if _hub_answers() else ", which does not answer; that the model exists was not checked"
        found.append(f"model {recipe.base.model!r} is not on this machine and comes from the Hub{reach}")
    for stage in recipe.stages:
        if not isinstance(stage, Rl):
            continue
        for data in stage.data or ():
            if isinstance(data, HubRows) and not Path(data.hub).is_dir():
                unchecked = "; its rows and the reward on them were not checked" if out_of_reach(data) else ""
                reach = ", which does not answer" if unchecked else ""
                found.append(f"data set {data.hub!r} comes from the Hub{reach}{unchecked}")
        tokens = _tokens_to_generate(stage)
        if tokens > MANY_TOKENS and not torch.accelerator.is_available():
            found.append(
                f"the rl stage generates up to {tokens / 1e6:.0f} million tokens in {_steps(stage)} steps: that needs "
                "a GPU, and there is none here"
            )
    return found


def _tokens_to_generate(stage: Rl) -> int:
    """Completions of all steps at their longest, with TRL's defaults where the recipe says nothing."""
    trainer = given(stage.trainer)
    batch = _given_or_default(trainer, "per_device_train_batch_size") * _given_or_default(
        trainer, "gradient_accumulation_steps"
    )
    return (
        _steps(stage) * batch * (_given_or_default(trainer, "max_completion_length") or 0) * (1 + len(stage.controls))
    )


def _steps(stage: Rl) -> int:
    return max(0, given(stage.trainer).get("max_steps", 0))


def _given_or_default(trainer: dict[str, Any], key: str) -> Any:

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    return trainer.get(key, defaults[key])


def out_of_reach(source: Any) -> bool:
    """A data set of the Hub that nothing can be said of without a network."""
    return isinstance(source, HubRows) and not Path(source.hub).is_dir() and not _hub_answers()


@cache
def _hub_answers() -> bool:
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
