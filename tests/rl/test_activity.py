import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from krontune.rl import RlError
from krontune.rl.tasks import get_task
from krontune.rl.tasks.intervals import best_schedule, conflicts, has_one_largest, loose_rows

PLAIN = get_task("activity")
WEIGHTED = get_task("activity_weighted")


def naive_feasible(rows, places):
    return all(rows[a][1] <= rows[b][0] or rows[b][1] <= rows[a][0] for a, b in combinations(places, 2))


def naive_optima(rows):
    """(largest weight, all sets of ids that have it), by trying every subset of rows."""
    best, found = 0, [frozenset()]
    for size in range(1, len(rows) + 1):
        for places in combinations(range(len(rows)), size):
            if naive_feasible(rows, places):
                worth = sum(rows[place][2] if len(rows[place]) > 2 else 1 for place in places)
                if worth >= best:
                    found = [*(found if worth == best else []), frozenset(place + 1 for place in places)]
                    best = worth
    return best, found


def random_rows(rng, n, horizon, longest, heaviest=0):
    rows = []
    for _ in range(n):
        start = rng.randint(0, horizon)
        row = (start, start + rng.randint(1, longest))
        rows.append((*row, rng.randint(1, heaviest)) if heaviest else row)
    return tuple(rows)


def odd_tables(weighted):
    """Crowded and roomy tables, many with equal rows, equal ends and touching rows."""
    rng = random.Random(7)
    for n in (1, 2, 3, 5, 8):
        for horizon, longest in ((0, 1), (3, 2), (6, 4), (12, 3), (40, 12)):
            for heaviest in (1, 2, 9) if weighted else (0,):
                for _ in range(25 if weighted else 60):
                    yield random_rows(rng, n, horizon, longest, heaviest)


@pytest.mark.parametrize("task", [PLAIN, WEIGHTED], ids=lambda task: task.name)
def test_solver_agrees_with_trying_every_subset(task):
    several = 0
    for rows in odd_tables(task is WEIGHTED):
        value, optima = naive_optima(rows)
        solution = task.solve(task.instance(rows))
        assert solution.value == value, rows
        assert frozenset(solution.certificate) in optima, rows
        assert solution.n_optima == len(optima), rows
        ends = [rows[i - 1][1] for i in solution.certificate]
        assert ends == sorted(ends)
        several += len(optima) > 1
    assert several > 400


def test_the_overlap_test_of_uniqueness_agrees_with_counting():
    unique = 0
    for rows in odd_tables(False):
        _, optima = naive_optima(rows)
        assert has_one_largest(rows) == (not list(loose_rows(rows))) == (len(optima) == 1), rows
        unique += len(optima) == 1
    assert unique > 150
    rng = random.Random(1)
    for _ in range(4000):
        rows = random_rows(rng, rng.randint(5, 24), 540, 110)
        assert has_one_largest(rows) == (best_schedule(rows)[2] == 1), rows


def test_loose_rows_are_those_that_overlap_fewer_than_two_of_the_earliest_ends():
    for rows in odd_tables(False):
        chosen = []
        for place in sorted(range(len(rows)), key=lambda i: (rows[i][1], i)):
            if naive_feasible(rows, [*chosen, place]):
                chosen.append(place)
        expected = {
            place
            for place in set(range(len(rows))) - set(chosen)
            if sum(not naive_feasible(rows, [place, other]) for other in chosen) < 2
        }
        assert set(loose_rows(rows)) == expected, rows


def test_conflicts_are_counted_pair_by_pair():
    for rows in odd_tables(False):
        expected = [sum(not naive_feasible(rows, [a, b]) for b in range(len(rows)) if b != a) for a in range(len(rows))]
        assert conflicts(rows) == expected, rows


@pytest.mark.parametrize("task", [PLAIN, WEIGHTED], ids=lambda task: task.name)
def test_check_agrees_with_trying_every_subset(task):
    rng = random.Random(3)
    for _ in range(25):
        rows = random_rows(rng, 7, 20, 8, 4 if task is WEIGHTED else 0)
        instance = task.instance(rows)
        value, optima = naive_optima(rows)
        for size in range(8):
            for places in combinations(range(7), size):
                ids = [place + 1 for place in places]
                rng.shuffle(ids)
                check = task.check(instance, ids)
                assert check.feasible == naive_feasible(rows, places)
                worth = sum(rows[place][2] for place in places) if task is WEIGHTED else size
                assert check.value == (worth if check.feasible else 0)
                assert check.optimal == (frozenset(ids) in optima)
                ends = [rows[i - 1][1] for i in ids]
                assert not check.feasible or check.order_ok == all(a <= b for a, b in pairwise(ends))


@pytest.mark.parametrize("ids", [(0, 1), (1, 4), (-1,), (1, 1), (2, 1, 2), (999_999_999,)])
def test_ids_that_do_not_exist_or_come_twice_are_infeasible(ids):
    check = PLAIN.check(PLAIN.instance([(0, 4), (4, 6), (1, 9)]), ids)
    assert not check.feasible and not check.optimal and check.value == 0


def test_touching_rows_do_not_overlap():
    instance = PLAIN.instance([(0, 4), (4, 6), (3, 5)])
    assert PLAIN.solve(instance).certificate == (1, 2)
    assert PLAIN.check(instance, (1, 2)).optimal and not PLAIN.check(instance, (1, 3)).feasible


@pytest.mark.parametrize("name", ["activity", "activity_weighted"])
@pytest.mark.parametrize("generator", ["auto", "rejection", "repair", "planted"])
@pytest.mark.parametrize("n", [2, 3, 7, 12, 20, 64])
def test_generated_instances_have_one_optimum_and_say_how_they_were_made(name, generator, n):
    if generator == "rejection" and n > 12:
        return  # hopeless without weights, by the paper's sampling
    task = get_task(name, generator=generator)
    kind = {"auto": "rejection" if n <= 16 else "repair"}.get(generator, generator)
    for seed in range(8):
        instance = task.generate(seed, n)
        assert (instance.n, instance.generator) == (n, kind)
        assert task.solve(instance).n_optima == 1
        assert task.instance(instance.rows).rows == instance.rows
        if generator != "planted":
            assert all(10 <= row[1] - row[0] <= 120 and row[0] <= 540 * max(n, 16) // 16 for row in instance.rows)


def test_planted_weights_keep_one_optimum_where_weights_are_few():
    task = get_task("activity_weighted", generator="planted", weights=(1, 3), duration=(1, 3))
    for seed in range(300):
        assert task.solve(task.generate(seed, [3, 14])).n_optima == 1


def test_rejection_draws_as_the_plain_twin_does():
    """The fast draw and the early test keep the distribution: the same as drawing with randint and counting optima."""
    rng = random.Random(5)
    plain = []
    while len(plain) < 400:
        rows = [(s := rng.randint(0, 540), s + rng.randint(10, 120)) for _ in range(6)]
        if best_schedule(rows)[2] == 1:
            plain.append(rows)
    fast = [PLAIN.generate(rng, 6).rows for _ in range(400)]
    for measure in (
        lambda rows: np.mean([row[0] for row in rows]),
        lambda rows: np.mean([row[1] - row[0] for row in rows]),
        lambda rows: len(best_schedule(rows)[1]),
        lambda rows: max(row[1] for row in rows),
    ):
        a, b = [measure(rows) for rows in plain], [measure(rows) for rows in fast]
        assert abs(np.mean(a) - np.mean(b)) < 4 * np.hypot(np.std(a), np.std(b)) / 20


def test_options_set_the_ranges():
    task = get_task("activity_weighted", horizon=7, duration=(2, 4), weights=(3, 5), unique=False)
    rows = [row for seed in range(80) for row in task.generate(seed, 5).rows]
    assert {row[0] for row in rows} == set(range(8))
    assert {row[1] - row[0] for row in rows} == {2, 3, 4}
    assert {row[2] for row in rows} == {3, 4, 5}
    assert {task.generate(seed, 5).generator for seed in range(5)} == {"free"}


def test_the_published_sampling_draws_the_size_anew_and_so_favours_few_rows():
    paper = get_task("activity", paper_compat=True)
    rng = random.Random(0)
    sizes = np.array([paper.generate(rng, [5, 16]).n for _ in range(1500)])
    assert np.mean(sizes == 5) == pytest.approx(0.275, abs=0.04)
    assert np.mean(sizes <= 7) == pytest.approx(0.60, abs=0.045)
    assert np.mean(sizes >= 12) == pytest.approx(0.13, abs=0.03)
    sizes = [instance.n for instance in paper.instances(400, [5, 16])]
    assert np.mean([n <= 7 for n in sizes]) > 0.5
    even = [instance.n for instance in PLAIN.instances(400, [5, 8])]
    assert all(70 < even.count(n) < 130 for n in range(5, 9))
    for options in ({"horizon": 90}, {"unique": False}, {"generator": "planted"}, {"duration": (1, 2)}):
        with pytest.raises(RlError, match="paper_compat fixes"):
            get_task("activity", paper_compat=True, **options)


def test_known_rules_score_what_was_measured_for_them():
    """Shares of optimal ids on unique instances, n uniform in 5 to 16, without weights 5 to 12."""
    floors = {
        "activity": {"earliest_start": 0.45, "shortest": 0.76, "fewest_conflicts": 0.98, "input_order": 0.35},
        "activity_weighted": {
            "earliest_end": 0.22,
            "latest_start": 0.22,
            "earliest_start": 0.17,
            "shortest": 0.18,
            "fewest_conflicts": 0.21,
            "input_order": 0.16,
            "heaviest": 0.75,
            "densest": 0.45,
        },
    }
    for name, rules in floors.items():
        task = get_task(name)
        rng = random.Random(2)
        items = [task.generate(rng, [5, 12] if task.name == "activity" else [5, 16]) for _ in range(500)]
        assert set(task.heuristics) == set(rules)
        for rule, floor in rules.items():
            claims = [task.heuristics[rule](item) for item in items]
            assert all(task.check(item, claim).feasible for item, claim in zip(items, claims, strict=True))
            right = np.mean([task.check(item, claim).optimal for item, claim in zip(items, claims, strict=True)])
            assert right == pytest.approx(floor, abs=0.09), rule


def test_known_rules_on_a_hand_made_instance():
    instance = WEIGHTED.instance([(0, 10, 3), (1, 3, 2), (3, 5, 2), (4, 9, 4), (9, 12, 1)])
    rules = {name: rule(instance) for name, rule in WEIGHTED.heuristics.items()}
    assert rules == {
        "earliest_end": (2, 3, 5),
        "latest_start": (2, 4, 5),
        "earliest_start": (1,),
        "shortest": (2, 3, 5),
        "fewest_conflicts": (2, 3, 5),
        "input_order": (1,),
        "heaviest": (2, 4, 5),
        "densest": (2, 3, 5),
    }


@pytest.mark.parametrize("task", [PLAIN, WEIGHTED], ids=lambda task: task.name)
@pytest.mark.parametrize("name", ["shift", "scale", "reverse_time", "permute_rows", "add_distractor"])
def test_symmetries_carry_every_optimum_over(task, name):
    rng = random.Random(4)
    differ = 0
    for _ in range(120):
        instance = task.generate(rng, [3, 9])
        changed, carry = task.symmetries[name](rng, instance)
        solution = task.solve(changed)
        assert solution.value == task.solve(instance).value
        assert solution.certificate == carry(task.solve(instance).certificate)
        assert solution.unique and all(row[0] >= 0 for row in changed.rows)
        assert changed.generator == f"{instance.generator}+{name}"
        differ += changed.rows != instance.rows
    assert differ > 100


def test_reversal_and_new_ids_expose_rules_that_go_by_the_surface():
    rng = random.Random(8)
    broken = {"reverse_time": 0, "permute_rows": 0}
    rules = {"reverse_time": "earliest_start", "permute_rows": "input_order"}
    for _ in range(150):
        instance = WEIGHTED.generate(rng, 10)
        for name, rule in rules.items():
            changed, carry = WEIGHTED.symmetries[name](rng, instance)
            broken[name] += WEIGHTED.heuristics[rule](changed) != carry(WEIGHTED.heuristics[rule](instance))
    assert min(broken.values()) > 75


def test_key_knows_neither_the_order_of_rows_nor_a_shift():
    rng = random.Random(6)
    for task in (PLAIN, WEIGHTED):
        instance = task.generate(rng, 8)
        for name in ("permute_rows", "shift"):
            assert task.key(task.symmetries[name](rng, instance)[0]) == task.key(instance)
        for name in ("scale", "reverse_time"):
            assert task.key(task.symmetries[name](rng, instance)[0]) != task.key(instance)


def test_prompt_and_worked_solution_have_their_exact_form():
    item = WEIGHTED.instance([(5, 9, 3), (0, 5, 4), (3, 7, 6)])
    assert "\nid | start | end | weight\n1 | 5 | 9 | 3\n2 | 0 | 5 | 4\n3 | 3 | 7 | 6\n" in WEIGHTED.prompt(item)
    assert "\nid | start | end\n1 | 5 | 9\n" in PLAIN.prompt(PLAIN.instance([(5, 9), (0, 4)]))
    assert WEIGHTED.completion(item) == "sorted 2,3,1\ntimes 0-5, 5-9\nweights 4 + 3\n\\ids{2,1} \\answer{7}"
    plain = PLAIN.instance([row[:2] for row in item.rows])
    assert PLAIN.completion(plain) == "sorted 2,3,1\ntimes 0-5, 5-9\n\\ids{2,1} \\answer{2}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": -1}, "horizon"),
        ({"duration": (0, 5)}, "below 1"),
        ({"duration": 5}, "duration"),
        ({"unique": "yes"}, "unique"),
        ({"generator": "plant"}, "did you mean 'planted'"),
        ({"weights": (0, 4)}, "below 1"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(RlError, match=message):
        get_task("activity_weighted", **options)


@pytest.mark.parametrize("rows", [[(3, 3, 1)], [(4, 2, 1)], [(1, 2)], [(1, 2, 0)], [(1, 2, 3, 4)]])
def test_rows_that_are_no_activities_are_refused(rows):
    with pytest.raises(RlError, match="start < end"):
        WEIGHTED.instance(rows)


def test_a_range_without_a_unique_optimum_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr("krontune.rl.tasks.activity.MAX_TRIES", 50)
    with pytest.raises(RlError, match="another generator"):
        get_task("activity", horizon=0).generate(0, 4)
    with pytest.raises(RlError, match="another generator"):
        get_task("activity_weighted", generator="planted", weights=(5, 5)).generate(0, 30)
