"""The select stage with method adapt_inf: scores and gradients of the pool, and what is picked by them.

The folder of the stage holds what was picked (`selected.jsonl`, `selection/`), two controls of equal size
(`control.jsonl`, `balanced.jsonl`), the numbers behind the report's pictures, and what a stage that was cut goes on
with: the pool as files (`pool/`), the adapter that was warmed up (`warm_up/`), and the scores (`store/`). These are
thrown away where a data file changed. Over a sequence of datasets only data and adapter are prepared here: what is
picked depends on what was learned before, so that the sft stage picks (see `lifelong`).
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ..data_selection import AdaptInf, Selection, score_samples
from ..data_selection.adapt_inf import balanced_control, usable_rows
from ..data_selection.files import open_atomic
from ..data_selection.projections import Factorised
from ..data_selection.selection import top_k, uniform_noise, write_atomic
from ..rl.labelled_head import score_labelled_only
from .links import own_sources
from .pictures import as_paths, is_processor, located, picture_training
from .pool import (
    INPUTS,
    POOL,
    SELECTED,
    as_files,
    content_of,
    fed,
    file_inputs,
    labelled,
    read_if_there,
    rows_of_pool,
    write_row,
)
from .progress import Report
from .rows import Row, check_row, fingerprint, tokenize
from .run_folder import RunError, RunFolder
from .schema import Recipe, Sft
from .schema_model import Adapter
from .schema_rows import AdaptInfSelect, Factors, Skill
from .schema_sources import Source
from .select import BALANCED, CONTROL
from .selection_pictures import PICTURES, picture_numbers
from .steps import Step
from .training import ADAPTER, exact_parameters, new_adapter, saved_adapter

STORE, WARM_UP, DATASETS = "store", "warm_up", "datasets"
WARM_UP_STREAM, HELD_OUT_STREAM = 31, 32  # of random numbers, apart from those of the selection


def run_adapt_inf(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Score the pool, pick, and write picks, controls and reasons; or prepare a sequence of datasets."""
    stage: AdaptInfSelect = fed(step, run.path, "raw")
    inputs = json.dumps(file_inputs(_groups(stage)), indent=1)
    same = read_if_there(run.path / step.name / INPUTS) == inputs
    folder = run.begin(step.name, (INPUTS, POOL, WARM_UP, STORE, DATASETS) if same else ())
    write_atomic(folder / INPUTS, inputs.encode())
    if stage.datasets is not None:
        _prepare(recipe, step, stage.datasets, folder, run)
        return
    pool = as_files(own_sources(stage), folder / POOL / "raw")
    run.add_data(labelled(step.name, "raw"), **content_of(pool))
    rows = [as_paths(row, folder / POOL) for row in _checked_rows(pool)]
    k = budget_of(stage, len(rows))
    if k > len(rows):
        left = f" left by the {step.rows} stage" if step.rows else ""
        raise RunError(f"{step.name}: k is {k} and the pool has {len(rows)} rows{left}; give at most that")
    model, tokenizer, scored_with = _scoring_model(recipe, step, rows, folder, run)
    for number, path in enumerate(stage.members if isinstance(stage.members, list) else ()):
        model.load_adapter(path, _member(number))
    store = score_samples(model, tokenizer, rows, **scoring_settings(recipe, stage), out_dir=folder / STORE)
    usable = len(usable_rows(store))
    if k > usable:
        raise RunError(
            f"{step.name}: k is {k}, and {usable} of {len(rows)} rows have an answer within max_length "
            f"{stage.max_length} and finite scores; give at most {usable}, or a larger max_length"
        )
    method = adapt_inf(stage)
    picked = method.select(store, budget=k, seed=recipe.seed)
    # Of equal size: the published shares may add up to more than k.
    balanced = balanced_control(method).select(store, budget=min(len(picked), usable), seed=recipe.seed)
    picked.save(folder / "selection")
    balanced.save(folder / "balanced")
    write_atomic(folder / PICTURES, json.dumps(picture_numbers(store, picked)).encode())
    sources = {"pool": dict(Counter(str(row["source"]) for row in rows))}
    for name, file, found in (
        ("selected", SELECTED, picked),
        ("control", CONTROL, picked.control),
        ("balanced", BALANCED, balanced),
    ):
        chosen = _write_rows(folder / file, found, rows)
        sources[name] = dict(Counter(str(row["source"]) for row in chosen))
        if found is picked:
            run.add_data(labelled(step.name, "selected"), rows=len(chosen), sha256=fingerprint(chosen))
    run.finish(step.name, **picked.summary(), sources=sources, scored_with=scored_with)


def adapt_inf(stage: AdaptInfSelect) -> AdaptInf:
    """The `AdaptInf` of a stage.

    Raises:
        DataSelectionError: its values do not go together.
    """
    return AdaptInf(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(AdaptInf)})


def scoring_settings(recipe: Recipe, stage: AdaptInfSelect) -> dict[str, Any]:
    """Arguments of `score_samples`."""
    names = ("scores", "gradients", "projection", "batch_size", "max_length")
    members = stage.members
    if isinstance(members, list):
        members = [_member(number) for number in range(len(members))]
    settings = {**{name: getattr(stage, name) for name in names}, "members": members, "seed": recipe.seed}
    if isinstance(stage.projection, Factors):
        settings["projection"] = Factorised(stage.projection.side)
    return settings


def _member(number: int) -> str:
    """The name under which an adapter of `members` is loaded."""
    return f"member-{number}"


def budget_of(stage: AdaptInfSelect, rows: int) -> int:
    """How many of so many rows are picked."""
    return stage.k if isinstance(stage.k, int) else max(1, round(stage.k * rows))


def _groups(stage: AdaptInfSelect) -> dict[str, list[Source]]:
    groups = {} if stage.datasets is not None else {"raw": own_sources(stage)}
    for skill in stage.datasets or []:
        groups |= {f"datasets.{skill.name}": skill.raw, f"test.{skill.name}": skill.test or []}
    return groups


def _checked_rows(pool: list[str]) -> list[Row]:
    rows = list(rows_of_pool(pool))
    for number, row in enumerate(rows, start=1):
        check_row(row, f"row {number} of the pool")
    return rows


def _write_rows(path: Path, found: Selection, rows: Sequence[Row]) -> list[Row]:
    chosen = [rows[i] for i in found.indices.tolist()]
    with open_atomic(path) as file:
        for row in chosen:
            write_row(file, row, path.parent)
    return chosen


# ---------------------------------------------------------------- the model that scores


def _scoring_model(
    recipe: Recipe, step: Step, rows: Sequence[Row], folder: Path, run: RunFolder
) -> tuple[Any, Any, str]:
    """Base and adapter to score with, the tokenizer, and in words which adapter that is."""
    stage: Any = step.stage
    if stage.adapter_from is not None:
        return *saved_adapter(recipe, Path(stage.adapter_from), run.path), stage.adapter_from
    if step.start is not None:
        return *saved_adapter(
            recipe, run.path / step.start / ADAPTER, run.path
        ), f"the adapter of the {step.start} stage"
    warm_up(recipe, step, rows, folder / WARM_UP, run)
    # Read back even where it was just trained: a run that goes on then scores with the very same model.
    return *saved_adapter(recipe, folder / WARM_UP, run.path), f"an adapter warmed up for {stage.warm_up.steps} steps"


def warm_up(recipe: Recipe, step: Step, rows: Sequence[Row], out: Path, run: RunFolder) -> None:
    """Train a fresh adapter for some steps on random rows, into `out`, where it appears whole or not at all."""
    if out.is_dir():
        return
    stage: Any = step.stage
    model, tokenizer = new_adapter(recipe, adapter_section(recipe, stage), run.path)
    settings = stage.warm_up
    count = min(len(rows), settings.steps * settings.batch_size)
    chosen = top_k(uniform_noise(recipe.seed, len(rows), WARM_UP_STREAM), count).tolist()
    data: dict[str, Any]
    some, pictures = [rows[i] for i in chosen], is_processor(tokenizer)
    if pictures:
        data = picture_training(some, tokenizer)
    else:
        data = {"train_dataset": Dataset.from_list([tokenize(row, tokenizer) for row in some])}
    beside = out.with_name(f".{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    arguments = SFTConfig(
        output_dir=str(beside / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_length=stage.max_length,
        seed=recipe.seed,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=not pictures,
    )
    with exact_parameters(model):
        trainer: Any = SFTTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            **data,
            callbacks=[Report(step.name, run, shown=("loss",))],
        )
    score_labelled_only(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise RunError(f"{step.name}: the adapter is not finite after the warm-up; lower warm_up.learning_rate")
    shutil.rmtree(beside, ignore_errors=True)
    trainer.model.save_pretrained(str(beside))
    tokenizer.save_pretrained(str(beside))
    beside.rename(out)


def adapter_section(recipe: Recipe, stage: AdaptInfSelect) -> Adapter:
    """Which adapter is warmed up."""
    after = recipe.stages[recipe.place(stage) :]
    sft = next((one for one in after if isinstance(one, Sft)), None) or recipe.before(stage, "sft")
    return stage.adapter or (sft.adapter if sft is not None else None) or Adapter()


# ---------------------------------------------------------------- a sequence of datasets


def _prepare(recipe: Recipe, step: Step, skills: Sequence[Skill], folder: Path, run: RunFolder) -> None:
    """Write each dataset's rows for the pool and for the test, and, where there is none yet, the adapter that all
    policies begin with."""
    stage: Any = step.stage
    facts, first = {}, list[Row]()
    for number, skill in enumerate(skills):
        files = as_files(skill.raw, folder / POOL / f"raw-{number}")
        rows = [as_paths({**row, "skill": skill.name}, folder / POOL) for row in _checked_rows(files)]
        if skill.test is None:
            if len(rows) <= stage.held_out:
                raise RunError(
                    f"{step.name}: {skill.name!r} has {len(rows)} rows, of which {stage.held_out} are held out for the "
                    "test, so that none is left; lower held_out, or give test"
                )
            noise = uniform_noise(recipe.seed, len(rows), HELD_OUT_STREAM)
            held = set(top_k(noise, stage.held_out).tolist())
            tests = [row for i, row in enumerate(rows) if i in held]
            rows = [row for i, row in enumerate(rows) if i not in held]
        else:
            tests = _checked_rows(as_files(skill.test, folder / POOL / f"test-{number}"))
        for name, part in ((f"{skill.name}.jsonl", rows), (f"{skill.name}.test.jsonl", tests)):
            with open_atomic(folder / DATASETS / name) as file:
                for row in part:
                    write_row(file, row, folder / DATASETS)
        run.add_data(labelled(step.name, skill.name), rows=len(rows), sha256=fingerprint(rows))
        run.add_data(labelled(step.name, f"{skill.name} (test)"), rows=len(tests), sha256=fingerprint(tests))
        facts[skill.name] = {"rows": len(rows), "test": len(tests)}
        first = first or rows
    if stage.adapter_from is None and step.start is None:
        warm_up(recipe, step, first, folder / WARM_UP, run)
    run.finish(step.name, method="adapt_inf", datasets=facts)


def start_adapter(stage: AdaptInfSelect, sft: Step, run: RunFolder) -> Path:
    """The adapter that every policy over a sequence of datasets begins with. sft: the step that trains on them."""
    if sft.start is not None:
        return run.path / sft.start / ADAPTER
    return Path(stage.adapter_from) if stage.adapter_from is not None else run.path / str(sft.rows) / WARM_UP


def prepared(stage: AdaptInfSelect, folder: Path) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """What `_prepare` wrote: the rows of each dataset for the pool, and for the test."""
    found: tuple[dict[str, list[Row]], dict[str, list[Row]]] = ({}, {})
    for skill in stage.datasets or []:
        for part, name in zip(found, (f"{skill.name}.jsonl", f"{skill.name}.test.jsonl"), strict=True):
            with (folder / DATASETS / name).open(encoding="utf-8") as file:
                part[skill.name] = [located(json.loads(line), folder / DATASETS) for line in file]
    return found
