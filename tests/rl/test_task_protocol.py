"""What every task must hold, whatever it asks."""

import math
import pickle
import random

import numpy as np
import pytest

from krontune.rl import RlError, heuristic_table, score
from krontune.rl.tasks import TASKS, Lis, get_task
from krontune.rl.tasks.splits import split_of

NAMES = sorted(TASKS)
SIZES = {name: ([3, 5] if name == "countdown" else [5, 9]) for name in NAMES}


@pytest.fixture(params=NAMES)
def task(request):
    return get_task(request.param)


def some(task, size=60, **options):
    return task.instances(size, SIZES[task.name], **options)


def test_the_tasks_are_those_that_are_promised():
    assert NAMES == ["activity", "activity_weighted", "countdown", "knapsack", "lis"]
    assert all(kind.name == name for name, kind in TASKS.items())


def test_worked_solutions_are_right_readable_and_in_order(task):
    items = some(task)
    for item in items:
        mark = task.mark(item, task.completion(item))
        assert mark.certificate_right and mark.answer_right and mark.check.order_ok
        assert mark.solution.unique and mark.verdict == "optimal"
        assert mark.parsed.ids == mark.solution.certificate
        assert mark.instance is item and mark.text == task.completion(item)
    assert score(task, items, [task.completion(item) for item in items]).gap.value == 0.0


def test_a_prompt_says_the_rows_and_the_form_but_is_no_answer(task):
    for item in some(task, 10):
        prompt = task.prompt(item)
        assert "\n" + " | ".join(("id", *task.columns)) + "\n1 | " in prompt
        assert all(f"\n{i} | {' | '.join(map(str, row))}\n" in prompt for i, row in enumerate(item.rows, start=1))
        assert all(str(param) in prompt.split("id |")[0] for param in item.params)
        assert not task.parse(prompt).ok and not task.mark(item, prompt).answer_right
        hinted = task.prompt(item, hint=True)
        assert "Hint" in hinted and "Hint" not in prompt
        assert [line for line in hinted.split("\n") if not line.startswith("Hint")] == prompt.split("\n")


def test_instances_survive_json_and_pickle_without_what_was_worked_out(task):
    for item in some(task, 20):
        task.solution(item)
        for copy in (task.instance_from_json(task.to_json(item)), pickle.loads(pickle.dumps(item))):
            assert copy == item and copy.generator == item.generator and not copy.memo
            assert task.key(copy) == task.key(item)
    with pytest.raises(RlError, match="params|integers"):
        other = '"params": [1]' if not task.params else '"params": [1, 2]'
        rows = [[1] * len(task.columns)]
        task.instance_from_json(f'{{"task": "{task.name}", "generator": "x", "rows": {rows}, {other}}}')


def test_a_solution_is_worked_out_once_for_each_task_object(task, monkeypatch):
    item = some(task, 1)[0]
    item.memo.clear()
    calls = []
    solve = task.solve
    monkeypatch.setattr(task, "solve", lambda instance: calls.append(1) or solve(instance))
    for _ in range(5):
        task.mark(item, task.completion(item))
    assert len(calls) == 1
    assert get_task(task.name).solution(item) == solve(item)


def test_a_task_pickles_with_its_rules_and_symmetries(task):
    copy = pickle.loads(pickle.dumps(task))
    item = some(task, 1)[0]
    assert copy.options() == task.options()
    assert {name: rule(item) for name, rule in copy.heuristics.items()} == {
        name: rule(item) for name, rule in task.heuristics.items()
    }
    for name in task.symmetries:
        changed, carry = copy.symmetries[name](random.Random(1), item)
        again, same = task.symmetries[name](random.Random(1), item)
        ids = task.solve(item).certificate
        assert changed == again and pickle.loads(pickle.dumps(carry))(ids) == same(ids)


def test_splits_and_seeds_share_nothing(task):
    keys = {
        split: {task.key(item) for item in some(task, 80, split=split)} for split in ("train", "validation", "test")
    }
    assert all(len(found) == 80 for found in keys.values())
    for split, found in keys.items():
        assert {split_of(task.name, key) for key in found} == {split}
    assert len(keys["train"] & {task.key(item) for item in some(task, 80, seed=1)}) <= 2


def test_a_discriminating_set_fools_every_rule(task):
    # without weights only planted tables of some size do
    if task.name == "activity":
        task = get_task(task.name, generator="planted")
    n = {"activity": 20, "countdown": [4, 5], "activity_weighted": [8, 12]}.get(task.name, [10, 12])
    items = task.instances(12, n, discriminating=True)
    for name, result in heuristic_table(task, items).items():
        assert result.certificate.value == 0.0, name
    assert all(not task.fooled(item) and task.solve(item).unique for item in items)
    assert any(task.fooled(item) for item in task.instances(40, n))


def test_a_ladder_has_the_asked_number_of_each_size(task):
    sizes = (3, 4, 5) if task.name == "countdown" else (4, 9, 20)
    ladder = get_task(task.name).ladder(6, sizes, seed=2)
    assert list(ladder) == list(sizes)
    for n, items in ladder.items():
        assert len(items) == 6 and all(item.n == n for item in items)
        assert all(split_of(task.name, task.key(item)) == "test" for item in items)


def test_hints_go_to_the_asked_share_of_prompts(task):
    data = task.dataset(200 if task.name == "lis" else 60, SIZES[task.name], hints=0.5)
    hinted = ["Hint" in row["prompt"][0]["content"] for row in data]
    assert hinted == list(data["hint"]) and 0.3 < sum(hinted) / len(hinted) < 0.7
    assert "hint" not in task.dataset(3, SIZES[task.name]).column_names
    assert all(task.dataset(3, SIZES[task.name], hints=1.0)["hint"])
    with pytest.raises(RlError, match="hints"):
        task.dataset(3, SIZES[task.name], hints=1.5)


def test_features_are_finite_numbers_under_the_same_names(task):
    found = [task.features(item) for item in some(task, 30)]
    assert len({tuple(features) for features in found}) == 1
    assert all(math.isfinite(value) and type(value) is float for features in found for value in features.values())
    assert len({tuple(features.values()) for features in found}) == 30


def test_claims_of_rows_that_do_not_exist_can_be_written_and_are_not_paid(task):
    item = some(task, 1)[0]
    for ids in ((), (0,), (-7, 3), (item.n + 1,), (999,) * 2, tuple(range(-3, item.n + 3))):
        text = task.write(item, ids)
        assert not task.mark(item, text).certificate_right
        assert not task.check(item, ids).optimal


def test_the_lis_of_the_paper_has_its_values_and_favours_few_rows():
    paper = get_task("lis", paper_compat=True)
    rng = random.Random(0)
    items = [paper.generate(rng, [5, 16]) for _ in range(2000)]
    values = [row[0] for item in items for row in item.rows]
    assert min(values) >= 1 and 990 < max(values) <= 1000
    sizes = [item.n for item in items]
    assert sizes.count(5) / 2000 == pytest.approx(0.127, abs=0.025)
    assert sizes.count(16) / 2000 == pytest.approx(0.052, abs=0.018)
    assert paper.instances(5, [5, 16]) != get_task("lis", values=(1, 1000)).instances(5, [5, 16])
    with pytest.raises(RlError, match="paper_compat fixes"):
        get_task("lis", values=(1, 9), paper_compat=True)


BY_HAND = {  # arguments of `instance`: rows, and what goes with them
    "activity": ([(0, 5), (5, 9)],),
    "activity_weighted": ([(0, 5, 1), (5, 9, 2)],),
    "countdown": ([3, 4], 12),
    "knapsack": ([(2, 3), (4, 5)], 5),
    "lis": ([3, 1, 2],),
}


def test_instances_by_hand_are_whole_numbers_and_one_row_at_least(task):
    rows, *rest = BY_HAND[task.name]
    item = task.instance(rows, *rest)
    assert task.instance(np.array(rows), *rest) == item == task.instance_from_json(task.to_json(item))
    assert task.to_json(task.instance(np.array(rows), *rest)) == task.to_json(item)
    for wrong in ([], np.array(rows) + 0.5, ["a", "b"], [None]):
        with pytest.raises(RlError, match="one row or more"):
            task.instance(wrong, *rest)


@pytest.mark.parametrize("name", [None, 5, ["lis"], Lis])
def test_a_name_that_is_no_text_is_no_task(name):
    with pytest.raises(RlError, match="unknown task"):
        get_task(name)
