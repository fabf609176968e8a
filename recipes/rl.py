"""The rl stage and its controls: GRPO with a verifiable reward, continuing the adapter, through TRL."""

from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from ..rl import (
    CertificateReward,
    CertificateTask,
    Guarded,
    MismatchGuard,
    Risk,
    TokenCredit,
    TokenCreditGRPOTrainer,
    checks,
    get_task,
)
from ..rl.rewards import RandomReward
from .checkpoints import Checkpoints, Stateful
from .masking import without_secrets
from .own import import_own, is_own
from .progress import Report
from .prompts import read_prompts
from .rewards import guard_of, make_reward, monitored
from .rows import fingerprint
from .run_folder import RunError, RunFolder
from .schema import Recipe, Rl, Task
from .steps import Step
from .trainer_args import given
from .training import begin, begun_adapter, exact_parameters, train, trainer_arguments


def make_task(task: Task) -> CertificateTask:
    if is_own(task.name):
        import_own(task.name)  # with its own words for what cannot be imported
    return get_task(task.name, **task.options)


def make_credit(stage: Rl) -> TokenCredit:
    if stage.credit is None:
        return TokenCredit(strategy="off")
    settings = given(stage.credit)
    return TokenCredit.preset(settings.pop("preset", "v2"), **settings)


def make_risk(stage: Rl) -> Risk | None:
    return None if stage.risk is None else Risk(**given(stage.risk))


def training_rows(stage: Rl, seed: int) -> Dataset:
    """The rows to train on: instances of the task, or the stage's data.

    Raises:
        RlError, DataSelectionError: they cannot be made or read.
        ConnectionError: a data set of the Hub is neither here nor within reach.
    """
    if stage.task is None:
        gold = str(stage.reward_options.get("column", "answer")) if stage.reward == "math" else None
        return Dataset.from_list(read_prompts(stage.data or (), stage.instruction, gold))
    task = make_task(stage.task)
    return task.dataset(stage.instances, stage.task.n, seed, "train", stage.task.discriminating, stage.hints)


def run_rl(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Train on the stage's rows with its reward, or, as a control, with one that knows nothing and otherwise alike."""
    name, stage, control = step.name, step.stage, step.control
    assert isinstance(stage, Rl)
    folder, last = begin(run, name)
    task = None if stage.task is None else make_task(stage.task)
    model, tokenizer = begun_adapter(recipe, step, run.path)
    dataset = training_rows(stage, recipe.seed)
    run.add_data(name, rows=len(dataset), sha256=_fingerprint(dataset, task))
    own_task = stage.task is not None and is_own(stage.task.name)
    reward = monitored(make_reward(stage, task, recipe.seed + run.processes.rank, control), task, own_task)
    guard = guard_of(reward)
    # A control that earns nothing has learned nothing, which is an answer, too.
    alarms = checks.Alarms(stop_on_zero=control is None)
    apart = None if stage.mismatch_limit is None else MismatchGuard(stage.mismatch_limit)
    known: dict[str, Stateful] = {"alarms": alarms}
    inner = reward.reward if isinstance(reward, checks.Monitored) else reward
    if isinstance(inner, Guarded | RandomReward | CertificateReward):
        known["reward"] = inner
    checkpoints = Checkpoints(run.key(name), last, given(stage.trainer), known)
    shown = ("reward", f"{task.name}/all/optimal") if task else ("reward",)
    try:
        with exact_parameters(model):
            trainer = TokenCreditGRPOTrainer(
                model=model,
                args=GRPOConfig(**trainer_arguments(recipe, stage.trainer, folder)),
                reward_funcs=[reward],
                credit=make_credit(stage),
                risk=make_risk(stage),
                train_dataset=dataset,
                processing_class=tokenizer,
                callbacks=[checkpoints, Report(name, run, shown=shown), alarms, *([apart] if apart else [])],
                dense_rollouts=recipe.base.dense_generation,
                share_prompts=stage.share_prompts,
                rollout_cache=stage.cache,
            )

        def outcome() -> dict[str, Any] | None:
            if apart is not None and apart.stopped:
                raise RunError(f"{name}: stopped at {apart.stopped} (max_mismatch)")
            return _reward_after(run, name, alarms, folder, task, guard)

        train(trainer, run, name, folder, tokenizer, checkpoints, reward=outcome)
    finally:
        if guard is not None:
            guard.close()


def _fingerprint(dataset: Dataset, task: CertificateTask | None) -> str:
    if task is None:
        return fingerprint(dict(row) for row in dataset)
    return fingerprint({"instance": text} for text in dataset["instance"])


def _reward_after(
    run: RunFolder,
    name: str,
    alarms: checks.Alarms,
    folder: Path,
    task: CertificateTask | None,
    guard: Guarded | None,
) -> dict[str, Any] | None:
    """How the reward changed; what the checks say of its course is written beside the adapter. None in a process that
    writes nothing.

    Raises:
        RunError: the training was stopped because nothing earned a reward.
    """
    if alarms.stopped:
        why = f"; the guard says: {guard.last_error}" if guard is not None and guard.last_error else ""
        raise RunError(f"{name}: {alarms.stopped}{why}")
    counts = run.processes.collect(guard.counts if guard is not None else Counter())  # each scores a part
    if not run.processes.first:
        return None
    found = [alarms.result(), checks.collapse(alarms.logs)]
    if task is not None:
        found.append(checks.divergence(alarms.logs, f"{task.name}/all/optimal"))
        found.append(checks.gap_rise(alarms.logs, f"{task.name}/all/gap"))
        found.append(checks.followed(alarms.logs, task.name))
    if guard is not None:
        found.append(checks.verifier_health(sum(counts, Counter())))
    checks.write_report(without_secrets(found), folder / "rlvr_report.json", {"stage": name})
    return _reward_change(run, name)


def _reward_change(run: RunFolder, name: str = "rl") -> dict[str, Any] | None:
    """Mean reward over the first and the last quarter of the log, each line of which is a mean over the steps since
    the one before; None where nothing was logged."""
    lines = [line for line in run.metrics(name) if "reward" in line]
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
