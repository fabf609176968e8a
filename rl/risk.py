"""Advantages for a cautious policy: the mean of a group's rewards, mixed with the mean of its worst ones."""

from dataclasses import dataclass
from math import ceil
from numbers import Integral, Real

import torch

from .errors import RlError

# Above this share of CVaR, 0/1 rewards leave prompts that are seldom solved without any gradient.
_LARGEST_BINARY_WEIGHT = 0.5


@dataclass(frozen=True)
class Risk:
    """What is maximised: (1 - weight) E[r] + weight CVaR_alpha[r], the latter the mean of the worst alpha of outcomes.

    weight: lambda, in [0, 1]. 0 is the mean alone.
    alpha: in (0, 1]. 1 is the mean again. With groups of 8 the tail is 8 * alpha completions: prefer 16 or more.
    bundle: prompts that share one tail. 1: each prompt has its own. More lets hard and easy prompts be compared, so
        that the worst outcomes are those of the hard ones.
    allow_binary: permit a weight above 0.5 with rewards of 0 and 1.

    Raises RlError for values out of range.
    """

    weight: float = 0.5
    alpha: float = 0.5
    bundle: int = 1
    allow_binary: bool = False

    def __post_init__(self) -> None:
        for name, kind, said in (("weight", Real, "a"), ("alpha", Real, "a"), ("bundle", Integral, "a whole")):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RlError(f"{name} must be {said} number, got {value!r}")
        if not isinstance(self.allow_binary, bool):
            raise RlError(f"allow_binary must be True or False, got {self.allow_binary!r}")
        if not 0 <= self.weight <= 1:
            raise RlError(f"weight is the share of CVaR, in [0, 1], got {self.weight}")
        if not 0 < self.alpha <= 1:
            raise RlError(f"alpha is the share of worst outcomes, in (0, 1], got {self.alpha}")
        if self.bundle < 1:
            raise RlError(f"bundle counts prompts, from 1, got {self.bundle}")


def risk_advantages(rewards: torch.Tensor, group: int, risk: Risk) -> torch.Tensor:
    """Group-centred advantages (N,) of rewards (N,), `group` completions a prompt, one prompt after the other.

        w_i = (1 - weight) r_i - (weight / alpha) max(eta - r_i, 0)        A_i = w_i - mean of w over the prompt

    eta is the ceil(alpha n)-th smallest of the n rewards of the bundle: the inner maximum of
    CVaR_alpha(r) = max_eta (eta - E[(eta - r)_+] / alpha), in closed form. There is no division by the standard
    deviation, so weight 0 or alpha 1 is GRPO with `scale_rewards="none"`, exactly. Keeping the worst completions alone
    would be another gradient, at alpha 0.5 one that points elsewhere.

    nan marks a completion that could not be scored: it counts nowhere and gets 0.

    Raises:
        RlError: N is not a multiple of group * bundle; a weight above 0.5 with rewards of 0 and 1 alone, unless
            `risk.allow_binary`.

    Source: arXiv 2301.10932 takes the expected conditional risk of a Markov process, with a learned eta. Here the
    process has two steps, the prompt and its completion, and the group gives eta. Bundles: arXiv 2510.00911.
    """
    size = group * risk.bundle
    if rewards.dim() != 1 or len(rewards) % size:
        raise RlError(
            f"{tuple(rewards.shape)} rewards are not whole bundles of {risk.bundle} prompts with {group} completions"
        )
    starves = risk.alpha < 1 and risk.weight > _LARGEST_BINARY_WEIGHT
    if starves and not risk.allow_binary and _is_binary(rewards):
        raise RlError(
            f"weight {risk.weight} with rewards of 0 and 1: a prompt solved in no more than 1 - alpha = "
            f"{1 - risk.alpha:g} of its completions would get next to no gradient, so hard prompts would starve. Use "
            f"a weight up to {_LARGEST_BINARY_WEIGHT}, a graded reward, or allow_binary=True"
        )
    if risk.weight == 0 or risk.alpha == 1:
        w = rewards
    else:
        bundles = rewards.view(-1, size)  # (bundles, size)
        short = (_tail_end(bundles, risk.alpha) - bundles).clamp(min=0)
        w = ((1 - risk.weight) * bundles - risk.weight / risk.alpha * short).view(-1)
    prompts = w.view(-1, group)
    return torch.nan_to_num(prompts - prompts.nanmean(1, keepdim=True), nan=0.0).view(-1)


def tail_fault(group: int, risk: Risk) -> str | None:
    """What is wrong where the tail of a bundle of `group` completions a prompt is a single one, the worst: eta is its
    reward, no reward lies below it, and only the mean is left of the objective. None where nothing is wrong."""
    if risk.weight == 0 or ceil(risk.alpha * group * risk.bundle - 1e-9) > 1:
        return None
    return (
        f"alpha {risk.alpha:g} of {group * risk.bundle} completions is a tail of one, with nothing below its end: "
        "risk would do nothing but weaken the mean; raise alpha, num_generations or bundle"
    )


def is_graded(rewards: torch.Tensor) -> bool:
    """Whether any of the rewards (N,) is neither 0, nor 1, nor nan."""
    return bool(((rewards != 0) & (rewards != 1) & ~rewards.isnan()).any())


def zero_groups(advantages: torch.Tensor, group: int) -> float:
    """Share of prompts all of whose advantages (N,) are zero: they teach nothing."""
    return (advantages.view(-1, group).abs() < 1e-8).all(1).float().mean().item()


def _tail_end(bundles: torch.Tensor, alpha: float) -> torch.Tensor:
    """eta of each row, (rows, 1): the ceil(alpha n)-th smallest of its n numbers that are not nan."""
    ordered = bundles.nan_to_num(nan=torch.inf).sort(1).values
    counts = (~bundles.isnan()).sum(1).tolist()
    last = [max(ceil(alpha * n - 1e-9) - 1, 0) for n in counts]  # 1e-9: 0.1 * 30 is a little over 3
    return ordered.gather(1, torch.tensor(last, device=bundles.device)[:, None])


def _is_binary(rewards: torch.Tensor) -> bool:
    """Whether both 0 and 1 occur, and nothing else."""
    return not is_graded(rewards) and bool((rewards == 0).any() and (rewards == 1).any())
