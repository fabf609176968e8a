"""From the rl stage's `reward`, `guard` and `controls` to a reward function for TRL."""

import inspect
from collections.abc import Callable
from copy import copy
from typing import Any

from ..rl import CertificateReward, CertificateTask, Guarded, RlError
from ..rl.checks import Monitored
from ..rl.rewards import BoxedFormat, MathReward, RandomReward
from .own import import_own, is_own
from .schema import Rl
from .trainer_args import given

Reward = Callable[..., Any]


def make_reward(stage: Rl, task: CertificateTask | None, seed: int, control: str | None = None) -> Reward:
    """The stage's reward function, or the one of a control, guarded where the stage wants it; see `plain_reward`.

    Raises:
        RlError: the reward cannot be built, and why.
    """
    reward = plain_reward(stage, task, seed, control)
    if isinstance(reward, Guarded) and stage.guard == "auto":
        return copy(reward)  # one that its author has guarded; with workers of its own
    return Guarded(reward, **guard_options(stage)) if is_guarded(stage, control) else reward


def monitored(reward: Reward, task: CertificateTask | None, own_task: bool) -> Reward:
    """The same pay, with the triplet of the task logged beside it.

    The check of a task of the user's own is code that reads what a model wrote, so it goes into the guard, too. Reward
    random has no guard: over such a task nothing is logged.
    """
    if task is None or (own_task and isinstance(reward, RandomReward)):
        return reward
    if isinstance(reward, Guarded) and own_task:
        reward.reward = Monitored(reward.reward, task)  # its workers have not been started yet
        return reward
    return Monitored(reward, task)


def guard_of(reward: Reward) -> Guarded | None:
    """The guard around a reward function, under a monitor or not."""
    inner = reward.reward if isinstance(reward, Monitored) else reward
    return inner if isinstance(inner, Guarded) else None


def plain_reward(stage: Rl, task: CertificateTask | None, seed: int, control: str | None = None) -> Reward:
    """The reward function without a guard."""
    own_task = stage.task is not None and is_own(stage.task.name)
    options = dict(stage.reward_options)
    if control == "random" and own_task:
        return RandomReward(seed)  # the stream of reward random, without the task's code that reads completions
    if control is not None:
        if task is not None:
            return CertificateReward(task, control, seed=seed)
        return RandomReward(seed) if control == "random" else BoxedFormat()
    if is_own(stage.reward):
        return _own(stage.reward, options)
    if stage.reward == "math":
        return _built(MathReward, options, "math")
    if task is None:
        raise RlError(f"reward {stage.reward!r} needs a task; over data give math, or your own package.module:name")
    if stage.reward == "random":
        options.setdefault("seed", seed)
        if own_task:
            return _built(RandomReward, options, stage.reward)
    return _built(CertificateReward, options, stage.reward, task, stage.reward)


def is_guarded(stage: Rl, control: str | None = None) -> bool:
    """Whether the reward runs in child processes: as asked for, by default what is not krontune's own."""
    if control == "random" or (control is None and stage.reward == "random"):
        return False  # it reads nothing, and each worker would begin its stream of chance anew
    if stage.guard != "auto":
        return stage.guard is not None
    own_task = stage.task is not None and is_own(stage.task.name)
    return own_task or (control is None and (is_own(stage.reward) or stage.reward == "math"))


def guard_options(stage: Rl) -> dict[str, Any]:
    return {} if stage.guard == "auto" or stage.guard is None else given(stage.guard)


def _own(path: str, options: dict[str, Any]) -> Reward:
    found = import_own(path)
    if isinstance(found, type):
        return _built(found, options, path)
    if not callable(found):
        raise RlError(f"{path!r} is {found!r}, which is no function and no class")
    if options:
        raise RlError(f"{path!r} is a function and takes no reward_options; name a class whose objects are called")
    return found


def _built(kind: Any, options: dict[str, Any], name: str, *first: Any) -> Reward:
    try:
        inspect.signature(kind).bind(*first, **options)
    except TypeError as error:
        allowed = list(inspect.signature(kind).parameters)[len(first) :]
        known = f"options: {', '.join(allowed)}" if allowed else "it takes no options"
        raise RlError(f"reward {name!r}: reward_options do not fit: {error}; {known}") from error
    return kind(*first, **options)
