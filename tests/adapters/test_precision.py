"""Importance scores, the budget, and the plan as a file: pure maths."""

import itertools
import json
import math

import pytest
import torch

from krontune.adapters import BaseModelError, BitPlan
from krontune.adapters.precision import assign_bits, budget_fault, importance, lim, stored_bytes, zd


def naive_lim(before, after):
    cosines = []
    rows = (x.reshape(-1, x.shape[-1]).tolist() for x in (before, after))
    for a, b in zip(*rows, strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosines.append(dot / (math.hypot(*a) * math.hypot(*b)))
    return -sum(cosines) / len(cosines)


def naive_zd(weights):
    values = [v for w in weights for v in w.flatten().tolist()]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return sum((v - mean) / deviation > 1 for v in values) / len(values)


def naive_plan(importance, sizes, levels, avg_bits):
    """Of all plans with at most two neighbouring levels in which no layer has fewer bits than a less important one, the
    one with the most bits within the budget."""
    descending = sorted(levels, reverse=True)
    rank = sorted(range(len(sizes)), key=lambda i: (importance[i], -i))
    best, most = None, -1
    for bits in itertools.product(descending, repeat=len(sizes)):
        places = sorted({descending.index(b) for b in bits})
        ordered = [bits[i] for i in rank]
        total = sum(b * n for b, n in zip(bits, sizes, strict=True))
        if (
            places[-1] - places[0] <= 1
            and ordered == sorted(ordered)
            and total / sum(sizes) <= avg_bits
            and total > most
        ):
            best, most = list(bits), total
    return best


@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 7), (3, 17, 64)])
def test_lim_equals_its_loop(shape):
    torch.manual_seed(0)
    before, after = torch.randn(shape), torch.randn(shape)
    assert lim(before, after) == pytest.approx(naive_lim(before, after), abs=1e-6)


def test_a_layer_that_changes_nothing_is_the_least_important_there_can_be():
    x = torch.randn(3, 5, 8)
    assert lim(x, x) == pytest.approx(-1.0)
    assert lim(x, 2 * x) == pytest.approx(-1.0) and lim(x, -x) == pytest.approx(1.0)


def test_zd_equals_its_loop_over_all_matrices_of_the_layer_together():
    torch.manual_seed(0)
    weights = [torch.randn(5, 7), 3 * torch.randn(4, 3) + 1, torch.rand(2, 9) ** 3]
    assert zd(weights) == naive_zd(weights)
    assert zd([w.bfloat16() for w in weights]) == naive_zd([w.bfloat16() for w in weights])


def test_zd_does_not_see_scale_and_is_a_gaussian_s_for_gaussian_weights():
    torch.manual_seed(0)
    weights = [torch.randn(400, 500)]
    assert zd(weights) == zd([64 * weights[0]]) == pytest.approx(0.1587, abs=0.003)
    assert zd([torch.ones(3, 3)]) == 0


def test_a_small_zd_is_important_and_a_large_lim_and_nll_are():
    assert importance("zd", [0.1, 0.2]) == [-0.1, -0.2]
    assert importance("lim", [0.1, 0.2]) == importance("nll", [0.1, 0.2]) == [0.1, 0.2]


@pytest.mark.parametrize("levels", [[16, 8, 4], [16, 4], [8, 4], [4, 16, 8]])
@pytest.mark.parametrize("sizes", [[10] * 6, [3, 50, 7, 7, 11, 20], [1, 1, 1, 1, 1, 1000]])
def test_the_plan_is_the_best_of_all_plans_that_keep_to_its_rule(levels, sizes):
    scores = [0.3, -0.2, 0.3, 0.9, 0.0, 0.1]  # two of them equal
    for avg_bits in (4, 4.4, 5, 5.6, 6.5, 8, 9, 12, 15.9, 16):
        if budget_fault(levels, avg_bits) is None:
            assert assign_bits(scores, sizes, levels, avg_bits) == naive_plan(scores, sizes, levels, avg_bits)


def test_an_average_that_is_met_exactly_is_met_in_spite_of_rounding():
    # 5.6 as a float is a little less than 5.6, and 2 of 5 layers at 8 bits are exactly 5.6 on average.
    assert sorted(assign_bits(range(5), [7] * 5, [8, 4], 5.6)) == [4, 4, 4, 8, 8]


def test_the_least_important_layers_go_down_first_and_none_to_4_before_all_are_at_8():
    scores = [0.5, 0.1, 0.4, 0.2]
    assert assign_bits(scores, [10] * 4, [16, 8, 4], 12) == [16, 8, 16, 8]
    assert assign_bits(scores, [10] * 4, [16, 8, 4], 8) == [8, 8, 8, 8]
    assert assign_bits(scores, [10] * 4, [16, 8, 4], 5) == [8, 4, 4, 4]
    assert assign_bits(scores, [10] * 4, [16, 4], 7) == [16, 4, 4, 4]


@pytest.mark.parametrize(
    ("levels", "avg_bits", "message"),
    [
        ([16, 8, 4], 3.9, "avg_bits 3.9 is below the smallest of the levels [16, 8, 4]; give 4 to 16"),
        ([8, 4], 9, "avg_bits 9 is above the largest of the levels [8, 4]; give 4 to 8"),
        ([16, 8, 2], 9, "level 2 is not possible; allowed: 16 (as loaded), 8 (int8) and 4 (nf4)"),
        ([8], 8, "give two or three different ones"),
        ([8, 8], 8, "give two or three different ones"),
        ([16, 4], float("nan"), "avg_bits nan is not within the levels [16, 4]"),
    ],
)
def test_an_impossible_budget_is_refused_with_its_numbers(levels, avg_bits, message):
    with pytest.raises(BaseModelError) as caught:
        assign_bits([0.1, 0.2], [5, 5], levels, avg_bits)
    assert message in str(caught.value)


def example(**changes):
    options = {
        "model": "m",
        "scorer": "zd",
        "levels": (16, 8, 4),
        "avg_bits": 5.0,
        "bits": (8, 4),
        "scores": (0.1, 0.2),
        "weights": (64, 192),
        "bytes": stored_bytes(8, 8, 8) + stored_bytes(8, 24, 4),
    }
    return BitPlan(**(options | changes))


def test_averages_are_weighted_by_the_sizes_of_the_layers():
    plan = example()
    assert plan.average_bits == (8 * 64 + 4 * 192) / 256
    assert plan.counts() == {16: 0, 8: 1, 4: 1}
    # int8: 64 bytes and 8 scales of 4; nf4: 96 bytes, 3 scales of 1, their one scale and mean of 4 each
    assert plan.bytes == (64 + 32) + (96 + 3 + 4 + 4) and plan.stored_bits == 8 * plan.bytes / 256


def test_a_plan_reads_back_from_its_file_and_from_its_folder(tmp_path):
    plan = example(sample={"tokens": 7, "sha256": "ab"})
    file = plan.save(tmp_path)
    assert file == tmp_path / "bit_plan.json" and [p.name for p in tmp_path.iterdir()] == ["bit_plan.json"]
    assert BitPlan.load(tmp_path) == BitPlan.load(file) == plan
    assert json.loads(file.read_text())["average_bits"] == plan.average_bits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("bits"), "lacks 'bits'"),
        (lambda found: found.update(bits=[8, 5]), "bits other than 16, 8 and 4"),
        (lambda found: found.update(bits=[8]), "differ in length"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, change, message):
    file = example().save(tmp_path / "plan.json")
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(BaseModelError, match="is no bit plan") as caught:
        BitPlan.load(file)
    assert message in str(caught.value)


def test_a_plan_that_is_not_there_or_cut_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="there is no bit plan"):
        BitPlan.load(tmp_path)
    (tmp_path / "bit_plan.json").write_text('{"bits": [8')
    with pytest.raises(BaseModelError, match="is no bit plan"):
        BitPlan.load(tmp_path)
