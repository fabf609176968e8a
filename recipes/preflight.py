"""What can be found out about a recipe before anything is trained: all faults at once."""

import difflib
import math
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..adapters import AdapterError
from ..adapters.base import resolve_model
from ..adapters.embedded import NAME
from ..rl import CertificateTask, Guarded, RlError, TokenCredit
from ..rl.probe import refuse_unreadable
from ..rl.risk import tail_fault
from ..rl.rollout_cache import BITS, cache_settings
from .adapt_inf_faults import adapt_inf_faults
from .data_faults import Found, dedup_faults, select_faults, source_faults, tried
from .faults import Fault
from .hub_check import hub_faults
from .links import fresh_adapter, rl_of
from .needs import HUB_TIMEOUT_S, out_of_reach
from .own import is_own, not_allowed
from .pictures import missing_pictures, reads_pictures
from .rendered import first_rows, load_tokenizer, longest_prompt, sft_row
from .reward_trial import NOT_JUDGED, ROWS, faults_of_reward, right_forms, rows_to_try, wrong_texts
from .rewards import make_reward
from .rl import make_credit, make_risk, make_task, training_rows
from .rows import Row, source_rows
from .schema import Recipe, Rl, Sft, Verify
from .schema_model import Adapter
from .schema_rows import AdaptInfSelect
from .schema_sources import Columns
from .targets import ConfigError, base_config, context_of, linear_names, meta_model, targets_of, unmatched
from .trainer_args import given, value_of
from .training import moka_config, trainer_arguments
from .verify_checks import wanted

BINARY = ("certificate", "answer", "ids_exact", "format", "wrong_label", "random", "math")

# Values that TRL's classes take, and that train nothing or end in the middle of a run.
LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
}


# What TRL's GRPO takes, as it says only when it first scores a batch or computes a loss.
CHOICES: dict[str, tuple[object, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
}


def check(recipe: Recipe) -> list[Fault]:
    """Read the data, build the task, the adapter's and the trainers' configurations; the model is only looked up."""
    refused = [Fault(recipe.where(path), message) for path, message in not_allowed(recipe)]
    if refused:  # a copy of a recipe is not validated; nothing of it is imported here either
        return refused
    faults = [*_model_faults(recipe), *_attention_faults(recipe), *_picture_faults(recipe)]
    for number, stage in enumerate(recipe.stages):
        finders: dict[str, Any] = {
            "dedup": dedup_faults,
            "select": adapt_inf_faults if isinstance(stage, AdaptInfSelect) else select_faults,
            "sft": _sft_faults,
            "rl": _rl_faults,
            "verify": _verify_faults,
        }
        found = finders[stage.stage](recipe, stage)
        faults += [Fault(recipe.where(("stages", number, *path)), message) for path, message in found]
    faults += [Fault(recipe.where(path), message) for path, message in hub_faults(recipe)]
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
    else:
        yield from (Fault(where, message) for _, message in tried((), lambda: meta_model(recipe.base)))


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


def _picture_faults(recipe: Recipe) -> Iterator[Fault]:
    """What is not there for a base that reads pictures."""
    if not reads_pictures(recipe.base):
        return
    what = f"the base {recipe.base.model!r} reads pictures"
    if recipe.base.precision is not None:
        yield Fault(recipe.where(("base", "precision")), f"{what}, and bit plans are of language models alone")
    for number, stage in enumerate(recipe.stages):
        where = recipe.where(("stages", number, "stage"))
        for key, source in _sources(stage):
            yield from (Fault(recipe.where(("stages", number, *key)), message) for message in _no_pictures(source))
        if isinstance(stage, Rl | Verify):
            yield Fault(where, f"{what}, and the stage {stage.stage} asks and trains language models alone")
        elif isinstance(stage, Sft) and (value_of(stage.trainer, "packing") or value_of(stage.trainer, "padding_free")):
            yield Fault(where, f"{what}, and TRL packs no rows with pictures; leave packing and padding_free out")


def _sources(stage: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The sources of rows that a stage trains on, picks from or measures by, each with its key."""
    held: list[tuple[tuple[str | int, ...], Any]] = [((key,), getattr(stage, key, None)) for key in ("raw", "data")]
    for number, skill in enumerate(getattr(stage, "datasets", None) or []):
        held += [(("datasets", number, "raw"), skill.raw), (("datasets", number, "test"), skill.test)]
    for key, sources in held:
        yield from ((key, source) for source in (sources if isinstance(sources, list) else ()))


def _no_pictures(source: Any) -> Iterator[str]:
    """The first row of a source whose picture is missing. What else is wrong with the source is said of it."""
    if not isinstance(source, str | Columns):
        return
    file = source if isinstance(source, str) else source.path
    try:
        for count, row in enumerate(source_rows(source, "data"), start=1):
            for path in missing_pictures(row):
                yield f"row {count} of {file}: no picture is at {path!r}, seen from the file of the row"
                return
    except (ValueError, OSError):
        return


def _sft_faults(recipe: Recipe, stage: Any) -> Found:
    if (fresh := fresh_adapter(recipe, stage)) is not None:
        yield from adapter_faults(recipe, fresh)
    if isinstance(stage.data, list):
        yield from source_faults(("data",), stage.data)
    yield from _row_faults(recipe, stage)
    yield from _trainer_faults(recipe, stage, "SFTConfig")
    longest, context = given(stage.trainer).get("max_length"), context_of(recipe.base)
    if longest and context and longest > context:
        yield ("trainer", "max_length"), f"max_length is {longest} and the model's context {context}; give at most that"


def _row_faults(recipe: Recipe, stage: Sft) -> Found:
    """A row of each source that the model's tokenizer can make nothing of."""
    tokenizer = load_tokenizer(recipe.base)
    try:
        rows = [] if tokenizer is None else list(first_rows(recipe, stage))
    except (ValueError, OSError):  # said of the source
        return
    for row in rows:
        yield from tried(("data",), partial(sft_row, row, stage, tokenizer, recipe.name_of(stage)))


def _rl_faults(recipe: Recipe, stage: Rl) -> Found:
    if stage.adapter is not None:
        yield from adapter_faults(recipe, stage.adapter)
    credit_faults = list(tried(("credit",), lambda: make_credit(stage)))
    yield from credit_faults
    if not credit_faults:
        yield from _unreadable_faults(recipe, stage)
    yield from tried(("risk",), lambda: make_risk(stage))
    yield from _conflicts(recipe, stage)
    yield from _trainer_faults(recipe, stage, "GRPOConfig")
    task, faults = None, []
    if stage.task is not None:
        settings = stage.task
        faults = list(
            tried(
                ("task",),
                lambda: make_task(settings).instances(
                    stage.instances, settings.n, recipe.seed, "train", settings.discriminating
                ),
            )
        )
        yield from faults
        task = None if faults else make_task(settings)
    built = list(tried(("reward",), lambda: make_reward(stage, task, recipe.seed))) if not faults else []
    yield from built
    if not faults and not built:
        yield from _reward_faults(recipe, stage, task)


def _unreadable_faults(recipe: Recipe, stage: Rl) -> Found:
    """Layers that the model does not have, or whose attention token credit cannot read."""
    credit = make_credit(stage)
    if not credit.reads_attention or reads_pictures(recipe.base):
        return
    try:
        model = meta_model(recipe.base)
    except ConfigError:  # said of the base
        return
    if model is not None:
        where = ("credit",) if credit.layers is None else ("credit", "layers")
        yield from tried(where, lambda: refuse_unreadable(model, credit.layers))


def _reward_faults(recipe: Recipe, stage: Rl, task: CertificateTask | None) -> Found:
    """The rows of the stage, and its reward on a few of them."""
    if any(out_of_reach(source) for source in stage.data or ()):
        if stage.reward == "math":  # which can be tried without the data; what is left out, `needs` says
            column = str(stage.reward_options.get("column", "answer"))
            yield from _tried_reward(
                recipe, stage, task, [{"prompt": "1 + 1", column: "2"}, {"prompt": "1", column: "1"}]
            )
        return
    few = stage if task is None else stage.model_copy(update={"instances": min(stage.instances, ROWS), "hints": 0.0})
    try:
        rows = [dict(row) for row in training_rows(few, recipe.seed)]
    except (ValueError, OSError) as error:
        yield ("task" if task else "data",), " ".join(str(error).split())
        return
    if not rows:
        yield ("data",), "data is empty: its sources hold no rows"
        return
    yield from _context_faults(recipe, stage, rows)
    if is_own(stage.reward) or stage.reward not in NOT_JUDGED:
        for few_rows in rows_to_try(stage, rows, task):
            yield from _tried_reward(recipe, stage, task, few_rows)


def _context_faults(recipe: Recipe, stage: Rl, rows: list[Row]) -> Found:
    """Prompts and completions that the model cannot hold, or prompts that it cannot be given."""
    tokenizer, context = load_tokenizer(recipe.base), context_of(recipe.base)
    if tokenizer is None:
        return
    faults = list(tried(("task" if stage.task else "data",), lambda: longest_prompt(rows, tokenizer)))
    yield from faults
    if faults or context is None:
        return
    prompt, completion = longest_prompt(rows, tokenizer), value_of(stage.trainer, "max_completion_length")
    if completion and prompt + completion > context:
        yield (
            ("trainer", "max_completion_length"),
            (
                f"a prompt of {prompt} tokens and max_completion_length {completion} do not fit the model's context of "
                f"{context}; give at most {max(context - prompt, 0)}, or shorter prompts"
            ),
        )


def _tried_reward(recipe: Recipe, stage: Rl, task: CertificateTask | None, rows: list[Row]) -> Found:
    reward = make_reward(stage, task, recipe.seed)
    try:
        wrong = [] if task is None else wrong_texts(rows, task)
        faults = list(faults_of_reward(reward, rows, right_forms(stage, rows, task), wrong))
    except RlError as error:  # of the guard: the reward cannot be sent to its workers
        faults = [str(error)]
    finally:
        if isinstance(reward, Guarded):
            reward.close()
    yield from ((("reward",), " ".join(fault.split())) for fault in faults)


def _conflicts(recipe: Recipe, stage: Rl) -> Found:
    """What is right alone and wrong together."""
    trainer = given(stage.trainer)
    credit = given(stage.credit) if stage.credit is not None else {"strategy": "off"}
    strategy = credit.get("strategy", "coupled")
    if strategy != "off":
        yield from ((("credit",), message) for message in _lost_credit(strategy, credit, trainer))
    yield from _cache_faults(recipe, stage, trainer)
    if stage.risk is None:
        return
    risk = given(stage.risk)
    if "scale_rewards" in trainer and trainer["scale_rewards"] not in (False, "none"):
        yield ("risk",), "risk takes the place of scale_rewards, which would do nothing; leave one of them out"
    if trainer.get("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        yield ("risk",), "risk needs one reward a completion: set multi_objective_aggregation to sum_then_normalize"
    batch, group = (trainer.get(key) or 0 for key in ("per_device_train_batch_size", "num_generations"))
    if batch > 0 and group > 0:
        steps = trainer.get("steps_per_generation") or trainer.get("gradient_accumulation_steps") or 1
        prompts = batch * steps // group
        bundle = max(risk.get("bundle", 1), 1)
        if prompts % bundle:
            yield (
                ("risk", "bundle"),
                f"a batch of {prompts} prompts cannot be cut into bundles of {bundle}: give a divisor of {prompts}, or "
                "a larger batch",
            )
    yield from _tail_faults(stage)
    tail = risk.get("weight", 0.5) > 0.5 and risk.get("alpha", 0.5) < 1
    if stage.reward in BINARY and tail and not risk.get("allow_binary"):
        yield (
            ("risk",),
            (
                f"weight {risk['weight']} with the 0/1 reward {stage.reward!r} leaves seldom solved prompts without "
                "gradient: use at most 0.5, a graded reward, or allow_binary: true"
            ),
        )


def _tail_faults(stage: Rl) -> Found:
    """Of risk: a tail that holds the worst completion alone."""
    group = value_of(stage.trainer, "num_generations")
    try:
        risk = make_risk(stage)
    except RlError:  # said of the value
        return
    if risk is not None and group and group > 0 and (fault := tail_fault(group, risk)):
        yield ("risk",), fault


def _cache_faults(recipe: Recipe, stage: Rl, trainer: dict[str, Any]) -> Found:
    """A cache that the rollouts cannot have, or one that nobody measures."""
    if trainer.get("cache_implementation") == "quantized":
        yield (
            ("trainer", "cache_implementation"),
            "with a quantised cache another model samples than learns, and here nothing measures how far; say cache: "
            "fp8, int4 or int2 in the stage",
        )
    if stage.cache is None:
        return
    if trainer.get("cache_implementation") is not None:
        yield ("cache",), "cache and trainer.cache_implementation both set the cache of rollouts; leave one of them out"
    for key in ("use_vllm", "use_transformers_continuous_batching"):
        if trainer.get(key):
            yield ("cache",), f"cache is one of plain transformers, and {key} has its own; leave one of them out"
    if stage.share_prompts:
        yield ("cache",), "share_prompts fills a cache of its own, which cannot be another; leave one of them out"
    for key in ("fsdp", "deepspeed"):
        if trainer.get(key):
            yield ("cache",), f"cache is compared with the whole policy, which {key} cuts up; leave one of them out"
    import torch

    try:
        config = base_config(recipe.base)
    except ConfigError:  # said of the model
        config = None
    if stage.cache == "offloaded" and not torch.accelerator.is_available():
        yield ("cache",), "offloaded moves what a GPU holds to main memory, and there is no GPU here; leave it out"
    elif stage.cache in BITS and find_spec("hqq") is None:
        yield ("cache",), f"{stage.cache} needs the package hqq, which is not here: pip install hqq; fp8 needs none"
    elif config is not None:
        yield from tried(("cache",), lambda: cache_settings(str(stage.cache), config, torch.device("meta")))


def _lost_credit(strategy: str, credit: dict[str, Any], trainer: dict[str, Any]) -> Iterator[str]:
    """Settings under which token credit would do nothing, or cannot be found."""
    for key, value in (("importance_sampling_level", "sequence"), ("loss_type", "luspo")):
        if trainer.get(key) == value:
            yield (
                f"{key}: {value} weighs whole sequences, which erases token credit: give another {key}, or credit: null"
            )
    for key in ("fsdp", "deepspeed"):
        if trainer.get(key):
            yield f"token credit reads a part of the model's forward, which {key} does not allow; leave {key} out"
    low = next(iter(credit.get("horizon") or TokenCredit.horizon), 0)
    length = trainer.get("max_completion_length")
    if strategy in ("coupled", "anchor", "bottom") and length and length < 2 * low:
        yield (
            f"{strategy} credits by the attention that a token gets {low} tokens later or more, and leaves "
            f"responses shorter than twice that alone: with max_completion_length {length} it would do nothing; lower "
            "the horizon"
        )


def _verify_faults(recipe: Recipe, stage: Any) -> Found:
    task = stage.task or rl_of(recipe, stage).task
    unfit = list(
        tried(
            ("task",),
            lambda: make_task(task).instances(stage.instances, task.n, stage.seed, "test", task.discriminating),
        )
    )
    if unfit:
        yield from unfit
        return
    context = context_of(recipe.base)
    if context is not None and stage.max_new_tokens >= context:
        yield (
            ("max_new_tokens",),
            f"max_new_tokens is {stage.max_new_tokens} and the model's context {context}; leave room for the prompt",
        )
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


def adapter_faults(recipe: Recipe, adapter: Adapter) -> Found:
    faults = [*tried(("adapter",), lambda: moka_config(adapter)), *_expression_faults(adapter)]
    yield from faults
    if not faults:
        yield from _target_faults(recipe, adapter)


def _target_faults(recipe: Recipe, adapter: Adapter) -> Found:
    """The adapter put on a model without weights; where the model's configuration is not to be had, nothing."""
    try:
        targets_of(recipe.base, adapter)
    except ConfigError:  # said of the base
        return
    except AdapterError as error:
        model = meta_model(recipe.base)
        wrong = list(unmatched([name for name, _ in model.named_modules()], linear_names(model), adapter))
        yield from ((("adapter", message.partition(":")[0]), message) for message in wrong)
        if not wrong:
            yield ("adapter",) if adapter.target_modules is None else ("adapter", "target_modules"), str(error)


def _expression_faults(adapter: Adapter) -> Found:
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
    for key, allowed in CHOICES.items() if config_class == "GRPOConfig" else ():
        if key in values and values[key] not in allowed:
            close = difflib.get_close_matches(str(values[key]), [str(one) for one in allowed], 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            shown = ", ".join(repr(one) for one in allowed if isinstance(one, str))
            yield ("trainer", key), f"{key} is {values[key]!r}; allowed: {shown}{hint}"
    if values.get("max_steps") == 0:
        yield ("trainer", "max_steps"), "max_steps is 0; give at least 1, or leave it out to go by num_train_epochs"
    if values.get("use_vllm") and find_spec("vllm") is None:
        yield (
            ("trainer", "use_vllm"),
            "use_vllm needs the package vllm, which is not installed: install it, or leave it out",
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            getattr(trl, config_class)(**trainer_arguments(recipe, stage.trainer, Path(folder)))
        except Exception as error:  # the libraries refuse values with whatever error comes up, ZeroDivisionError too
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            yield ("trainer",), f"trl.{config_class} refuses these values: {kind}{' '.join(str(error).split())}"
