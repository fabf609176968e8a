"""Risk-averse advantages: against a slow twin, against GRPO, and against the exact gradient on a bandit."""

import math

import pytest
import torch

from krontune.rl.errors import RlError
from krontune.rl.risk import Risk, risk_advantages, tail_fault, zero_groups

NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


def naive_risk(rewards, group, risk):
    size, w = group * risk.bundle, []
    for start in range(0, len(rewards), size):
        bundle = rewards[start : start + size]
        scored = sorted(r for r in bundle if not math.isnan(r))
        eta = scored[math.ceil(risk.alpha * len(scored) - 1e-9) - 1] if scored else 0.0
        w += [(1 - risk.weight) * r - risk.weight / risk.alpha * max(eta - r, 0) for r in bundle]
    advantages = []
    for start in range(0, len(w), group):
        # max(nan, 0) is nan only in one order of arguments, so look at the reward.
        marked = [math.isnan(r) for r in rewards[start : start + group]]
        known = [x for x, m in zip(w[start : start + group], marked, strict=True) if not m]
        mean = sum(known) / len(known) if known else 0.0
        advantages += [0.0 if m else x - mean for x, m in zip(w[start : start + group], marked, strict=True)]
    return advantages


@pytest.mark.parametrize("bundle", [1, 3])
@pytest.mark.parametrize(("weight", "alpha"), [(0.5, 0.5), (1.0, 0.25), (0.3, 0.1), (0.0, 0.5), (1.0, 1.0)])
def test_the_closed_form_equals_its_slow_twin_also_with_unscored_completions(weight, alpha, bundle):
    rewards = torch.rand(48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[[3, 17, 18]] = torch.nan
    rewards[40:48] = torch.nan
    risk = Risk(weight, alpha, bundle)
    torch.testing.assert_close(
        risk_advantages(rewards, 8, risk), torch.tensor(naive_risk(rewards.tolist(), 8, risk), dtype=torch.float64)
    )


@pytest.mark.parametrize("risk", [Risk(weight=0.0, alpha=0.3), Risk(weight=1.0, alpha=1.0), Risk(0.4, 1.0, bundle=2)])
def test_no_weight_or_the_whole_tail_is_mean_centred_grpo_exactly(risk):
    rewards = torch.rand(32, generator=torch.Generator().manual_seed(1))
    centred = (rewards.view(-1, 8) - rewards.view(-1, 8).mean(1, keepdim=True)).view(-1)
    assert torch.equal(risk_advantages(rewards, 8, risk), centred)


def exact_cvar_gradient(logits, means, scales, alpha):
    """Of CVaR_alpha of the reward of a softmax bandit whose arms pay normal rewards, by the logits."""
    logits = logits.clone().requires_grad_()
    shares = logits.softmax(0)
    low, high = means.min() - 9, means.max() + 9
    for _ in range(200):  # eta solves P(r <= eta) = alpha
        eta = (low + high) / 2
        below = (shares * NORMAL.cdf((eta - means) / scales)).sum() < alpha
        low, high = (eta, high) if below else (low, eta)
    z = (eta - means) / scales
    short = scales * (z * NORMAL.cdf(z) + NORMAL.log_prob(z).exp())  # E (eta - r)_+ of each arm
    # The maximum over eta is flat there, so its own derivative drops out.
    return torch.autograd.grad(eta - (shares * short).sum() / alpha, logits)[0]


def bandit(alpha, group, groups=40_000):
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([1.0, 0.6, 0.3, 0.8, 0.0], dtype=torch.float64)
    scales = torch.tensor([1.5, 0.1, 0.2, 0.6, 0.3], dtype=torch.float64)
    logits = torch.tensor([0.5, 0.0, -0.3, 0.2, 0.1], dtype=torch.float64)
    shares = logits.softmax(0)
    arms = torch.multinomial(shares, group * groups, replacement=True, generator=generator)
    noise = torch.randn(group * groups, generator=generator, dtype=torch.float64)
    rewards = means[arms] + scales[arms] * noise

    def gradient(advantages):
        scores = torch.nn.functional.one_hot(arms, 5).double() - shares  # of log p, by the logits
        return (advantages[:, None] * scores).mean(0)

    return rewards, gradient, exact_cvar_gradient(logits, means, scales, alpha)


@pytest.mark.parametrize(
    ("alpha", "group", "least"), [(0.25, 16, 0.99), (0.5, 8, 0.99), (0.5, 16, 0.99), (0.25, 8, 0.98)]
)
def test_the_estimator_points_along_the_exact_cvar_gradient(alpha, group, least):
    # A tail of two completions, alpha 0.25 of 8, is biased towards its own quantile: 0.987 here.
    rewards, gradient, exact = bandit(alpha, group)
    estimate = gradient(risk_advantages(rewards, group, Risk(weight=1.0, alpha=alpha)))
    assert torch.cosine_similarity(estimate, exact, dim=0) >= least


@pytest.mark.parametrize(("alpha", "group"), [(0.25, 8), (0.5, 8), (0.5, 16)])
def test_keeping_the_worst_completions_alone_does_not(alpha, group):
    rewards, gradient, exact = bandit(alpha, group)
    kept = rewards.view(-1, group)
    worst = kept.argsort(1).argsort(1) < math.ceil(alpha * group)
    mean = kept.where(worst, 0).sum(1, keepdim=True) / worst.sum(1, keepdim=True)
    naive = gradient((kept - mean).where(worst, 0).view(-1))
    assert torch.cosine_similarity(naive, exact, dim=0) < 0.8


def test_cvar_of_binary_rewards_starves_hard_prompts_and_is_refused_with_the_reason():
    rewards = torch.tensor([1.0] * 4 + [0.0] * 4)
    with pytest.raises(RlError, match="hard prompts would starve"):
        risk_advantages(rewards, 8, Risk(weight=0.6, alpha=0.5))
    asked = risk_advantages(rewards, 8, Risk(weight=1.0, alpha=0.5, allow_binary=True))
    assert (asked == 0).all() and zero_groups(asked, 8) == 1
    mild = risk_advantages(rewards, 8, Risk(weight=0.5, alpha=0.5))
    assert mild[0] == 0.25 and zero_groups(mild, 8) == 0


def test_graded_rewards_may_take_the_whole_weight():
    graded = risk_advantages(torch.tensor([0.0, 1.0, 0.5, 0.7]), 4, Risk(weight=1.0, alpha=0.5))
    assert graded[0] < 0 < graded[1]


def test_the_share_of_zero_groups_counts_prompts():
    assert zero_groups(torch.tensor([0.0, 0.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]), 2) == 0.75


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 1.5},
        {"alpha": 0.0},
        {"bundle": 0},
        {"weight": "x"},
        {"alpha": None},
        {"bundle": 1.5},
        {"allow_binary": "no"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(RlError, match=next(iter(wrong))):
        Risk(**wrong)


def test_a_tail_of_one_completion_is_told_as_it_moves_nothing_but_the_mean():
    risk = Risk(weight=0.5, alpha=0.25)
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.6])
    assert torch.allclose(risk_advantages(rewards, 4, risk), 0.5 * (rewards - rewards.mean()))
    assert "tail of one" in (tail_fault(4, risk) or "")
    assert tail_fault(8, risk) is tail_fault(4, Risk(alpha=0.25, bundle=2)) is tail_fault(4, Risk(weight=0.0)) is None


def test_rewards_that_are_not_whole_bundles_are_refused():
    with pytest.raises(RlError, match="whole bundles"):
        risk_advantages(torch.rand(24), 8, Risk(bundle=2))
