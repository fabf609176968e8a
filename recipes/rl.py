"""The rl stage: GRPO with a verifiable reward, continuing the adapter, through TRL."""

from typing import Any

from trl import GRPOConfig

from ..rl import CertificateReward, CertificateTask, get_task
from ..rl.trainer import DenseRolloutGRPOTrainer
from .progress import Report
from .rows import fingerprint
from .run_folder import RunFolder
from .schema import Recipe, Rl, Task
from .training import ADAPTER, exact_parameters, new_adapter, saved_adapter, train, trainer_arguments


def make_task(task: Task) -> CertificateTask:
    return get_task(task.name, values=tuple(task.values))


def run_rl(recipe: Recipe, stage: Rl, run: RunFolder) -> None:
    """Train on fresh instances of the task's train split; every completion is judged by the task's own check."""
    folder = run.begin("rl")
    task = make_task(stage.task)
    if stage.adapter is None:
        model, tokenizer = saved_adapter(recipe, run.path / "sft" / ADAPTER)
    else:
        model, tokenizer = new_adapter(recipe, stage.adapter)
    dataset = task.dataset(stage.instances, stage.task.n, recipe.seed, "train")
    run.add_data("rl", rows=len(dataset), sha256=fingerprint({"instance": text} for text in dataset["instance"]))
    with exact_parameters(model):
        trainer = DenseRolloutGRPOTrainer(
            model=model,
            args=GRPOConfig(**trainer_arguments(recipe, stage.trainer, folder)),
            reward_funcs=[CertificateReward(task, stage.reward)],
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Report("rl", run, shown=("reward", f"{task.name}/certificate_accuracy"))],
            dense_rollouts=recipe.base.dense_generation,
        )
    train(trainer, run, "rl", folder, tokenizer, reward=lambda: _reward_change(run))


def _reward_change(run: RunFolder) -> dict[str, Any] | None:
    """Mean reward over the first and the last quarter of the log, each line of which is a mean over the steps since
    the one before; None where nothing was logged."""
    lines = [line for line in run.metrics("rl") if "reward" in line]
    if not lines:
        return None
    quarter = max(1, len(lines) // 4)
    before = [0, *(line["step"] for line in lines)]
    steps = {"first": before[quarter], "last": before[-1] - before[-1 - quarter]}
    parts = {"first": lines[:quarter], "last": lines[-quarter:]}
    return {
        name: {"steps": steps[name], "mean": sum(line["reward"] for line in part) / len(part)}
        for name, part in parts.items()
    }
