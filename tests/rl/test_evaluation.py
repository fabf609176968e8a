import json
import random

import pytest

from krontune.rl import RlError, get_task, heuristic_table, score, wilson_interval

LIS = get_task("lis")


def some_instances(size, n=(5, 16)):
    rng = random.Random(9)
    return [LIS.generate(rng, n) for _ in range(size)]


def test_worked_solutions_score_one_and_silence_scores_zero():
    instances = some_instances(40)
    right = score(LIS, instances, [LIS.completion(item) for item in instances])
    assert right.answer.value == right.certificate.value == 1.0
    assert right.parse_failure.value == right.gap.value == 0.0
    silent = score(LIS, [LIS.to_json(item) for item in instances], [""] * 40)
    assert silent.answer.value == silent.certificate.value == 0.0
    assert silent.parse_failure.value == 1.0


def test_rates_carry_wilson_intervals_and_the_gap_a_paired_one():
    instances = some_instances(20)
    texts = [LIS.completion(item) for item in instances]
    texts[:5] = [f"\\ids{{1}} \\answer{{{LIS.solve(item).value}}}" for item in instances[:5]]
    texts[5:8] = ["hm"] * 3
    found = score(LIS, instances, texts)
    assert found.n == 20
    assert (found.answer.value, found.certificate.value) == (0.85, 0.6)
    assert found.parse_failure.value == 0.15
    assert (found.certificate.low, found.certificate.high) == wilson_interval(12, 20)
    assert found.gap.value == pytest.approx(0.25)
    assert 0.0 < found.gap.low < 0.25 < found.gap.high < 0.6


def test_an_evaluation_becomes_plain_json():
    instances = some_instances(3)
    found = score(LIS, instances, [LIS.completion(item) for item in instances]).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["certificate"] == {"value": 1.0, "low": wilson_interval(3, 3)[0], "high": 1.0, "n": 3}


def test_the_table_shows_the_rule_with_right_counts_and_wrong_certificates():
    table = heuristic_table(LIS, some_instances(400))
    assert set(table) == set(LIS.heuristics)
    tails = table["patience_tails"]
    assert tails.answer.value == 1.0
    assert tails.certificate.value < 0.25
    assert tails.gap.value == pytest.approx(1.0 - tails.certificate.value) and tails.gap.low > 0.7
    for name in set(table) - {"patience_tails"}:
        assert table[name].gap.value == 0.0, name
        assert table[name].parse_failure.value == 0.0
        assert 0.02 < table[name].certificate.value < 0.75


def test_nothing_and_uneven_lists_are_refused():
    with pytest.raises(RlError, match="nothing to score"):
        score(LIS, [], [])
    with pytest.raises(RlError, match="1 completions for 2 instances"):
        score(LIS, some_instances(2), [""])
