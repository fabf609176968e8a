"""Credit rules against slow twins that follow the paper's text token by token."""

import math
import statistics

import numpy as np
import pytest
import torch

from krontune.rl.credit import (
    RULES,
    TokenCredit,
    anchor_tokens,
    chunk_steps,
    credited_advantages,
    preplan_tokens,
    token_credit,
)
from krontune.rl.errors import RlError


def naive_top(scores, allowed, n, q):
    """The round-half-up q * n best of the allowed positions, earlier ones first among equals."""
    count = min(n, max(1, math.floor(q * n + 0.5))) if n else 0
    return set(sorted(allowed, key=lambda t: (-scores[t], t))[:count])


def naive_credit(waad, fai, mask, credit, entropy=None):
    """Gamma of one response; lists of numbers."""
    response = [t for t in range(len(mask)) if mask[t]]
    n, q = len(response), credit.top_q
    delta = {t: abs(waad[t] - waad[t + 1]) for t in response if t + 1 < len(mask) and mask[t + 1]}
    low, high = credit.horizon
    judged = [s for s in response if any(s + low <= t <= s + high for t in response)]
    anchors = set()
    if 2 * len(judged) >= n:
        scores = [-f for f in fai] if credit.strategy == "bottom" else fai
        anchors = naive_top(scores, [s for s in response if fai[s] > 0], n, q)
    bonus = dict.fromkeys(response, 0.0)
    if credit.strategy == "preplan":
        chosen = naive_top(delta, list(delta), n, q)
    elif credit.strategy == "entropy":
        chosen = naive_top(entropy, response, n, q)
    else:
        chosen = anchors
    for t in chosen:
        bonus[t] = 1.0
    if credit.strategy == "coupled" and delta:
        assert credit.tau_waad == credit.tau_delta == 0.5
        openings = set()
        for t in anchors:
            before = []
            for u in range(t - 1, t - 1 - credit.lookback, -1):
                if u < 0 or not mask[u]:
                    break
                before.append(u)
            if not before or waad[t] > statistics.median(waad[s] for s in response):
                continue
            opening = min(before, key=lambda u: (-delta[u], u))
            if delta[opening] >= statistics.median(delta.values()):
                bonus[t] -= credit.alpha
                openings.add(opening)
        for u in openings:
            bonus[u] += credit.alpha
    return [1 + (credit.gamma - 1) * bonus[t] if mask[t] else 1.0 for t in range(len(mask))]


def made_up(dtype=torch.float64, seed=0):
    """Prompts, paddings, tool turns, a short and an empty response; ties in both scores."""
    generator = torch.Generator().manual_seed(seed)
    waad = (torch.rand(7, 61, generator=generator) * 20).round() / 2
    fai = ((torch.rand(7, 61, generator=generator) * 30).round() / 100).to(dtype)
    entropy = torch.rand(7, 61, generator=generator)
    mask = torch.zeros(7, 61, dtype=torch.long)
    mask[0] = 1
    mask[1, 7:] = 1
    mask[2, 5:50] = 1
    mask[2, 20:25] = 0  # a tool turn
    mask[2, 40] = 0
    mask[3, 10:16] = 1  # too short for anchors
    mask[4, 30:31] = 1
    mask[6, :33:2] = 1  # turns of one token
    return waad.to(dtype), fai, mask, entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strategy", ["coupled", "anchor", "preplan", "entropy", "bottom"])
@pytest.mark.parametrize("options", [{}, {"top_q": 0.13, "lookback": 1, "gamma": 2.0}, {"top_q": 1.0, "alpha": 0.9}])
def test_each_rule_equals_its_slow_twin(strategy, options, dtype):
    waad, fai, mask, entropy = made_up(dtype)
    credit = TokenCredit(strategy=strategy, horizon=(4, 12), **options)
    fast = token_credit(waad, fai, mask, credit, entropy=entropy)
    slow = [
        naive_credit(*(x.tolist() for x in row[:3]), credit, row[3].tolist())
        for row in zip(waad, fai, mask, entropy, strict=True)
    ]
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=dtype))


@pytest.mark.parametrize("strategy", list(RULES))
def test_gamma_is_one_outside_the_response_whatever_stands_there(strategy):
    waad, fai, mask, entropy = made_up()
    credit = TokenCredit(strategy=strategy, horizon=(2, 9))
    gamma = token_credit(waad, fai, mask, credit, entropy=entropy)
    assert (gamma[mask == 0] == 1).all() and torch.isfinite(gamma).all()
    noise = torch.where(mask == 0, torch.nan, 0.0)
    again = token_credit(waad + noise, fai + noise, mask, credit, entropy=entropy + noise)
    assert torch.equal(gamma, again)


@pytest.mark.parametrize("strategy", ["anchor", "preplan", "random", "entropy", "bottom"])
def test_exactly_the_share_is_chosen_even_where_all_scores_are_equal(strategy):
    credit = TokenCredit(strategy=strategy, top_q=0.4)
    flat, mask = torch.ones(2, 50), torch.ones(2, 50)
    gamma = token_credit(flat, flat, mask, credit, entropy=flat)
    assert ((gamma == 1.5).sum(1) == 20).all()


def test_uniform_spreads_the_sum_of_the_random_control_over_all_tokens():
    waad, fai, mask, _ = made_up()
    sums = [token_credit(waad, fai, mask, TokenCredit(strategy=s)).sum(1) for s in ("uniform", "random")]
    torch.testing.assert_close(*sums)
    uniform = token_credit(waad, fai, mask, TokenCredit(strategy="uniform"))
    assert uniform[0].unique().numel() == 1


def test_random_choices_follow_the_generator_and_the_seed():
    waad, fai, mask, _ = made_up()
    credit = TokenCredit(strategy="random")
    generator = torch.Generator().manual_seed(3)
    first, second = (token_credit(waad, fai, mask, credit, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, token_credit(waad, fai, mask, credit, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(first, token_credit(waad, fai, mask, TokenCredit(strategy="random", seed=3)))


def test_a_chunk_is_not_formed_across_a_turn():
    waad = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    delta = chunk_steps(waad, mask)
    assert delta[0].nan_to_num(-1).tolist() == [0, -1, -1, 9, 0, -1]
    assert preplan_tokens(waad, mask, top_q=0.2).nonzero()[:, 1].tolist() == [3]


def test_an_anchor_hands_back_to_the_token_that_opens_its_chunk():
    waad = torch.tensor([[1.0, 9.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    fai = torch.tensor([[0.01, 0.01, 0.01, 0.9, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]])
    credit = TokenCredit(horizon=(1, 5), top_q=0.1, alpha=0.25, lookback=3)
    gamma = token_credit(waad, fai, torch.ones(1, 10), credit)[0]
    # Of tokens 0 to 2, the step from 0 to 1 is the largest.
    assert gamma.tolist() == pytest.approx([1 + 0.5 * 0.25, 1, 1, 1 + 0.5 * 0.75, 1, 1, 1, 1, 1, 1])
    near = token_credit(waad, fai, torch.ones(1, 10), TokenCredit(horizon=(1, 5), top_q=0.1, alpha=0.25, lookback=1))
    assert near[0, 2] == 1.125 and near[0, 0] == 1


def test_short_and_empty_responses_keep_one_and_longer_ones_do_not():
    fai = torch.rand(3, 40) + 0.1
    mask = torch.zeros(3, 40)
    mask[0, :19], mask[1, :20] = 1, 1
    gamma = token_credit(fai, fai, mask, TokenCredit(strategy="anchor"))
    assert (gamma[0] == 1).all() and (gamma[2] == 1).all() and (gamma[1] > 1).sum() == 8


def test_tokens_without_an_fai_are_no_anchors():
    fai = torch.zeros(1, 40)
    fai[0, [3, 8]] = 0.2
    assert anchor_tokens(fai, torch.ones(1, 40)).nonzero()[:, 1].tolist() == [3, 8]


@pytest.mark.parametrize("strategy", ["coupled", "anchor", "preplan", "random", "entropy", "bottom"])
def test_excluded_tokens_are_never_amplified(strategy):
    waad, fai, mask, entropy = made_up()
    excluded = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    credit = TokenCredit(strategy=strategy, horizon=(1, 9))
    gamma = token_credit(waad, fai, mask, credit, entropy=entropy, excluded=excluded)
    assert (gamma[excluded] == 1).all() and (gamma > 1).any()


def test_mean_normalisation_keeps_the_mean_of_each_response_at_one():
    waad, fai, mask, _ = made_up()
    gamma = token_credit(waad, fai, mask, TokenCredit(horizon=(2, 9), normalize="mean"))
    means = [gamma[row][mask[row] == 1].mean() for row in range(7) if mask[row].any()]
    torch.testing.assert_close(torch.stack(means), torch.ones(6, dtype=gamma.dtype))
    assert gamma[0].unique().numel() > 1


def test_sign_decides_which_advantages_are_credited():
    advantages, gamma = torch.tensor([2.0, -1.0, 0.0]), torch.full((3, 4), 1.5)
    first = {sign: credited_advantages(advantages, gamma, sign)[:, 0].tolist() for sign in ("both", "positive")}
    assert first == {"both": [3.0, -1.5, 0.0], "positive": [3.0, -1.0, 0.0]}
    assert credited_advantages(advantages, gamma, "negative")[:, 0].tolist() == [2.0, -1.5, 0.0]


def test_presets_are_the_two_versions_of_the_paper():
    assert TokenCredit.preset("v2") == TokenCredit()
    first = TokenCredit.preset("v1", gamma=2.0)
    assert (first.horizon, first.sign, first.gamma) == ((10, 50), "positive", 2.0)
    with pytest.raises(RlError, match="v1, v2"):
        TokenCredit.preset("v3")


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "anchors"},
        {"sign": "up"},
        {"normalize": "sum"},
        {"head_split": "never"},
        {"backend": "fast"},
        {"top_q": 0},
        {"top_q": 1.1},
        {"gamma": 0.5},
        {"alpha": -0.1},
        {"tau_waad": 2},
        {"window": 0},
        {"lookback": 0},
        {"horizon": (10, 5)},
        {"cosine_every": -1},
        {"gamma": float("nan")},
        {"gamma": float("inf")},
        {"gamma": "2"},
        {"window": 2.5},
        {"cosine_every": None},
        {"top_q": True},
        {"seed": "a"},
        {"horizon": 10},
        {"horizon": (1.5, 3)},
        {"layers": 3},
        {"layers": "ab"},
        {"layers": ()},
        {"layers": (-1,)},
        {"exclude_ids": 5},
        {"exclude_ids": (-1,)},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(RlError, match=next(iter(wrong))):
        TokenCredit(**wrong)


def test_settings_may_be_whole_numbers_numpys_and_ranges():
    credit = TokenCredit(gamma=2, window=np.int64(5), top_q=np.float32(0.5), layers=range(2, 4), horizon=[4, 8])
    assert (credit.layers, credit.horizon) == ((2, 3), (4, 8))
    with pytest.raises(RlError, match="unknown preset"):
        TokenCredit.preset(["v1"])


def test_shapes_that_disagree_and_a_missing_entropy_are_refused():
    one = torch.ones(2, 5)
    with pytest.raises(RlError, match="fai"):
        token_credit(one, torch.ones(2, 6), one, TokenCredit())
    with pytest.raises(RlError, match="entropy"):
        token_credit(one, one, one, TokenCredit(strategy="entropy"))


def test_an_anchor_does_not_hand_back_to_a_turn_before_its_own():
    waad = torch.tensor([[9.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1]])
    fai = torch.full((1, 9), 0.01)
    fai[0, 4] = 0.9
    credit = TokenCredit(horizon=(1, 5), top_q=0.1, lookback=4)
    assert token_credit(waad, fai, mask, credit)[0].tolist() == [1, 1, 1, 1, 1.5, 1, 1, 1, 1]


def test_the_horizon_includes_both_of_its_ends():
    fai, mask = torch.zeros(1, 8), torch.zeros(1, 8)
    mask[0, [2, 6]], fai[0, 2] = 1, 0.3
    found = {h: anchor_tokens(fai, mask, h).any().item() for h in [(4, 4), (1, 4), (4, 9), (1, 3), (5, 9)]}
    assert found == {(4, 4): True, (1, 4): True, (4, 9): True, (1, 3): False, (5, 9): False}
