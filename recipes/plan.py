"""What a recipe will do, before it does it: steps, tokens, memory and time of each stage."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import ceil
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from . import needs
from .data_faults import exhausted, source_faults
from .lifelong import is_sequence
from .links import feeder, fresh_adapter, own_sources, rl_of, start
from .memory import (
    Memory,
    adapter_bytes,
    base_bytes,
    dense_numbers,
    generated_at_once,
    readable,
    rl_memory,
    rollout_bytes,
    sft_memory,
)
from .names import parts
from .pictures import reads_pictures
from .probe import Probe, Prober, at_hand
from .rendered import load_tokenizer, longest_prompt
from .rl import make_task, training_rows
from .rows import read_sources, tokenize
from .run_folder import recipe_text
from .schema import Recipe, Rl, Sft, Verify
from .schema_model import Adapter
from .schema_rows import AdaptInfSelect, Dedup, Select
from .targets import ConfigError, Targets, context_of, meta_model, targets_of
from .trainer_args import value_of

COUNTED_ROWS = 2000  # that are made into tokens to count them; of more the mean is taken to hold
LOOKED_AT = 64  # prompts, for the longest


@dataclass(frozen=True)
class StagePlan:
    """Of one stage. None stands for what cannot be known before the run, or without the model."""

    stage: str
    runs: int = 1
    """Itself and its controls."""
    rows: int | None = None
    steps: int | None = None
    """Of the optimizer, a run."""
    tokens: int | None = None
    """That go forward and backward, a run."""
    tokens_are: str = "bound"
    """counted, estimated from the first rows, or a bound: no row is longer than max_length."""
    generated: int | None = None
    """At most, a run."""
    memory: Memory | None = None
    seconds: float | None = None
    """Of all runs, without loading and scoring."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory.parts() if self.memory else None}


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    stages: list[StagePlan]
    probed: bool

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": yaml.safe_load(recipe_text(self.recipe)),
            "device": _device(),
            "probed": self.probed,
            "stages": [stage.as_dict() for stage in self.stages],
        }

    def as_json(self) -> str:
        return _json(self.as_dict())


@dataclass(frozen=True)
class SweepPlan:
    recipe: Recipe
    points: dict[str, Plan]
    """By the names of `krontune.recipes.sweep.points`."""

    def as_json(self) -> str:
        return _json({"name": self.recipe.name, "points": {name: one.as_dict() for name, one in self.points.items()}})


def plan(recipe: Recipe, probe: bool | None = None) -> Plan:
    """Plan a recipe that `check` finds no fault in.

    Args:
        probe: time a micro-batch and a few tokens on the loaded model; None does so where its weights are here.

    Raises:
        BaseModelError: the model is to be probed and cannot be loaded.
    """
    return _Planner(recipe, at_hand(recipe) if probe is None else probe).plan()


def plan_sweep(recipe: Recipe, points: dict[str, Recipe], probe: bool | None = None) -> SweepPlan:
    """Plan the points of a sweep, each by itself; probe: as of `plan`.

    Raises:
        BaseModelError: as of `plan`.
    """
    plans, last = {}, None
    for name, one in points.items():
        last = _Planner(one, at_hand(one) if probe is None else probe, last)
        plans[name] = last.plan()
    return SweepPlan(recipe, plans)


class _Planner:
    def __init__(self, recipe: Recipe, probe: bool, before: "_Planner | None" = None) -> None:
        """before: that of another recipe, whose loaded model serves again where it is the same."""
        self.recipe, self.probe = recipe, probe
        self.triton = torch.cuda.is_available()
        self.tokenizer = load_tokenizer(recipe.base)
        trained = [stage for stage in recipe.stages if isinstance(stage, Sft | Rl)]
        self.adapter = (fresh_adapter(recipe, trained[0]) if trained else None) or Adapter()
        same = before is not None and (before.recipe.base, before.adapter) == (recipe.base, self.adapter)
        self.prober = before.prober if before is not None and same else Prober(recipe, self.adapter)
        self.picked: int | None = None
        try:  # the memory of models that read pictures is not estimated
            self.model: Any = None if reads_pictures(recipe.base) else meta_model(recipe.base)
        except ConfigError:
            self.model = None
        self.targets: Targets | None = None if self.model is None else targets_of(recipe.base, self.adapter)

    def plan(self) -> Plan:
        own: dict[type, Any] = {
            Dedup: self.dedup,
            Select: self.select,
            AdaptInfSelect: self.adapt_inf,
            Sft: self.sft,
            Rl: self.rl,
            Verify: self.verify,
        }
        stages = [own[type(stage)](stage) for stage in self.recipe.stages]
        named = [replace(one, stage=name) for name, one in zip(self.recipe.names, stages, strict=True)]
        return Plan(self.recipe, named, self.probe)

    def dedup(self, stage: Dedup) -> StagePlan:
        """How many rows it looks through; how many it keeps is not known before."""
        before = feeder(self.recipe, stage)
        rows = self.picked if before is not None else exhausted(source_faults(("data",), own_sources(stage))).rows
        return StagePlan("dedup", rows=rows)

    def select(self, stage: Select) -> StagePlan:
        pool = None
        if feeder(self.recipe, stage) is None:
            pool = exhausted(source_faults(("raw",), own_sources(stage))).rows
        self.picked = None
        if isinstance(stage.k, int):
            self.picked = stage.k
        elif stage.k is not None and pool is not None:
            self.picked = int(stage.k * pool)
        return StagePlan("select", rows=self.picked)

    def adapt_inf(self, stage: AdaptInfSelect) -> StagePlan:
        self.picked = stage.k if isinstance(stage.k, int) else None
        warmed = stage.adapter_from is None and start(self.recipe, stage) is None
        return StagePlan("select", rows=self.picked, steps=stage.warm_up.steps if warmed else None)

    def sft(self, stage: Sft) -> StagePlan:
        trainer = stage.trainer
        longest = value_of(trainer, "max_length") or context_of(self.recipe.base) or 0
        lengths = None
        if not isinstance(stage.data, str) and self.tokenizer and not any(map(needs.out_of_reach, stage.data)):
            lengths = list(self._lengths(stage.data))
        rows = len(lengths) if lengths is not None else self.picked if stage.data == "select" else None
        known = [min(length, longest) for length in lengths or () if length is not None]
        batch = value_of(trainer, "per_device_train_batch_size") * value_of(trainer, "gradient_accumulation_steps")
        steps = _steps(trainer, rows, batch)
        if steps is not None and is_sequence(self.recipe, stage):
            steps *= len(feeder(self.recipe, stage).datasets)
        mean = sum(known) / len(known) if known else longest
        tokens = None if steps is None else round(steps * batch * mean)
        tokens_are = "bound" if not known else "counted" if len(known) == rows else "estimated"
        length = max(known, default=longest)
        memory = seconds = None
        targets = self.targets
        if targets is not None:
            memory = sft_memory(self.model, self.recipe.base, self._trained(stage), targets, length, self.triton)
        if self.probe and tokens is not None:
            one = self.prober.training(trainer, value_of(trainer, "per_device_train_batch_size"), round(mean))
            seconds = one * tokens * (1 + len(stage.controls))
        return StagePlan("sft", 1 + len(stage.controls), rows, steps, tokens, tokens_are, None, memory, seconds)

    def _trained(self, stage: Any) -> Any:
        """The stage with the adapter that it trains, its own or the one that it continues."""
        return stage.model_copy(update={"adapter": self.adapter})

    def _lengths(self, sources: Any) -> Iterator[int | None]:
        """Tokens of each row; None beyond the first COUNTED_ROWS."""
        for number, row in enumerate(read_sources(sources, "data")):
            yield len(tokenize(row, self.tokenizer)["input_ids"]) if number < COUNTED_ROWS else None

    def rl(self, stage: Rl) -> StagePlan:
        trainer, runs = stage.trainer, 1 + len(stage.controls)
        steps, batch = needs.steps_of(stage), needs.batch_of(stage)
        completion, prompt = value_of(trainer, "max_completion_length"), self._prompt(stage)
        rows = stage.instances if stage.task is not None else needs.count_rows(stage.data or ())
        generated = None if steps is None else steps * batch * completion
        tokens = None if steps is None or prompt is None else steps * batch * (prompt + completion)
        memory = seconds = None
        if self.targets is not None and prompt is not None:
            memory = rl_memory(self.model, self.recipe.base, self._trained(stage), self.targets, prompt, self.triton)
        if self.probe and steps is not None and tokens is not None and prompt is not None:
            each = value_of(trainer, "per_device_train_batch_size")
            at_once = generated_at_once(stage)
            found = Probe(
                self.prober.training(trainer, each, prompt + completion), *self.prober.generating(at_once, prompt)
            )
            rounds = ceil(steps * batch / at_once)
            answering = rounds * (found.prefill + found.decode_step * completion)
            seconds = runs * (tokens * found.train_token + answering)
        return StagePlan("rl", runs, rows, steps, tokens, "bound", generated, memory, seconds)

    def _prompt(self, stage: Rl) -> int | None:
        """Tokens of the longest of the first prompts."""
        if self.tokenizer is None or any(needs.out_of_reach(source) for source in stage.data or ()):
            return None
        few = stage if stage.task is None else stage.model_copy(update={"instances": min(stage.instances, LOOKED_AT)})
        rows = training_rows(few, self.recipe.seed)
        return longest_prompt((dict(row) for row in islice(rows, LOOKED_AT)), self.tokenizer)

    def verify(self, stage: Verify) -> StagePlan:
        before = self.recipe.stages[: self.recipe.place(stage)]
        trained = [s for s in before if isinstance(s, Sft | Rl)]
        runs = 1 + sum(1 + len(s.controls) for s in trained)  # the base and every adapter
        generated = stage.instances * (1 + stage.samples) * stage.max_new_tokens
        settings = stage.task or rl_of(self.recipe, stage).task
        task, memory, seconds = make_task(settings), None, None
        few = task.dataset(min(stage.instances, LOOKED_AT), settings.n, stage.seed, "test", settings.discriminating)
        prompt = None if self.tokenizer is None else longest_prompt((dict(row) for row in few), self.tokenizer)
        if self.targets is not None and prompt is not None:
            size = min(stage.batch_size, stage.instances)
            base = self.recipe.base
            dense = dense_numbers(self.model, base, self.targets) if base.dense_generation else 0
            rollouts = rollout_bytes(self.model.config, size, prompt, stage.max_new_tokens, dense=dense)
            weights = base_bytes(self.model, base)
            memory = Memory(weights, adapter_bytes(self.targets.trainable)[0], 0, 0, 0, 0, rollouts)
            if self.probe:
                prefill, step = self.prober.generating(size, prompt)
                rounds = ceil(stage.instances * (1 + stage.samples) / size)
                seconds = runs * rounds * (prefill + step * stage.max_new_tokens)
        return StagePlan("verify", runs, stage.instances, None, None, "bound", generated, memory, seconds)


def _steps(trainer: Any, rows: int | None, batch: int) -> int | None:
    most = value_of(trainer, "max_steps")
    if most > 0:
        return most
    return None if rows is None else ceil(value_of(trainer, "num_train_epochs") * ceil(rows / batch))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2) + "\n"


COLUMNS = ("stage", "runs", "rows", "steps", "trained", "generated", "memory", "time")
NOT_PROBED = "time was not probed; --probe loads the model and tries a few tokens"


def print_plan(found: Plan) -> None:
    """Two tables: what each stage does, and what its memory is made of."""
    console = Console()
    work = _table(f"{found.recipe.name}, on {_device()}; trained and generated are tokens of one run", COLUMNS, 1)
    for stage in found.stages:
        work.add_row(*_line(stage))
    console.print(work)
    sizes = [(stage.stage, stage.memory.parts()) for stage in found.stages if stage.memory]
    if sizes:
        head = ("part", *(stage for stage, _ in sizes))
        memory = _table("memory at the peak; training and rollouts take turns", head, 1)
        for name in sizes[0][1]:
            memory.add_row(name, *(readable(parts[name]) if parts[name] else "" for _, parts in sizes))
        console.print(memory)
    if not found.probed:
        console.print(NOT_PROBED)


def print_sweep_plan(found: SweepPlan) -> None:
    """One table with a block of lines for each point."""
    console = Console()
    title = f"{found.recipe.name}, {len(found.points)} runs on {_device()}; trained and generated are tokens of one run"
    work = _table(title, ("point", *COLUMNS), 2)
    for name, one in found.points.items():
        for number, stage in enumerate(one.stages):
            work.add_row("" if number else name, *_line(stage), end_section=number + 1 == len(one.stages))
    console.print(work)
    console.print("a stage that points have in common, made from the same, is run once; --json has the memory in parts")
    if not all(one.probed for one in found.points.values()):
        console.print(NOT_PROBED)


def _table(title: str, columns: Sequence[str], names: int) -> Table:
    """names: how many of the first columns hold words."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < names else "right", overflow="fold")
    return table


def _line(stage: StagePlan) -> list[str]:
    most = "" if stage.tokens_are == "counted" else "<= " if stage.tokens_are == "bound" else "~ "
    return [
        stage.stage,
        str(stage.runs),
        _number(stage.rows),
        _number(stage.steps),
        _number(stage.tokens, most),
        _number(stage.generated, "<= "),
        _memory(stage),
        _time(stage.seconds),
    ]


def _memory(stage: StagePlan) -> str:
    """Of a stage that loads no model nothing is said."""
    unknown = "" if parts(stage.stage).kind in ("dedup", "select") else "?"
    return readable(stage.memory.peak) if stage.memory else unknown


def _number(value: int | None, most: str = "") -> str:
    return "" if value is None else f"{most}{value:,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
