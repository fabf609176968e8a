"""The sft stage over a sequence of datasets: pick, train, prune, dataset after dataset (`data_selection.lifelong`).

The folder of the stage, and that of each of its controls, holds `lifelong/` with one folder a step, with which a stage
that was cut goes on unless data, trainer or start have changed, and the adapter of the last step.
"""

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..data_selection import Store, score_samples
from ..data_selection.lifelong import MODEL, lifelong
from ..data_selection.performance import answer_performance
from ..data_selection.selection import write_atomic
from ..rl.labelled_head import score_labelled_only
from .links import feeder
from .pictures import fitting, is_processor, picture_training
from .pool import INPUTS, read_if_there
from .precision import save_plan
from .progress import Report
from .rows import Row, fingerprint, tokenize
from .run_folder import RunError, RunFolder
from .schema import Recipe, Sft
from .schema_rows import AdaptInfSelect
from .select_adapt_inf import adapt_inf, budget_of, prepared, scoring_settings, start_adapter
from .steps import Step
from .trainer_args import given, value_of
from .training import ADAPTER, exact_parameters, saved_adapter, trainer_arguments

STEPS, TAKEN = "lifelong", "taken.json"


def is_sequence(recipe: Recipe, stage: Sft) -> bool:
    """Whether the stage trains on a sequence of datasets."""
    select = feeder(recipe, stage)
    return isinstance(select, AdaptInfSelect) and select.datasets is not None


def run_lifelong(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Learn the datasets of the select stage in sequence, by Adapt-inf's picks or by those of a control."""
    name, stage = step.name, step.stage
    assert isinstance(stage, Sft)
    select: AdaptInfSelect = feeder(recipe, stage)
    data, tests = prepared(select, run.path / str(step.rows))
    start = start_adapter(select, step, run)
    key = _key(stage, tests, start)
    inputs = json.dumps({**key, "data": {skill: fingerprint(rows) for skill, rows in data.items()}}, indent=1)
    same = read_if_there(run.path / name / INPUTS) == inputs
    taken = _taken(run.path / name / STEPS) if same else {"steps": 0, "seconds": 0.0}
    folder = run.begin(name, (INPUTS, STEPS) if same else (), step=taken["steps"], seconds=taken["seconds"])
    write_atomic(folder / INPUTS, inputs.encode())
    learner = AdapterLearner(recipe, select, stage, run, name, tests, start, taken)
    budget = budget_of(select, max(len(rows) for rows in data.values()))
    found = lifelong(
        data,
        learner,
        budget=budget,
        keep=select.keep,
        policy=step.control or "adapt_inf",  # type: ignore[arg-type]
        method=adapt_inf(select),
        seed=recipe.seed,
        out_dir=folder / STEPS,
        key=key,
    )
    shutil.copytree(folder / STEPS / f"step-{len(data) - 1:02d}" / MODEL, folder / ADAPTER)
    save_plan(recipe.base, run.path, folder / ADAPTER)
    trained, total = learner.model.get_nb_trainable_parameters()
    facts = {"budget": budget, "keep": select.keep, "lifelong": found.to_dict()}
    steps = sum(learner.steps(min(budget, sum(counts.values()))) for counts in found.picked)
    run.finish(name, steps=steps, trainable_parameters=trained, parameters=total, **facts)


def _taken(steps: Path) -> dict[str, Any]:
    """Optimiser steps and seconds up to the last data set that was trained on."""
    trained = [folder / TAKEN for folder in sorted(steps.glob("step-*")) if (folder / MODEL).is_dir()]
    return json.loads(trained[-1].read_text()) if trained else {"steps": 0, "seconds": 0.0}


def _key(stage: Sft, tests: Mapping[str, Sequence[Row]], start: Path) -> dict[str, Any]:
    """What the learner depends on, besides the data."""
    digest = hashlib.sha256()
    for file in sorted(start.glob("adapter_*")):
        digest.update(file.read_bytes())
    return {
        "trainer": {key: str(value) for key, value in given(stage.trainer).items()},
        "tests": {skill: fingerprint(rows) for skill, rows in tests.items()},
        "start": digest.hexdigest(),
    }


class AdapterLearner:
    """An adapter on the recipe's base as a `data_selection.lifelong.Learner`."""

    def __init__(
        self,
        recipe: Recipe,
        select: AdaptInfSelect,
        stage: Sft,
        run: RunFolder,
        name: str,
        tests: Mapping[str, Sequence[Row]],
        start: Path,
        taken: Mapping[str, Any],
    ) -> None:
        """taken: optimiser steps and seconds of the data sets before."""
        self.recipe, self.select, self.stage, self.run, self.name = recipe, select, stage, run, name
        self.tests, self.start = tests, start
        self.before = taken["steps"]
        self.started = time.monotonic() - taken["seconds"]
        self.model: Any = None
        self.tokenizer: Any = None

    def restore(self, folder: Path | None) -> None:
        self.model, self.tokenizer = saved_adapter(self.recipe, folder or self.start, self.run.path)

    def score(self, rows: Sequence[Row], folder: Path) -> Store:
        settings = scoring_settings(self.recipe, self.select)
        return score_samples(self.model, self.tokenizer, list(rows), **settings, out_dir=folder)

    def performance(self, skill: str) -> dict[str, float]:
        sizes = {"batch_size": self.select.batch_size, "max_length": self.select.max_length}
        return answer_performance(self.model, self.tokenizer, self.tests[skill], **sizes)

    def steps(self, count: int) -> int:
        """Of the optimiser, for so many rows."""
        args = SFTConfig(**trainer_arguments(self.recipe, self.stage.trainer, self.run.path / self.name))
        if args.max_steps > 0:
            return args.max_steps
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return max(1, math.ceil(args.num_train_epochs * count / batch))

    def train(self, rows: Sequence[Row], count: int, folder: Path) -> None:
        arguments = trainer_arguments(self.recipe, self.stage.trainer, folder)
        arguments |= {"max_steps": self.steps(count), "save_strategy": "no"}
        data: dict[str, Any]
        if is_processor(self.tokenizer):
            longest = value_of(self.stage.trainer, "max_length")
            data = picture_training(fitting(rows, self.tokenizer, self.name, longest, True), self.tokenizer)
            arguments["remove_unused_columns"] = False
        else:
            data = {"train_dataset": Dataset.from_list([tokenize(row, self.tokenizer) for row in rows])}
        with exact_parameters(self.model):
            trainer: Any = SFTTrainer(
                model=self.model,
                args=SFTConfig(**arguments),
                processing_class=self.tokenizer,
                **data,
                callbacks=[_Report(self.name, self.run, self.before)],
            )
        score_labelled_only(trainer.model)
        if not len(trainer.train_dataset):
            longest = trainer.args.max_length
            raise RunError(f"{self.name}: none of {len(rows)} rows has anything to learn within max_length {longest}")
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.before += trainer.state.global_step
        if not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad):
            raise RunError(f"{self.name}: the adapter is not finite after training; lower learning_rate")
        trainer.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        shutil.rmtree(folder / "trainer", ignore_errors=True)
        taken = {"steps": self.before, "seconds": time.monotonic() - self.started}
        write_atomic(folder.parent / TAKEN, json.dumps(taken).encode())


class _Report(Report):
    """Counts steps on over the datasets."""

    def __init__(self, stage: str, folder: RunFolder, before: int) -> None:
        super().__init__(stage, folder, shown=("loss",))
        self.before = before

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        state = copy.copy(state)
        state.global_step += self.before
        super().on_log(args, state, control, logs, **kwargs)
