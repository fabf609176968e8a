"""What the sft and rl stages share: base and adapter, and arguments of TRL's trainers."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, set_seed

from ..adapters import MokaConfig, load_base
from .checkpoints import Checkpoint, Checkpoints, last_checkpoint, of_rank, remove_checkpoints, saving
from .links import fresh_adapter
from .precision import recipe_plan, save_plan
from .run_folder import TRAINER, RunError, RunFolder
from .schema import Recipe, Rl, Sft
from .schema_model import Adapter, BaseModelSection
from .steps import Step
from .trainer_args import given

ADAPTER = "adapter"


def load_recipe_base(base: BaseModelSection, run: Path) -> tuple[Any, Any]:
    """The base and its tokenizer. run: the run folder, where the bit plan of a base of mixed precision is kept."""
    return load_base(
        base.model,
        base.quantization,
        attn_implementation=base.attn_implementation,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        precision=recipe_plan(base, run),
    )


def new_adapter(recipe: Recipe, adapter: Adapter, run: Path) -> tuple[PeftModel, Any]:
    """The base with a fresh adapter, and the tokenizer."""
    model, tokenizer = load_recipe_base(recipe.base, run)
    set_seed(recipe.seed)
    return get_peft_model(model, moka_config(adapter)), tokenizer


def saved_adapter(recipe: Recipe, folder: Path, run: Path) -> tuple[PeftModel, Any]:
    """The base with a saved adapter, ready to be trained on, and the tokenizer."""
    model, tokenizer = load_recipe_base(recipe.base, run)
    set_seed(recipe.seed)
    return PeftModel.from_pretrained(model, str(folder), is_trainable=True), tokenizer


def begun_adapter(recipe: Recipe, step: Step, run: Path) -> tuple[PeftModel, Any]:
    """The base with the adapter that an sft or rl step begins with: the newest one, or a fresh one."""
    assert isinstance(step.stage, Sft | Rl)
    fresh = fresh_adapter(recipe, step.stage)
    return (
        saved_adapter(recipe, run / str(step.start) / ADAPTER, run)
        if fresh is None
        else new_adapter(recipe, fresh, run)
    )


def moka_config(adapter: Adapter) -> MokaConfig:
    return MokaConfig(task_type="CAUSAL_LM", **adapter.model_dump(exclude={"method"}, exclude_unset=True))


def trainer_arguments(recipe: Recipe, trainer: Any, folder: Path) -> dict[str, Any]:
    """Keyword arguments of SFTConfig or GRPOConfig: the recipe's, and those that krontune sets."""
    values = given(trainer)
    return {
        **values,
        **saving(values),
        "output_dir": str(folder / TRAINER),
        "seed": recipe.seed,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": True,
    }


@contextmanager
def exact_parameters(model: torch.nn.Module) -> Iterator[None]:
    """Give the trained parameters back the values that they had, which TRL's constructors round to bfloat16.

    With it the rl stage continues the very adapter that the sft stage saved.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name]


def begin(run: RunFolder, stage: str) -> tuple[Path, Checkpoint | None]:
    """The folder of a training stage, and the checkpoint to go on from, which a cut attempt left there.

    Raises:
        RunError: that attempt had another number of processes.
    """
    last = run.processes.agree(lambda: _begin(run, stage))
    return run.path / stage, of_rank(last, run.processes.rank)


def _begin(run: RunFolder, stage: str) -> Checkpoint | None:
    finished = (run.path / stage / "done").is_file()  # it is moved aside with what it holds
    last = None if finished else last_checkpoint(run.path / stage, run.key(stage))
    if last is None:
        run.begin(stage)
        return None
    if last.processes != run.processes.count:
        raise RunError(
            f"{stage} was cut after step {last.step} of a run in {last.processes} process(es), and this run has "
            f"{run.processes.count}: its batches would be others. Run it in {last.processes}, or delete "
            f"{run.path / stage} to begin the stage again."
        )
    print(f"{stage}: goes on after step {last.step}", file=sys.stderr)
    run.begin(stage, keep=(TRAINER,), step=last.step, seconds=last.seconds)
    return last


def train(
    trainer: Trainer,
    run: RunFolder,
    stage: str,
    folder: Path,
    tokenizer: Any,
    checkpoints: Checkpoints,
    **facts: Callable[[], Any],
) -> None:
    """Train, save the adapter, and mark the stage as done; `facts` are called then and recorded with it.

    Checkpoints are removed then, unless the recipe asks for them.
    """
    trainer.remove_callback(PrinterCallback)
    checkpoints.trainer = trainer
    trainer.train(resume_from_checkpoint=str(checkpoints.last.path) if checkpoints.last else None)
    model: Any = trainer.model
    if not _all_finite(model):
        raise RunError(
            f"{stage}: the adapter is not finite after training (NaN or infinity), so it was not kept; lower "
            "learning_rate, or look at the loss in metrics.jsonl"
        )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    # Gathered from the shards of all processes.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if run.processes.first:
        model.save_pretrained(str(folder / ADAPTER), state_dict=state)
        tokenizer.save_pretrained(str(folder / ADAPTER))
        save_plan(run.recipe.base, run.path, folder / ADAPTER)
    trained, total = model.get_nb_trainable_parameters()
    found = _several(model, run, stage, sharded) | {name: fact() for name, fact in facts.items()}
    run.finish(stage, steps=trainer.state.global_step, trainable_parameters=trained, parameters=total, **found)
    if run.processes.first and not checkpoints.asked_for:
        remove_checkpoints(folder)


def _several(model: torch.nn.Module, run: RunFolder, stage: str, sharded: bool) -> dict[str, Any]:
    """In how many processes the stage ran, where in more than one; and whether all came to the same adapter."""
    if run.processes.count == 1:
        return {}
    if sharded:
        return {"processes": run.processes.count}
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    same = len(set(run.processes.collect(digest.digest()))) <= 1
    if not same:
        print(f"{stage}: the processes ended with different adapters; that of the first is kept", file=sys.stderr)
    return {"processes": run.processes.count, "same_adapter_in_all": same}


def _all_finite(model: torch.nn.Module) -> bool:
    """Of the trained parameters; of sharded ones, those of this process."""
    trained = (p for p in model.parameters() if p.requires_grad)
    return all(torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all() for p in trained)
