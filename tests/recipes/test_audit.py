"""`audit` on the rewards and rows that people have."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from krontune.recipes.audit import audit, print_audit
from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.rewards import make_reward
from krontune.rl import Guarded, checks
from krontune.rl.checks.result import not_run

REWARDS = """
from krontune.rl import Guarded

def good(completions, answer, **columns):
    return [float(text == gold) for text, gold in zip(completions, answer)]

def raises(completions, **columns):
    raise KeyError("oops")

guarded = Guarded(good, item_timeout_s=1.5)
"""
WORDS = ["cat", "猫", "owl", "Käfer"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("paid.py").write_text(REWARDS)
    importlib.invalidate_caches()

    def make(stage, rows=()):
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = (
            "name: own\nallow: ['paid:good', 'paid:raises', 'paid:guarded', 'sys:good']\nbase: {model: smollm2-135m}\n"
        )
        Path("own.yaml").write_text(f"{text}stages:\n  - stage: rl\n    adapter: {{r: 2}}\n    {stage}\n")
        return load("own.yaml")

    yield make
    sys.modules.pop("paid", None)


def rows(answers):
    return [{"prompt": f"Say {n}", "answer": answer} for n, answer in enumerate(answers)]


def verdicts(found):
    return {one.name: one.verdict for one in found}


def test_a_reward_that_fails_is_told_with_its_last_message(recipe, capsys):
    own = "data: rows.jsonl\n    reward: 'paid:raises'"
    found = audit(recipe(own, rows(WORDS)))
    assert verdicts(found)["verifier"] == "fail"
    print_audit(found)
    assert "exception" in (said := capsys.readouterr().out) and "the last: KeyError: 'oops'" in said
    with pytest.raises(RecipeError, match=r"own.yaml:5:5: KeyError: 'oops'"):
        audit(recipe(f"{own}\n    guard: null", rows(WORDS)))


def test_a_reward_that_its_author_has_guarded_keeps_its_guard(recipe):
    own = "data: rows.jsonl\n    reward: 'paid:guarded'"
    loaded = recipe(own, rows(WORDS))
    reward = make_reward(loaded.stage("rl"), None, 0)
    assert isinstance(reward, Guarded) and reward.item_timeout_s == 1.5 and reward.reward.__name__ == "good"
    assert verdicts(audit(loaded))["verifier"] == "pass"
    with pytest.raises(RecipeError, match="guarded already"):
        audit(recipe(f"{own}\n    guard: {{workers: 1}}", rows(WORDS)))


def test_rows_without_an_answer_are_left_out_and_no_rows_are_a_fault(recipe):
    own = "data: rows.jsonl\n    reward: 'paid:good'"
    found = audit(recipe(own, rows([*WORDS, None])))
    assert verdicts(found)["verifier"] == "pass" and found[0].n == len(WORDS)
    with pytest.raises(RecipeError, match="no rows"):
        audit(recipe(own))


def test_a_curriculum_is_audited_by_what_it_pays_in_the_end(recipe, monkeypatch):
    for slow in ("soundness", "shortcut_ceiling"):
        monkeypatch.setattr(checks, slow, lambda task, n, name=slow: not_run(name, "not asked"))
    found = audit(recipe("task: {name: activity, n: [5, 6]}\n    reward: curriculum"))
    assert verdicts(found)["verifier"] == "fail"  # the answer alone is paid
    assert found[1].details["reward"] == "answer, which the curriculum pays in the end"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("task: {name: lis, n: [9, 5]}", "a pair .low, high. of them"),
        ("task: {name: countdown, n: [7, 9]}", "6 rows at most"),
        ("task: {name: lis, n: [4, 5]}\n    reward: mixture\n    reward_options: {weights: {answer: .nan}}", "numbers"),
        ("task: {name: lis, n: [4, 5]}\n    reward_options: {weights: {answer: 1}}", "option of another reward"),
        ("data: rows.jsonl\n    reward: 'sys:good'", "'sys' .built in. has no 'good'"),
    ],
)
def test_what_cannot_be_audited_is_a_fault_with_its_place(recipe, stage, message):
    with pytest.raises(RecipeError, match=f"own.yaml:5:5: .*{message}"):
        audit(recipe(stage, rows(WORDS)))
