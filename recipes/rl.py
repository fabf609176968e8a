"""The rl stage: GRPO with a verifiable reward, continuing the adapter, through TRL."""

from typing import Any

from trl import GRPOConfig

from ..rl import CertificateReward, CertificateTask, Risk, TokenCredit, TokenCreditGRPOTrainer, checks, get_task
from .progress import Report
from .rows import fingerprint
from .run_folder import RunError, RunFolder
from .schema import Recipe, Rl, Task
from .trainer_args import given
from .training import ADAPTER, exact_parameters, new_adapter, saved_adapter, train, trainer_arguments


def make_task(task: Task) -> CertificateTask:
    return get_task(task.name, **task.options)


def make_credit(stage: Rl) -> TokenCredit:
    return TokenCredit(strategy="off") if stage.credit is None else TokenCredit(**given(stage.credit))


def make_risk(stage: Rl) -> Risk | None:
    return None if stage.risk is None else Risk(**given(stage.risk))


def instances_of(stage: Rl, seed: int) -> Any:
    """The training instances, as a data set."""
    task = make_task(stage.task)
    return task.dataset(stage.instances, stage.task.n, seed, "train", stage.task.discriminating, stage.hints)


def run_rl(recipe: Recipe, stage: Rl, run: RunFolder) -> None:
    """Train on fresh instances of the task's train split; every completion is judged by the task's own check."""
    folder = run.begin("rl")
    task = make_task(stage.task)
    if stage.adapter is None:
        model, tokenizer = saved_adapter(recipe, run.path / "sft" / ADAPTER)
    else:
        model, tokenizer = new_adapter(recipe, stage.adapter)
    dataset = instances_of(stage, recipe.seed)
    run.add_data("rl", rows=len(dataset), sha256=fingerprint({"instance": text} for text in dataset["instance"]))
    alarms = checks.Alarms()
    with exact_parameters(model):
        trainer = TokenCreditGRPOTrainer(
            model=model,
            args=GRPOConfig(**trainer_arguments(recipe, stage.trainer, folder)),
            reward_funcs=[CertificateReward(task, stage.reward)],
            credit=make_credit(stage),
            risk=make_risk(stage),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Report("rl", run, shown=("reward", f"{task.name}/certificate_accuracy")), alarms],
            dense_rollouts=recipe.base.dense_generation,
            share_prompts=stage.share_prompts,
        )
    train(trainer, run, "rl", folder, tokenizer, reward=lambda: _reward_after(run, alarms, folder))


def _reward_after(run: RunFolder, alarms: checks.Alarms, folder: Any) -> dict[str, Any] | None:
    """How the reward changed; what the checks say of its course is written beside the adapter.

    Raises:
        RunError: the training was stopped because nothing earned a reward.
    """
    if alarms.stopped:
        raise RunError(f"rl: {alarms.stopped}")
    checks.write_report([alarms.result(), checks.collapse(alarms.logs)], folder / "rlvr_report.json", {"stage": "rl"})
    return _reward_change(run)


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
