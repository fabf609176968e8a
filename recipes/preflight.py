"""What can be found out about a recipe before anything is trained: all faults at once."""

import difflib
import math
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.base import resolve_model
from ..adapters.embedded import NAME
from ..rl import CertificateReward
from .data_faults import Found, select_faults, source_faults, tried
from .faults import Fault
from .rl import make_credit, make_risk, make_task
from .schema import Adapter, Recipe
from .trainer_args import given
from .training import moka_config, trainer_arguments
from .verify_checks import wanted

HUB_TIMEOUT_S = 5.0

# Values that TRL's classes take, and that train nothing or end in the middle of a run.
LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}


def check(recipe: Recipe) -> list[Fault]:
    """Read the data, build the task, the adapter's and the trainers' configurations; the model is only looked up."""
    faults = [*_model_faults(recipe), *_attention_faults(recipe)]
    for number, stage in enumerate(recipe.stages):
        finder = {"select": select_faults, "sft": _sft_faults, "rl": _rl_faults, "verify": _verify_faults}[stage.stage]
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
        yield Fault(where, f"model folder {source!r} does not exist or holds no config.json")
    elif not looks_like_folder and not Path(source).is_dir():
        yield from (Fault(where, message) for message in _hub_faults(source, recipe.base.revision))


def _hub_faults(repo: str, revision: str | None) -> Iterator[str]:
    """A model id that the Hub does not know. Without a network nothing can be said of one, so nothing is."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(repo, "config.json", revision=revision), str):
            HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
    except HFValidationError as error:
        yield f"{repo!r} is neither a folder nor a model id of the Hub: {' '.join(str(error).split())}"
    except RevisionNotFoundError:
        yield f"the Hub's model {repo!r} has no revision {revision!r}"
    except RepositoryNotFoundError:
        yield f"the Hub has no model {repo!r}, or your token may not see it; look at the spelling, or log in"
    except (HTTPError, OSError):  # no network, or a Hub that does not answer
        return


def _attention_faults(recipe: Recipe) -> Iterator[Fault]:
    import torch

    chosen = recipe.base.attn_implementation
    if chosen is not None and chosen.startswith("flash_attention") and not torch.accelerator.is_available():
        where = recipe.where(("base", "attn_implementation"))
        yield Fault(where, f"{chosen} needs a GPU, and there is none here; use sdpa or eager")


def _sft_faults(recipe: Recipe, stage: Any) -> Found:
    yield from _adapter_faults(stage.adapter)
    if not isinstance(stage.data, str):
        yield from source_faults(("data",), stage.data)
    yield from _trainer_faults(recipe, stage, "SFTConfig")


def _rl_faults(recipe: Recipe, stage: Any) -> Found:
    if stage.adapter is not None:
        yield from _adapter_faults(stage.adapter)
    yield from tried(
        ("task",),
        lambda: make_task(stage.task).instances(
            stage.instances, stage.task.n, recipe.seed, "train", stage.task.discriminating
        ),
    )
    yield from tried(("reward",), lambda: CertificateReward(make_task(stage.task), stage.reward))
    yield from tried(("credit",), lambda: make_credit(stage))
    yield from tried(("risk",), lambda: make_risk(stage))
    yield from _conflicts(stage)
    yield from _trainer_faults(recipe, stage, "GRPOConfig")


def _conflicts(stage: Any) -> Found:
    """What is right alone and wrong together."""
    trainer = given(stage.trainer)
    credited = stage.credit is not None and stage.credit.strategy != "off"
    whole = trainer.get("importance_sampling_level") == "sequence" or trainer.get("loss_type") == "luspo"
    if credited and whole:
        yield ("credit",), "sequence-level importance sampling erases token credit: use level token, or credit: null"
    if stage.risk is None:
        return
    risk = given(stage.risk)
    binary = stage.reward in ("certificate", "answer", "ids_exact", "format", "wrong_label", "random")
    tail = risk.get("weight", 0.0) > 0.5 and risk.get("alpha", 0.5) < 1
    if binary and tail and not risk.get("allow_binary"):
        yield (
            ("risk",),
            (
                f"weight {risk['weight']} with the 0/1 reward {stage.reward!r} leaves seldom solved prompts without "
                "gradient: use at most 0.5, a graded reward, or allow_binary: true"
            ),
        )


def _verify_faults(recipe: Recipe, stage: Any) -> Found:
    task = stage.task or recipe.stage("rl").task
    unfit = list(
        tried(
            ("task",),
            lambda: make_task(task).instances(stage.instances, task.n, stage.seed, "test", task.discriminating),
        )
    )
    if unfit:
        yield from unfit
        return
    test = partial(make_task(task).instances, seed=stage.seed, split="test")
    if wanted(stage, ["size_ladder"]):
        yield from tried(("sizes",), lambda: [test(stage.probes, size) for size in stage.sizes])
    if "discriminating" in stage.checks:  # among "all" it is left out where the task cannot have it
        few = [
            f"the check 'discriminating' needs instances that fool every heuristic: {message}"
            for _, message in tried(("checks",), lambda: test(stage.probes, task.n, discriminating=True))
        ]
        yield from ((("checks", stage.checks.index("discriminating")), message) for message in few)
    for number, name in enumerate(stage.checks):
        if name in stage.checks[:number]:
            yield ("checks", number), f"the check {name!r} is asked for twice; leave one out"


def _adapter_faults(adapter: Adapter) -> Found:
    yield from tried(("adapter",), lambda: moka_config(adapter))
    for key in ("target_modules", "exclude_modules"):
        value = getattr(adapter, key)
        if isinstance(value, str) and value != "all-linear":
            try:
                re.compile(value)
            except re.error as error:
                yield ("adapter", key), f"{value!r} is no regular expression: {error}; names are given as a list"


def _trainer_faults(recipe: Recipe, stage: Any, config_class: str) -> Found:
    import trl

    values = given(stage.trainer)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield ("trainer", key), f"{key} is {value}; give a finite number"
        elif key in LEAST and isinstance(value, (int, float)) and value < LEAST[key]:
            yield ("trainer", key), f"{key} is {value}; give at least {LEAST[key]}"
    if values.get("max_steps") == 0:
        yield ("trainer", "max_steps"), "max_steps is 0; give at least 1, or leave it out to go by num_train_epochs"
    with tempfile.TemporaryDirectory() as folder:
        try:
            getattr(trl, config_class)(**trainer_arguments(recipe, stage.trainer, Path(folder)))
        except Exception as error:  # the libraries refuse values with whatever error comes up, ZeroDivisionError too
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            yield ("trainer",), f"trl.{config_class} refuses these values: {kind}{' '.join(str(error).split())}"
