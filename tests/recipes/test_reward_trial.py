"""The trial of a reward: what is called a fault, and what is not."""

import json
from pathlib import Path

import pytest

from krontune.data_selection import DataSelectionError
from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.prompts import read_prompts
from krontune.recipes.reward_trial import faults_of_reward, right_forms, wrong_texts
from krontune.recipes.rl import make_task, training_rows
from krontune.rl import CertificateReward
from krontune.rl.rewards import KINDS

from .conftest import write_rows

ROWS = [{"prompt": f"number {n}", "answer": str(n)} for n in range(3)]


@pytest.mark.parametrize("name", ["lis", "activity", "countdown", "knapsack"])
def test_the_right_rewards_of_a_task_are_no_faults_whatever_the_seed(small, name):
    stage = load(small, [f"stages.rl.task.name={name}", "stages.rl.instances=4"]).stage("rl")
    task = make_task(stage.task)
    judged = [kind for kind in KINDS if kind in ("certificate", "answer", "ids_exact", "ids_prefix", "shaped")]
    for seed in range(60):
        rows = [dict(row) for row in training_rows(stage, seed)]
        wrong, right = wrong_texts(rows, task), right_forms(stage, rows, task)
        for row, text in zip(rows, wrong, strict=True):
            mark = task.mark(task.instance_from_json(row["instance"]), text)
            assert not mark.answer_right and not mark.certificate_right
        for kind in judged:
            assert list(faults_of_reward(CertificateReward(task, kind), rows, right, wrong)) == [], (seed, kind)


def test_the_check_takes_an_answer_that_two_instances_share(small):
    settings = ["stages.rl.reward=answer", "stages.rl.instances=4"]
    for seed in range(30):
        recipe = load(small, [*settings, f"seed={seed}"])
        assert [str(fault) for fault in check(recipe) if "reward" in str(fault)] == [], seed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_finite_number_is_a_fault(value):
    def reward(completions, answer, **columns):
        return [1.0 if text == gold else value for text, gold in zip(completions, answer, strict=True)]

    [fault] = faults_of_reward(reward, ROWS, [[row["answer"] for row in ROWS]])
    assert f"gives {value} for a wrong completion" in fault


def test_rows_have_the_columns_of_all_and_a_missing_one_is_named_with_its_line(tmp_path):
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    write_rows(Path(first), [{"prompt": "p", "answer": "1"}])
    write_rows(Path(second), [{"prompt": "q", "answer": "2", "more": 3}, {"prompt": "q", "solution": "2"}])
    assert {tuple(row) for row in read_prompts([first, second])} == {("prompt", "answer", "more", "solution")}
    with pytest.raises(DataSelectionError, match=r"b\.jsonl.*2.*column 'answer'.*got the columns"):
        read_prompts([first, second], gold="answer")


def test_a_reward_that_reads_a_column_of_some_rows_alone_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_rows(Path("a.jsonl"), ROWS * 2)
    write_rows(Path("b.jsonl"), [{"prompt": row["prompt"], "solution": row["answer"]} for row in ROWS])
    Path("reads_answer.py").write_text(
        "def pay(completions, answer, **columns):\n"
        "    return [float(text == gold) for text, gold in zip(completions, answer)]\n"
    )
    stage = {"stage": "rl", "data": ["a.jsonl", "b.jsonl"], "reward": "reads_answer:pay", "adapter": {"r": 2}}
    recipe = {"name": "x", "base": {"model": "smollm2-135m"}, "allow": ["reads_answer:pay"], "stages": [stage]}
    Path("r.yaml").write_text(json.dumps(recipe))
    faults = [str(fault) for fault in check(load("r.yaml", ["stages.rl.guard=null"]))]
    assert any("pays a wrong completion 0 and a right one 0" in fault for fault in faults), faults
    assert check(load("r.yaml", ["stages.rl.guard=null", "stages.rl.data=[a.jsonl]"])) == []
