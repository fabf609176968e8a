"""The masking audit, against exact (joint) Shapley values on games small enough to enumerate."""

import math
from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.rl.audit import answer_log_likelihood, masking_audit, relative_acu, verifier_reward
from krontune.rl.errors import RlError

SPANS = 10


def subsets(items, least=0, most=None):
    items = sorted(items)
    return [
        frozenset(c)
        for size in range(least, (len(items) if most is None else most) + 1)
        for c in combinations(items, size)
    ]


def joint_shapley(value, n, order=1):
    """Joint Shapley values of all sets of up to `order` of n players, by enumeration (arXiv 2107.11357).

    Order 1 gives Shapley's own.
    """
    assert n <= 12
    q = [1 / sum(math.comb(n, i) for i in range(1, order + 1))]
    for r in range(1, n):
        above = sum(math.comb(r, s) * q[s] for s in range(max(r - order, 0), r))
        q.append(above / sum(math.comb(n - r, s) for s in range(1, min(order, n - r) + 1)))
    worth = {s: value(s) for s in subsets(range(n))}
    return {
        t: sum(q[len(s)] * (worth[s | t] - worth[s]) for s in subsets(set(range(n)) - t))
        for t in subsets(range(n), 1, order)
    }


def game(shown):
    """Spans 2 and 5 help only together, 7 by itself and a little more with 2; the others do nothing."""
    return 2.0 * ({2, 5} <= shown) + 1.0 * (7 in shown) + 0.5 * ({2, 7} <= shown)


def measured(hidden):
    return torch.tensor([game({i for i in range(SPANS) if not row[i]}) for row in hidden])


def audit_of(values, **options):
    scores = torch.tensor([[float(v) for v in values]])
    return masking_audit(measured, scores, torch.ones(1, SPANS), repeats=64, **options)


def test_the_oracle_itself_is_right_on_games_with_known_values():
    single = joint_shapley(game, SPANS)
    known = {2: 1.25, 5: 1.0, 7: 1.25}
    assert all(single[frozenset({i})] == pytest.approx(known.get(i, 0)) for i in range(SPANS))
    pairs = joint_shapley(game, SPANS, order=2)
    assert sum(pairs.values()) == pytest.approx(game(set(range(SPANS))))
    assert all(pairs[t] == 0 for t in pairs if not t & {2, 5, 7})
    both = joint_shapley(lambda shown: float(len(shown) == 2), 2, order=2)
    assert list(both.values()) == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_shapley_values_as_scores_find_what_matters_and_their_reverse_does_not():
    values = [joint_shapley(game, SPANS)[frozenset({i})] for i in range(SPANS)]
    best, worst = audit_of(values), audit_of([-v for v in values])
    assert best.racu > 0.5 and worst.racu < -0.5
    assert best.credited[0] == best.random[0] == 3.5 and best.credited[-1] == best.random[-1] == 0
    chance = [audit_of(torch.rand(SPANS, generator=torch.Generator().manual_seed(s))).racu for s in range(40)]
    assert abs(sum(chance) / 40) < 0.15


def test_the_order_of_racu_is_that_of_agreement_with_joint_shapley_values():
    pairs = joint_shapley(game, SPANS, order=2)

    def agreement(values):  # of the three spans hidden first
        first = set(sorted(range(SPANS), key=lambda i: (-values[i], i))[:3])
        return sum(v for t, v in pairs.items() if t & first)

    tried = [torch.rand(SPANS, generator=torch.Generator().manual_seed(s)).tolist() for s in range(30)]
    ranked = sorted(tried, key=lambda v: audit_of(v).acu)
    low, high = (sum(agreement(v) for v in part) / 10 for part in (ranked[:10], ranked[-10:]))
    assert high > low + 0.5


def test_relative_acu_of_curves_drawn_by_hand():
    x = [0, 0.5, 1]
    assert relative_acu(x, [1, 0, 0], [1, 0.5, 0]) == pytest.approx((0.25, 0.5))
    assert relative_acu(x, [1, 0.5, 0], [1, 0.5, 0]) == (0, 0)
    assert math.isnan(relative_acu(x, [1, 1, 1], [1, 1, 1])[1])


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, eos_token_id=63, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batch():
    ids = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, :3] = 0
    answer = torch.zeros_like(ids)
    answer[:, 16:] = 1
    return ids, attended, answer


def test_hidden_tokens_are_out_of_sight_and_the_others_keep_their_place():
    model, (ids, attended, answer) = tiny_model(), batch()
    measure = answer_log_likelihood(model, ids, attended, answer)
    whole = measure(torch.zeros_like(ids, dtype=torch.bool))
    logits = model(input_ids=ids[0:1, 3:]).logits.log_softmax(-1)
    alone = torch.stack([logits[0, t - 4, ids[0, t]] for t in range(16, 20)]).mean()
    assert whole[0].item() == pytest.approx(alone.item(), abs=1e-5)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 8:10] = True
    fewer = measure(hidden)
    assert (fewer - whole).abs().min() > 1e-4
    other = ids.clone()
    other[:, 8:10] = 61
    torch.testing.assert_close(answer_log_likelihood(model, other, attended, answer)(hidden), fewer)


def test_an_audit_runs_on_a_model_and_scores_that_are_the_measured_damage_are_faithful():
    model, (ids, attended, answer) = tiny_model(), batch()
    measure = answer_log_likelihood(model, ids, attended, answer)
    candidates = attended.clone()
    candidates[:, :5], candidates[:, 15:] = 0, 0
    whole = measure(torch.zeros_like(ids, dtype=torch.bool))
    each = torch.eye(20, dtype=torch.bool)[:, None].expand(20, 2, 20)
    damage = torch.stack([whole - measure(one) for one in each], 1)  # (2, 20)
    assert masking_audit(measure, damage, candidates).acu > 0 > masking_audit(measure, -damage, candidates).acu


def test_the_verifier_reads_an_answer_written_without_the_hidden_tokens():
    class Numbers:
        eos_token_id = 63

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    model, (ids, attended, _) = tiny_model(), batch()
    seen = []

    def reward(texts):
        seen.append(texts)
        return [float(len(text)) for text in texts]

    measure = verifier_reward(model, Numbers(), ids, attended, [12, 14], reward, response_start=6, max_new_tokens=5)
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    measure(nothing)
    for row, start in enumerate((12, 14)):
        first = 3 if row == 0 else 0
        want = model.generate(ids[row : row + 1, first:start], max_new_tokens=5, do_sample=False, eos_token_id=63)
        new = [t for t in want[0, start - first :].tolist() if t != 63]
        assert seen[0][row] == " ".join(map(str, [*ids[row, 6:start].tolist(), *new]))
    hidden = nothing.clone()
    hidden[:, 7:11] = True
    measure(hidden)
    assert seen[0] != seen[1] and seen[1][0].startswith(" ".join(map(str, ids[0, 6:12].tolist())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.1, 1)}, "rise from 0 to 1"),
        ({"fractions": (0, 0.5, 0.5, 1)}, "rise"),
        ({"repeats": 0}, "repeats"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(RlError, match=message):
        masking_audit(measured, torch.ones(1, SPANS), torch.ones(1, SPANS), **options)
