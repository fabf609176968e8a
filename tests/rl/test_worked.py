import re
from itertools import combinations

import pytest

from krontune.rl import RlError, get_task
from krontune.rl.tasks import TASKS
from krontune.rl.tasks.worked import KINDS, worked_examples


def rows_of(prompt):
    """The table of a prompt, read back: {id: columns}."""
    rows = re.findall(r"^(\d+(?: \| \d+)+)$", prompt, flags=re.MULTILINE)
    cells = [[int(cell) for cell in row.split(" | ")] for row in rows]
    return {first: rest for first, *rest in cells}


def block(text, name):
    found = re.findall(rf"\\{name}{{([\d,]*)}}", text)
    assert len(found) == 1, text
    return [int(part) for part in found[0].split(",")]


def naive_most_activities(rows):
    for size in range(len(rows), 0, -1):
        for chosen in combinations(rows.values(), size):
            times = sorted(chosen)
            if all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False)):
                return size
    raise AssertionError("no activity")


def test_sorted_rows_are_sorted():
    for example in worked_examples("sorting", 150, 1, n=[2, 9]):
        rows = rows_of(example["prompt"])
        ids = block(example["completion"], "ids")
        values = [rows[i][0] for i in ids]
        assert sorted(ids) == sorted(rows)
        assert all(a < b for a, b in zip(values, values[1:], strict=False))
        assert example["completion"].startswith("values " + " < ".join(map(str, values)) + "\n")


def test_sums_are_right_at_every_step():
    for example in worked_examples("arithmetic", 150, 1, n=[2, 9]):
        values = [row[0] for row in rows_of(example["prompt"]).values()]
        *steps, last = example["completion"].split("\n")
        assert block(last, "answer") == [sum(values)]
        for i, step in enumerate(steps, start=1):
            assert step == f"{sum(values[:i])} + {values[i]} = {sum(values[: i + 1])}"
        assert len(steps) == len(values) - 1


def test_schedules_are_feasible_and_as_large_as_any():
    sizes = set()
    for example in worked_examples("scheduling", 150, 1, n=[2, 9]):
        rows = rows_of(example["prompt"])
        assert "id | start | end" in example["prompt"]
        ids = block(example["completion"], "ids")
        times = [rows[i] for i in ids]
        assert all(a[1] <= b[0] for a, b in zip(times, times[1:], strict=False))
        assert [len(ids)] == block(example["completion"], "answer")
        assert len(set(ids)) == len(ids) == naive_most_activities(rows)
        written = ", ".join(f"{start}-{end}" for start, end in times)
        assert example["completion"].startswith(f"times {written}\n")
        sizes.add(len(ids))
    assert len(sizes) > 2


def test_lis_puzzles_are_those_of_the_task():
    task = get_task("lis")
    examples = worked_examples("lis", 40, 5, n=[3, 6], split="validation")
    instances = task.instances(40, [3, 6], 5, "validation")
    assert [example["prompt"] for example in examples] == [task.prompt(item) for item in instances]
    for example, instance in zip(examples, instances, strict=True):
        assert task.mark(instance, example["completion"]).certificate_right


@pytest.mark.parametrize("kind", ["sorting", "arithmetic", "scheduling", "lis"])
def test_puzzles_repeat_by_seed_and_never_cross_splits(kind):
    train = worked_examples(kind, 120, 3)
    assert train == worked_examples(kind, 120, 3)
    assert train[:30] == worked_examples(kind, 30, 3)
    assert {tuple(example) for example in train} == {("prompt", "completion", "kind")}
    assert {example["kind"] for example in train} == {kind}
    prompts = {example["prompt"] for example in train}
    assert len(prompts) == 120
    assert not prompts & {example["prompt"] for example in worked_examples(kind, 120, 4)}
    for seed in (3, 9):
        assert not prompts & {example["prompt"] for example in worked_examples(kind, 60, seed, split="test")}


def test_kinds_ask_different_questions():
    kinds = [kind for kind in (*KINDS, *TASKS) if kind != "activity"]  # which begins as "scheduling" does
    questions = {worked_examples(kind, 1)[0]["prompt"].split("\n")[0] for kind in kinds}
    assert len(questions) == len(kinds) == 7


def test_what_cannot_be_made_is_refused():
    with pytest.raises(RlError, match="kinds: sorting, arithmetic, scheduling, activity"):
        worked_examples("sudoku", 5)
    with pytest.raises(RlError, match="'sorting' has no options"):
        worked_examples("sorting", 5, options={"values": [1, 9]})
    with pytest.raises(RlError, match="did you mean 'weights'"):
        worked_examples("activity_weighted", 5, options={"weight": [1, 9]})
    with pytest.raises(RlError, match="99"):
        worked_examples("sorting", 5, n=100)
    with pytest.raises(RlError, match="n must be"):
        worked_examples("arithmetic", 5, n=1)
    with pytest.raises(RlError, match="split"):
        worked_examples("arithmetic", 5, split="dev")
