"""Policies of known nature through the real reward and the real checks: who is told apart by what."""

from pathlib import Path

import pytest

from krontune.rl import CertificateReward, checks, get_task
from krontune.rl.checks.policies import mixture_policy
from krontune.rl.guard import Guarded

TASK = get_task("lis")
INSTANCES = TASK.instances(128, (8, 16), split="test")
MIXED = "mixed (30 % perfect, 70 % beam2)"
POLICIES = {**checks.scripted_policies(TASK), MIXED: mixture_policy(TASK, {"perfect": 0.3, "beam2": 0.7})}
PAGE = Path(__file__).parents[2] / "docs" / "checks.md"

# policy: reward on the answer, triplet, attribution, heuristic_agreement, symmetry, size_ladder. "." is any verdict.
CONFUSION = {
    "perfect": ("high", "pass", "pass", "pass", "pass", "pass"),
    "noisy": ("high", "pass", "pass", "pass", "not fail", "pass"),
    MIXED: (".", "pass", "fail", "fail", ".", "not fail"),
    "patience_tails": ("high", "fail", "fail", "fail", "fail", "fail"),
    "greedy_first": ("low", ".", "fail", "fail", "fail", "fail"),
    "greedy_min": ("low", ".", "fail", "fail", "fail", "fail"),
    "greedy_best_start": (".", ".", "fail", "fail", "fail", "fail"),
    "longest_run": ("low", ".", "fail", "fail", "fail", "fail"),
    "smallest_next": (".", ".", "fail", "fail", "fail", "fail"),
    "beam2": (".", ".", "fail", "fail", "fail", "fail"),
    "beam3": (".", ".", "fail", "fail", "fail", "fail"),
    "random": ("low", ".", "fail", "not pass", "not pass", "fail"),
    "constant": ("low", ".", "fail", ".", "fail", "fail"),
    "formatter": ("low", ".", "fail", ".", "fail", "fail"),
    "length_keyed": ("low", ".", "fail", ".", "fail", "fail"),
}


@pytest.fixture(scope="module")
def reward():
    guarded = Guarded(CertificateReward(TASK, "answer"))
    yield guarded
    guarded.close()


def _fits(verdict: str, wanted: str) -> bool:
    return wanted == "." or verdict == wanted or (wanted.startswith("not ") and verdict != wanted[4:])


def test_every_policy_has_its_row():
    assert set(CONFUSION) == set(POLICIES)


def test_the_page_shows_these_policies_with_these_verdicts():
    text = PAGE.read_text(encoding="utf-8")
    section = text.partition("## Which check sees what")[2].partition("\n## ")[0]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    assert rows[0][3:8] == ["triplet", "attribution", "agreement", "symmetry", "ladder"]
    shown = {row[0] if row[0] in CONFUSION else row[0].partition(" (")[0]: row for row in rows[2:]}
    assert set(shown) == set(CONFUSION)
    for name, (earned, *wanted) in CONFUSION.items():
        answer = float(shown[name][1])
        assert earned == "." or (answer > 0.6 if earned == "high" else answer < 0.4), name
        for verdict, want in zip(shown[name][3:8], wanted, strict=True):
            assert _fits(verdict, want), (name, verdict, want)


@pytest.mark.parametrize("name", list(CONFUSION))
def test_the_verdicts_on_a_known_policy_are_those_of_the_table(name, reward):
    policy = POLICIES[name]
    texts = policy(INSTANCES)
    paid = reward(completions=texts, instance=[TASK.to_json(one) for one in INSTANCES])
    earned, *wanted = CONFUSION[name]
    mean = sum(paid) / len(paid)
    assert earned == "." or (mean > 0.6 if earned == "high" else mean < 0.4)
    found = [
        checks.triplet(TASK, INSTANCES, texts),
        checks.attribution(TASK, INSTANCES, texts),
        checks.heuristic_agreement(TASK, INSTANCES, texts),
        checks.symmetry(TASK, INSTANCES, policy),
        checks.size_ladder(TASK, policy, sizes=(8, 16, 32), per_size=48),
    ]
    for result, verdict in zip(found, wanted, strict=True):
        assert _fits(result.verdict, verdict), (result.name, result.verdict, result.value, result.ci)


def test_no_single_check_is_enough():
    """The tails have the right answers, and the probe of errors sees nothing wrong with them."""
    pytest.importorskip("sklearn")
    tails = checks.feature_probe(TASK, INSTANCES, POLICIES["patience_tails"](INSTANCES))
    assert tails.verdict == "pass" and tails.details["error_rate"] == 0.0


@pytest.mark.parametrize("name", ["activity_weighted", "knapsack", "countdown"])
def test_other_tasks_tell_the_solver_from_each_of_their_heuristics(name):
    task = get_task(name)
    instances = task.instances(64, (4, 6) if name == "countdown" else (10, 14), split="test")
    policies = checks.scripted_policies(task)
    assert checks.attribution(task, instances, policies["perfect"](instances)).verdict == "pass"
    assert checks.symmetry(task, instances, policies["perfect"]).value == 1.0
    for heuristic in task.heuristics:
        result = checks.attribution(task, instances, policies[heuristic](instances))
        assert result.verdict == "fail" and result.details["weights"][heuristic] > 0.9, heuristic
