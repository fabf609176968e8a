"""The sft stage: supervised fine-tuning of a fresh adapter, or of the newest one, through TRL."""

import sys
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..data_selection.encoding import images_of
from ..rl.labelled_head import score_labelled_only
from .checkpoints import Checkpoints
from .dedup import kept_rows
from .lifelong import is_sequence, run_lifelong
from .links import own_sources
from .names import parts
from .pictures import as_paths, fitting, is_processor, picture_training
from .progress import Report
from .rows import Row, fingerprint, read_sources, tokenize
from .run_folder import RunError, RunFolder
from .schema import Recipe, Sft
from .select import selected_rows
from .steps import Step
from .trainer_args import given, value_of
from .training import begin, begun_adapter, exact_parameters, train, trainer_arguments


def run_sft(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Train on the stage's data, or, as a control, on other data of equal size, otherwise alike."""
    name, stage = step.name, step.stage
    assert isinstance(stage, Sft)
    if is_sequence(recipe, stage):
        return run_lifelong(recipe, step, run)
    folder, last = begin(run, name)
    checkpoints = Checkpoints(run.key(name), last, given(stage.trainer))
    rows = _rows(stage, step, run)
    model, tokenizer = begun_adapter(recipe, step, run.path)
    if is_processor(tokenizer):
        return _run_on_pictures(recipe, step, run, rows, model, tokenizer, checkpoints)
    dataset = Dataset.from_list([tokenize(row, tokenizer) for row in rows])
    with exact_parameters(model):
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**trainer_arguments(recipe, stage.trainer, folder)),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[checkpoints, Report(name, run, shown=("loss",))],
        )
    score_labelled_only(trainer.model)
    _say_what_is_cut(name, len(rows), trainer, run.processes.first)
    longest = trainer.args.max_length or max(map(len, dataset["input_ids"]))
    truncated = sum(len(ids) > longest for ids in dataset["input_ids"])
    run.add_data(name, rows=len(rows), sha256=fingerprint(rows), truncated=truncated, kept=len(trainer.train_dataset))
    train(trainer, run, name, folder, tokenizer, checkpoints)


def _run_on_pictures(
    recipe: Recipe,
    step: Step,
    run: RunFolder,
    rows: list[Row],
    model: Any,
    processor: Any,
    checkpoints: Checkpoints,
) -> None:
    """The same for a model that reads pictures."""
    name, stage = step.name, step.stage
    assert isinstance(stage, Sft)
    folder = run.path / name
    rows = [as_paths(row, folder) for row in rows]
    fit = fitting(rows, processor, name, value_of(stage.trainer, "max_length"), run.processes.first)
    arguments = {**trainer_arguments(recipe, stage.trainer, folder), "remove_unused_columns": False}
    with exact_parameters(model):
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            processing_class=processor,
            **picture_training(fit, processor),
            callbacks=[checkpoints, Report(name, run, shown=("loss",))],
        )
    score_labelled_only(trainer.model)
    pictures = sum(len(images_of(row)) for row in fit)
    run.add_data(name, rows=len(rows), sha256=fingerprint(rows), kept=len(fit), pictures=pictures)
    train(trainer, run, name, folder, processor, checkpoints)


def _say_what_is_cut(name: str, rows: int, trainer: Any, aloud: bool) -> None:
    """TRL drops the rows that have nothing left to learn within `max_length`, and says so only in its log."""
    kept = len(trainer.train_dataset)
    dropped = f"{name}: {rows - kept} of {rows} rows have nothing to learn within max_length {trainer.args.max_length}"
    if not kept:
        raise RunError(f"{dropped}; give a larger max_length under trainer")
    if kept < rows and aloud:
        print(f"{dropped}, and are left out", file=sys.stderr)


def _rows(stage: Sft, step: Step, run: RunFolder) -> list[Row]:
    if step.rows is None:
        return read_sources(own_sources(stage), "data")
    if parts(step.rows).kind == "dedup":
        return list(kept_rows(run.path / step.rows))
    return selected_rows(run, step.rows, step.control)
