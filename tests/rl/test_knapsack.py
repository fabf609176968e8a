import random
from itertools import combinations

import numpy as np
import pytest

from krontune.rl import RlError
from krontune.rl.tasks import get_task

KNAPSACK = get_task("knapsack")


def naive_optima(rows, capacity):
    """(largest value, all sets of ids that have it), by trying every subset of rows."""
    best, found = 0, []
    for size in range(len(rows) + 1):
        for places in combinations(range(len(rows)), size):
            if sum(rows[place][0] for place in places) <= capacity:
                worth = sum(rows[place][1] for place in places)
                if worth >= best:
                    found = [*(found if worth == best else []), tuple(place + 1 for place in places)]
                    best = worth
    return best, found


def odd_tables():
    rng = random.Random(5)
    for n in (1, 2, 3, 5, 8):
        for heaviest, dearest in ((1, 1), (3, 2), (5, 9), (20, 50)):
            for _ in range(40):
                rows = tuple((rng.randint(1, heaviest), rng.randint(1, dearest)) for _ in range(n))
                yield rows, rng.randint(1, 1 + sum(row[0] for row in rows))


def test_solver_agrees_with_trying_every_subset():
    several = 0
    for rows, capacity in odd_tables():
        value, optima = naive_optima(rows, capacity)
        solution = KNAPSACK.solve(KNAPSACK.instance(rows, capacity))
        assert (solution.value, solution.n_optima) == (value, len(optima)), (rows, capacity)
        assert solution.certificate in optima
        several += len(optima) > 1
    assert several > 150


def test_check_agrees_with_trying_every_subset():
    rng = random.Random(3)
    for _ in range(20):
        rows = tuple((rng.randint(1, 6), rng.randint(1, 5)) for _ in range(6))
        capacity = rng.randint(1, 20)
        instance = KNAPSACK.instance(rows, capacity)
        value, optima = naive_optima(rows, capacity)
        for size in range(7):
            for ids in combinations(range(1, 7), size):
                check = KNAPSACK.check(instance, ids[::-1])
                fits = sum(rows[i - 1][0] for i in ids) <= capacity
                assert check.feasible == fits
                assert check.value == (sum(rows[i - 1][1] for i in ids) if fits else 0)
                assert check.optimal == (ids in optima)
                assert check.order_ok == (size < 2)


@pytest.mark.parametrize("ids", [(0,), (3,), (-1,), (1, 1)])
def test_ids_that_do_not_exist_or_come_twice_are_infeasible(ids):
    assert not KNAPSACK.check(KNAPSACK.instance([(2, 5), (1, 1)], 9), ids).feasible


@pytest.mark.parametrize("generator", ["auto", "rejection", "repair"])
@pytest.mark.parametrize("n", [2, 5, 16, 30])
def test_generated_instances_have_one_optimum_and_say_how_they_were_made(generator, n):
    task = get_task("knapsack", generator=generator)
    for seed in range(12):
        instance = task.generate(seed, n)
        assert instance.n == n and task.solve(instance).n_optima == 1
        assert instance.generator == {"auto": "rejection" if n <= 16 else "repair"}.get(generator, generator)
        assert all(1 <= weight <= 20 and 1 <= value <= 50 for weight, value in instance.rows)
        total = sum(row[0] for row in instance.rows)
        if generator == "rejection":
            assert 0.3 * total - 1 <= instance.params[0] <= 0.7 * total or instance.params[0] <= 20
        assert task.solve(instance).value > 0


def test_known_rules_on_a_hand_made_instance():
    instance = KNAPSACK.instance([(5, 20), (9, 30), (4, 13), (10, 21), (1, 1)], 14)
    assert KNAPSACK.solve(instance).certificate == (1, 2)
    rules = {name: rule(instance) for name, rule in KNAPSACK.heuristics.items()}
    assert rules == {
        "densest": (1, 2),
        "most_valuable": (1, 2),
        "lightest": (1, 3, 5),
        "heaviest": (3, 4),
        "input_order": (1, 2),
        "densest_until_full": (1, 2),
    }
    tighter = KNAPSACK.instance(instance.rows, 13)
    assert KNAPSACK.heuristics["densest_until_full"](tighter) == (1,)
    assert KNAPSACK.heuristics["densest"](tighter) == (1, 3, 5)


def test_every_rule_is_feasible_and_none_is_always_right():
    items = KNAPSACK.instances(300, [5, 12])
    for name, rule in KNAPSACK.heuristics.items():
        checks = [KNAPSACK.check(item, rule(item)) for item in items]
        assert all(check.feasible and check.order_ok for check in checks), name
        assert np.mean([check.optimal for check in checks]) < 0.8, name


@pytest.mark.parametrize("name", ["permute_rows", "scale_weights", "scale_values", "add_oversized"])
def test_symmetries_carry_every_optimum_over(name):
    rng = random.Random(4)
    for _ in range(100):
        instance = KNAPSACK.generate(rng, [4, 9])
        changed, carry = KNAPSACK.symmetries[name](rng, instance)
        solution = KNAPSACK.solve(changed)
        assert solution.unique and solution.certificate == carry(KNAPSACK.solve(instance).certificate)
        assert (KNAPSACK.key(changed) == KNAPSACK.key(instance)) == (name == "permute_rows")


def test_prompt_and_worked_solution_have_their_exact_form():
    item = KNAPSACK.instance([(5, 20), (9, 30), (4, 13)], 14)
    prompt = KNAPSACK.prompt(item)
    assert "at most 14." in prompt and "\nid | weight | value\n1 | 5 | 20\n2 | 9 | 30\n3 | 4 | 13\n" in prompt
    assert KNAPSACK.completion(item) == "weights 5 + 9 = 14\nvalues 20 + 30 = 50\n\\ids{1,2} \\answer{50}"


def test_bad_options_and_rows_are_refused():
    for options in ({"weights": (0, 4)}, {"values": 3}, {"unique": 1}, {"generator": "planted"}):
        with pytest.raises(RlError, match=next(iter(options))):
            get_task("knapsack", **options)
    for rows, capacity in (([(0, 1)], 3), ([(1, 2, 3)], 3), ([(1, 2)], 0)):
        with pytest.raises(RlError, match="1 or more"):
            KNAPSACK.instance(rows, capacity)


def test_a_range_without_a_unique_optimum_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("krontune.rl.tasks.knapsack.MAX_TRIES", 50)
    with pytest.raises(RlError, match="widen values"):
        get_task("knapsack", weights=(1, 1), values=(1, 1)).generate(0, 5)
