import math
import random
from itertools import combinations

import numpy as np
import pytest

from krontune.rl import RlError
from krontune.rl.tasks import get_task
from krontune.rl.tasks.subsequence import count_optima, critical_levels, longest

LIS = get_task("lis")


def naive_optima(values):
    """All longest strictly increasing subsequences, as tuples of ids, by trying every subset of rows."""
    for size in range(len(values), 0, -1):
        found = [
            tuple(i + 1 for i in places)
            for places in combinations(range(len(values)), size)
            if all(values[a] < values[b] for a, b in zip(places, places[1:], strict=False))
        ]
        if found:
            return found
    return [()]


def odd_sequences():
    rng = random.Random(11)
    for n in (1, 2, 3, 4, 5, 7, 9, 11):
        for top in (1, 2, 3, 5, 9, 99):
            for _ in range(4):
                yield tuple(rng.randint(1, top) for _ in range(n))


def values_of(instance):
    return tuple(row[0] for row in instance.rows)


def test_solver_agrees_with_trying_every_subset():
    for values in odd_sequences():
        optima = naive_optima(values)
        solution = LIS.solve(LIS.instance(values))
        assert solution.value == len(optima[0]), values
        assert solution.certificate in optima, values
        assert solution.n_optima == len(optima), values
        assert solution.unique == (len(optima) == 1), values


def test_one_critical_element_a_level_means_exactly_one_optimum():
    for values in odd_sequences():
        levels = critical_levels(values)
        assert len(levels) == len(naive_optima(values)[0])
        assert all(len(level) == 1 for level in levels.values()) == (len(naive_optima(values)) == 1), values
    rng = random.Random(5)
    unique = 0
    for _ in range(4000):
        values = tuple(rng.randint(1, rng.choice((9, 99, 999))) for _ in range(rng.randint(5, 24)))
        one_each = all(len(level) == 1 for level in critical_levels(values).values())
        assert one_each == (count_optima(values) == 1), values
        unique += one_each
    assert 400 < unique < 2000


def test_check_agrees_with_trying_every_subset():
    rng = random.Random(3)
    for _ in range(60):
        values = tuple(rng.randint(1, 6) for _ in range(7))
        instance = LIS.instance(values)
        optima = naive_optima(values)
        for size in range(8):
            for ids in combinations(range(1, 8), size):
                check = LIS.check(instance, ids)
                rising = all(values[a - 1] < values[b - 1] for a, b in zip(ids, ids[1:], strict=False))
                assert check.feasible == rising
                assert check.value == (size if rising else 0)
                assert check.optimal == (ids in optima)


@pytest.mark.parametrize(
    ("ids", "feasible", "optimal", "order_ok"),
    [
        ((1, 3, 4), True, True, True),
        ((4, 1, 3), True, True, False),
        ((1, 3), True, False, True),
        ((), True, False, True),
        ((1, 2, 3), False, False, True),
        ((1, 3, 3), False, False, False),
        ((0, 1, 3), False, False, True),
        ((1, 3, 6), False, False, True),
        ((3, 4, 999_999_999), False, False, True),
    ],
)
def test_check_of_a_hand_made_instance(ids, feasible, optimal, order_ok):
    check = LIS.check(LIS.instance([3, 40, 7, 9, 2]), ids)
    assert (check.feasible, check.optimal, check.order_ok) == (feasible, optimal, order_ok)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 16, 17, 33, 70])
def test_generated_instances_have_one_optimum_and_say_how_they_were_made(n):
    rng = random.Random(n)
    for _ in range(15):
        instance = LIS.generate(rng, n)
        assert instance.n == n
        assert LIS.solve(instance).n_optima == 1
        assert instance.generator == ("rejection" if n <= 16 else "repair")
        assert all(1 <= value <= 99 for value in values_of(instance))
    assert LIS.solve(LIS.generate(0, n)).value >= 2


def test_values_are_drawn_from_the_whole_inclusive_range():
    task = get_task("lis", values=[4, 9], unique=False)
    drawn = {value for seed in range(60) for value in values_of(task.generate(seed, 6))}
    assert drawn == {4, 5, 6, 7, 8, 9}


def test_without_uniqueness_other_optima_appear():
    task = get_task("lis", unique=False)
    instances = [task.generate(seed, 6) for seed in range(50)]
    assert {instance.generator for instance in instances} == {"free"}
    assert any(not task.solve(instance).unique for instance in instances)


def test_every_kind_of_random_source_repeats_itself():
    for make in (lambda: 5, lambda: random.Random(5), lambda: np.random.default_rng(5)):
        assert LIS.generate(make(), 9) == LIS.generate(make(), 9)
        assert LIS.generate(make(), 24) == LIS.generate(make(), 24)
    source = np.random.default_rng(5)
    assert LIS.generate(source, 9) != LIS.generate(source, 9)
    assert LIS.generate(5, 9) != LIS.generate(6, 9)


def test_sizes_are_drawn_first_so_that_all_are_equally_frequent():
    rng = random.Random(2)
    counts = np.bincount([LIS.generate(rng, [5, 16]).n for _ in range(2400)], minlength=17)[5:]
    assert len(counts) == 12
    # 200 expected, standard deviation 13.5; drawing n anew on each rejection gives some 305 to 125
    assert counts.min() > 145 and counts.max() < 255


def test_known_rules_score_what_was_measured_for_them():
    """Shares of right counts and right ids, unique instances with n uniform in 5 to 16."""
    floors = {
        "greedy_first": (0.157, 0.157),
        "greedy_min": (0.112, 0.112),
        "greedy_best_start": (0.361, 0.361),
        "longest_run": (0.149, 0.149),
        "smallest_next": (0.376, 0.376),
        "beam2": (0.40, 0.40),
        "beam3": (0.56, 0.56),
        "patience_tails": (1.0, 0.157),
    }
    task = get_task("lis", values=(1, 1000))
    rng = random.Random(0)
    instances = [task.generate(rng, [5, 16]) for _ in range(1500)]
    assert set(task.heuristics) == set(floors)
    for name, (counts, ids) in floors.items():
        claims = [(item, task.heuristics[name](item)) for item in instances]
        right = [len(claim) == task.solve(item).value for item, claim in claims]
        optimal = [task.check(item, claim).optimal for item, claim in claims]
        assert np.mean(right) == pytest.approx(counts, abs=0.06), name
        assert np.mean(optimal) == pytest.approx(ids, abs=0.06), name


def test_known_rules_on_a_hand_made_instance():
    instance = LIS.instance([65, 10, 60, 20, 70, 5, 30, 6])
    rules = {name: rule(instance) for name, rule in LIS.heuristics.items()}
    assert rules["greedy_first"] == (1, 5)
    assert rules["greedy_min"] == (6, 7)
    assert rules["greedy_best_start"] == (2, 3, 5)
    assert rules["longest_run"] == (2, 3)
    assert rules["smallest_next"] == (2, 4, 7)
    assert rules["patience_tails"] == (6, 8, 7)
    assert all(LIS.check(instance, rules[name]).feasible for name in rules if name != "patience_tails")


@pytest.mark.parametrize("name", ["monotone_map", "reverse_negate", "append_low", "prepend_high"])
def test_symmetries_carry_every_optimum_over(name):
    task = get_task("lis", values=(1, 30))
    rng = random.Random(4)
    differ = 0
    for _ in range(150):
        instance = task.generate(rng, [3, 9])
        changed, carry = task.symmetries[name](rng, instance)
        solution = task.solve(changed)
        assert solution.value == task.solve(instance).value
        assert solution.certificate == carry(task.solve(instance).certificate)
        assert solution.unique
        differ += changed.rows != instance.rows
        assert all(1 <= value <= 30 for value in values_of(changed))
    assert differ > 140


def test_reversal_exposes_a_greedy_rule():
    rng = random.Random(8)
    rule = LIS.heuristics["greedy_first"]
    broken = 0
    for _ in range(100):
        instance = LIS.generate(rng, 10)
        changed, carry = LIS.symmetries["reverse_negate"](rng, instance)
        broken += rule(changed) != carry(rule(instance))
    assert broken > 80


def test_features_are_finite_and_read_off_the_input():
    features = LIS.features(LIS.instance([3, 9, 4, 4, 8]))
    assert features["n"] == 5 and features["min"] == 3 and features["max"] == 9 and features["range"] == 6
    assert features["distinct_ratio"] == 0.8
    assert features["pair_up_ratio"] == 0.6 and features["pair_down_ratio"] == 0.3
    assert features["step_up_ratio"] == 0.5 and features["step_down_ratio"] == 0.25
    assert features["turn_ratio"] == 1.0
    assert features["longest_rise"] == 2 and features["longest_fall"] == 2
    assert features["record_highs"] == 2 and features["record_lows"] == 1
    assert features["mean"] == 5.6 and features["median"] == 4
    for values in ([7], [7, 7], [1, 2, 3], [3, 2, 1]):
        assert all(math.isfinite(value) for value in LIS.features(LIS.instance(values)).values())


def test_prompt_shows_the_rows_and_the_form_of_the_answer():
    instance = LIS.instance([3, 40, 7, 9, 2])
    prompt = LIS.prompt(instance)
    assert "id | value\n1 | 3\n2 | 40\n3 | 7\n4 | 9\n5 | 2\n" in prompt
    assert r"\ids{" in prompt and r"\answer{" in prompt
    assert len(prompt) < 300
    assert "Hint" not in prompt and "Hint" in LIS.prompt(instance, hint=True)
    assert not LIS.parse(prompt).ok


def test_worked_solution_has_the_exact_form_and_is_right():
    instance = LIS.instance([3, 40, 25, 9, 12])
    assert LIS.completion(instance) == "values 3 < 9 < 12\n\\ids{1,4,5} \\answer{3}"
    mark = LIS.mark(instance, LIS.completion(instance))
    assert mark.answer_right and mark.certificate_right


def test_instances_survive_json_and_foreign_json_is_refused():
    instance = LIS.generate(0, 20)
    assert LIS.instance_from_json(LIS.to_json(instance)) == instance
    for text in ("", "{}", "[1]", '{"task": "lis", "generator": "x", "rows": []}', "null"):
        with pytest.raises(RlError):
            LIS.instance_from_json(text)
    with pytest.raises(RlError, match="knapsack"):
        LIS.instance_from_json('{"task": "knapsack", "generator": "x", "rows": [[1, 2]]}')
    with pytest.raises(RlError, match="1 integers"):
        LIS.instance_from_json('{"task": "lis", "generator": "x", "rows": [[1, 2]]}')


def test_solver_is_fast_on_long_columns():
    rng = random.Random(1)
    values = tuple(rng.randint(1, 10**6) for _ in range(20_000))
    ids, count = longest(values)
    assert 250 < len(ids) < 300 and count > 1


@pytest.mark.parametrize("n", [1, 0, -3, 2.5, "5", None, True, [5], [7, 5], [1, 5], [3, 4, 5], [2, "x"]])
def test_a_bad_n_is_refused(n):
    with pytest.raises(RlError, match="n must be"):
        LIS.generate(0, n)


@pytest.mark.parametrize("options", [{"values": (5, 1)}, {"values": 7}, {"values": (1, 2, 3)}, {"unique": 1}])
def test_a_bad_option_is_refused(options):
    with pytest.raises(RlError, match=next(iter(options))):
        get_task("lis", **options)


def test_a_range_of_one_value_is_refused_only_where_the_optimum_must_be_unique():
    with pytest.raises(RlError, match="widen"):
        get_task("lis", values=(4, 4))
    assert values_of(get_task("lis", values=(4, 4), unique=False).generate(0, 3)) == (4, 4, 4)


@pytest.mark.parametrize("rng", [None, "seed", 1.5, True])
def test_a_bad_random_source_is_refused(rng):
    with pytest.raises(RlError, match="rng"):
        LIS.generate(rng, 5)


def test_unknown_tasks_and_options_are_named_with_a_guess():
    with pytest.raises(RlError, match="did you mean 'lis'"):
        get_task("lsi")
    with pytest.raises(RlError, match="did you mean 'values'"):
        get_task("lis", value=(1, 9))
