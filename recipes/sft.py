"""The sft stage: supervised fine-tuning of a fresh adapter on the selection, through TRL."""

import sys
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..data_selection.encoding import images_of
from ..rl.labelled_head import score_labelled_only
from .checkpoints import Checkpoints
from .lifelong import is_sequence, run_lifelong
from .pictures import as_paths, fitting, is_processor, picture_training
from .progress import Report
from .rows import Row, fingerprint, read_sources, tokenize
from .run_folder import RunError, RunFolder
from .schema import Recipe, Sft
from .select import selected_rows
from .trainer_args import given, value_of
from .training import begin, exact_parameters, new_adapter, train, trainer_arguments


def run_sft(recipe: Recipe, stage: Sft, run: RunFolder, control: str | None = None) -> None:
    """Train on the stage's data, or on that of a `control` of equal size, otherwise alike."""
    if is_sequence(recipe, stage):
        return run_lifelong(recipe, stage, run, control)
    name = f"sft-{control}" if control else "sft"
    folder, last = begin(run, name)
    checkpoints = Checkpoints(run.key(name), last, given(stage.trainer))
    rows = _rows(stage, run, control)
    model, tokenizer = new_adapter(recipe, stage.adapter, run.path)
    if is_processor(tokenizer):
        return _run_on_pictures(recipe, stage, run, name, rows, model, tokenizer, checkpoints)
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
    stage: Sft,
    run: RunFolder,
    name: str,
    rows: list[Row],
    model: Any,
    processor: Any,
    checkpoints: Checkpoints,
) -> None:
    """The same for a model that reads pictures."""
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


def _rows(stage: Sft, run: RunFolder, control: str | None) -> list[Row]:
    if isinstance(stage.data, str):
        return selected_rows(run, control)
    return read_sources(stage.data, "data")
