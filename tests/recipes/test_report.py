"""What a run says: the progress line, the metrics it keeps, and the tables at its end."""

import json

import pytest

from krontune.recipes import progress
from krontune.recipes.chain import Run
from krontune.recipes.figures import ASKS
from krontune.recipes.loader import load
from krontune.recipes.progress import Progress, Report
from krontune.recipes.report import print_report
from krontune.recipes.rl import _reward_after, _reward_change
from krontune.recipes.run_folder import RunFolder
from krontune.recipes.run_report import DURING
from krontune.recipes.verify import _changes
from krontune.rl import CertificateReward, checks
from krontune.rl.tasks import get_task

# ---------------------------------------------------------------- the tables


def rate(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 40}


def scores(certificate):
    return {
        "n": 40,
        "answer": rate(0.5, 0.35, 0.65),
        "certificate": rate(certificate, certificate - 0.05, certificate + 0.05),
        "gap": rate(0.5 - certificate, -0.11, 0.12),
        "parse_failure": rate(0.025, 0.004, 0.129),
    }


SELECT = {
    "seconds": 6.0,
    "n": 30,
    "pool": 3000,
    "kl_reduction": {"selected": 1.234, "control": -0.056},
    "sources": {
        "pool": {"lis": 700, "my[1]:fire:": 2000, "[/b]": 300},
        "selected": {"lis": 25, "[/b]": 5},
        "control": {"lis": 7, "my[1]:fire:": 23},
    },
}
RL = {"seconds": 114.0, "reward": {"first": {"steps": 4, "mean": 0.254}, "last": {"steps": 3, "mean": 0.5}}}


@pytest.fixture
def printed(tmp_path, capsys):
    """A function from the record of a run's stages to what is printed for it."""

    def run(stages: dict, verify: dict | None = None, adapter: bool = False) -> str:
        path = tmp_path / "[red]run"
        (path / "verify").mkdir(parents=True)
        (path / "verify" / "verify.json").write_text(json.dumps(verify))
        if adapter:
            (path / "adapter").mkdir()
        print_report(Run(path, {"stages": stages}))
        return capsys.readouterr().out

    return run


def row(text: str, name: str) -> list[str]:
    """The cells of the row that begins with `name`."""
    [line] = [line for line in text.splitlines() if line.strip("│┃ ").startswith(name)]
    return [cell.strip() for cell in line.strip("│┃").split("│")]


def test_the_selection_is_shown_by_source_beside_the_control(printed):
    text = printed({"select": SELECT})
    assert "select: 30 of 3000 rows" in text
    assert row(text, "lis") == ["lis", "700", "25", "7"]
    assert row(text, "my") == ["my[1]:fire:", "2000", "0", "23"]
    assert row(text, "[/b]") == ["[/b]", "300", "5", "0"]
    assert row(text, "KL") == ["KL to the target, reduced by (nats)", "", "1.23", "-0.06"]
    assert text.index("lis") < text.index("[/b]") < text.index("my[1]:fire:"), "most selected first"


def test_every_model_and_heuristic_is_a_whole_line_with_its_intervals(printed):
    models = {"base": scores(0.0), "sft": scores(0.3), "sft-random": scores(0.1), "rl": scores(0.45)}
    heuristics = {"greedy_first": scores(0.2), "patience_tails": scores(0.05)}
    verify = {
        "task": {"name": "lis", "n": [3, 5]},
        "instances": 40,
        "weights": "as loaded",
        "models": models,
        "changes": [
            {
                "from": "sft",
                "to": "rl",
                "value": 0.15,
                "low": 0.05,
                "high": 0.25,
                "n": 40,
                "solution": rate(0.051, 0.035, 0.067),
            },
            {"from": "sft-random", "to": "sft", "value": 0.2, "low": -0.1, "high": 0.5, "n": 40},
        ],
        "heuristics": heuristics,
    }
    text = printed({"verify": {"seconds": 1.0}}, verify)
    assert "verify: 40 held-out lis instances, n 3 to 5; 95 % intervals" in text
    labels = ["base model", "after sft", "after sft on the random control", "after rl"]
    for label, value in zip(labels, ["0.00", "0.30", "0.10", "0.45"], strict=True):
        cells = row(text, f"{label}  " if label == "after sft" else label)
        assert cells[0] == label and cells[1] == "0.50 [0.35, 0.65]" and cells[2].startswith(f"{value} [")
        assert cells[3].endswith("[-0.11, 0.12]") and cells[4] == "0.03 [0.00, 0.13]"
    assert row(text, "heuristic: greedy first")[2] == "0.20 [0.15, 0.25]"
    assert row(text, "heuristic: patience tails")[2] == "0.05 [0.00, 0.10]"
    assert (
        "certificate, after rl less after sft: +0.15 [+0.05, +0.25], paired over 40 instances; solution +0.051 "
        "[+0.035, +0.067]\n"
    ) in text
    assert (
        "certificate, after sft less after sft on the random control: +0.20 [-0.10, +0.50], paired over 40 instances\n"
        in text
    )


def test_changes_pair_each_stage_with_the_one_before_and_with_its_control():
    right = {"base": [0, 0, 0, 0], "sft": [1, 1, 0, 0], "sft-random": [1, 0, 0, 0], "rl": [1, 1, 1, 0]}
    sure = {"base": [0.0] * 4, "sft": [0.5, 0.5, 0.0, 0.0], "sft-random": [0.1] * 4, "rl": [0.5, 0.5, 0.25, 0.25]}
    changes = _changes(right, sure)
    assert [round(one["solution"]["value"], 6) for one in changes] == [0.25, 0.125, 0.15]
    assert changes[1]["solution"]["low"] >= 0 and changes[1]["solution"]["high"] <= 0.25
    assert [(one["from"], one["to"]) for one in changes] == [("base", "sft"), ("sft", "rl"), ("sft-random", "sft")]
    assert [change["value"] for change in changes] == [0.5, 0.25, 0.25]
    assert all(change["low"] <= change["value"] <= change["high"] and change["n"] == 4 for change in changes)
    assert _changes({"base": [1]}, {"base": [1.0]}) == []


def test_the_end_says_where_the_run_is_and_how_long_it_took(printed):
    text = printed({"select": SELECT, "rl": RL}, adapter=True)
    assert "rl: mean reward 0.25 over the first 4 steps, 0.50 over the last 3" in text
    assert "/[red]run\n" in text and "/[red]run/adapter\n" in text and "2.0 min in 2 stages" in text


def test_what_did_not_happen_is_not_shown(printed):
    text = printed({"rl": {"seconds": 6.0, "reward": None}})
    assert "reward" not in text and "select" not in text and "verify" not in text and "adapter" not in text


# ---------------------------------------------------------------- the metrics


@pytest.fixture
def folder(small, tmp_path):
    with RunFolder(tmp_path / "run", load(small)) as folder:
        yield folder


def naive_reward_change(every: int, rewards: list[float]) -> dict:
    """The same from one reward a step, where a line is logged every so many steps."""
    lines = [rewards[start : start + every] for start in range(0, len(rewards), every)]
    parts = {"first": lines[: max(1, len(lines) // 4)], "last": lines[-max(1, len(lines) // 4) :]}
    return {
        name: {"steps": sum(map(len, part)), "mean": sum(sum(line) / len(line) for line in part) / len(part)}
        for name, part in parts.items()
    }


@pytest.mark.parametrize(("every", "steps"), [(1, 1), (1, 2), (1, 15), (2, 8), (5, 35), (3, 12), (10, 10)])
def test_the_change_of_the_reward_counts_steps_not_lines_of_the_log(folder, every, steps):
    rewards = [(step * 7 % 5) / 10 for step in range(steps)]
    for end in range(every, steps + 1, every):
        folder.log("rl", end, {"reward": sum(rewards[end - every : end]) / every, "loss": 0.1})
    folder.log("rl", steps, {"train_runtime": 3.0})
    change, expected = _reward_change(folder), naive_reward_change(every, rewards)
    assert change == {name: pytest.approx(part) for name, part in expected.items()}


def test_a_run_that_logged_no_reward_has_no_change_of_it(folder):
    folder.log("rl", 1, {"loss": 1.0})
    assert _reward_change(folder) is None


def test_what_the_log_says_of_the_samples_is_checked_beside_the_adapter(folder):
    task, alarms = get_task("lis"), checks.Alarms()
    instances = task.instances(6, (10, 14), discriminating=True)
    reward = checks.Monitored(CertificateReward(task, "answer"), task)
    for step in range(9):
        logged = {}
        ids = [task.heuristics["beam2"](one) if step > 2 else task.solve(one).certificate for one in instances]
        paid = reward(
            completions=[task.write(one, own) for one, own in zip(instances, ids, strict=True)],
            instance=[task.to_json(one) for one in instances],
            log_metric=lambda name, value, logged=logged: logged.setdefault(name, []).append(value),
        )
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        alarms.on_log(None, State(step), None, {"reward": sum(paid) / 6, "entropy": 1.0, **means})
    (folder.path / "rl").mkdir()
    _reward_after(folder, "rl", alarms, folder.path / "rl", task, None)
    found = {one["name"]: one for one in json.loads((folder.path / "rl" / "rlvr_report.json").read_text())["checks"]}
    assert set(found) == {*DURING} - {"verifier_health"} and set(DURING) <= set(ASKS)
    assert (found["followed"]["verdict"], found["followed"]["value"]) == ("fail", 1.0)
    assert found["gap_rise"]["value"] == 0.0 and found["gap_rise"]["n"] == 9


class State:
    def __init__(self, step, steps=4):
        self.global_step, self.max_steps, self.is_world_process_zero = step, steps, True


def test_a_trainers_logs_become_metrics_and_the_note_of_the_line(folder, capsys):
    report = Report("sft", folder, shown=("loss", "absent"))
    report.on_train_begin(None, State(0), None)
    report.on_log(None, State(2), None, logs={"loss": "1.25", "learning_rate": 1e-4, "name": "x"})
    report.on_step_end(None, State(4), None)
    report.on_train_end(None, State(4), None)
    assert folder.metrics("sft") == [{"stage": "sft", "step": 2, "loss": 1.25, "learning_rate": 1e-4, "name": "x"}]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("sft: step 4/4, ") and last.endswith("0:00 left  loss 1.25")


# ---------------------------------------------------------------- the line


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_the_line_says_stage_step_speed_and_time_left(clock, capsys):
    line = Progress("rl", 100)
    clock.now += 20
    line.update(10)
    clock.now += 180
    line.update(50)
    clock.now += 3400
    line.update(51, "reward 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "rl: step 10/100, 2.0 s/step, 3:00 left",
        "rl: step 50/100, 4.0 s/step, 3:20 left",
        "rl: step 51/100, 70.6 s/step, 57:39 left  reward 0.5",
    ]


def test_fast_work_is_counted_per_second_and_long_work_in_hours(clock, capsys):
    answers = Progress("verify base", 200, "answer")
    clock.now += 20
    answers.update(100)
    Progress("sft", 10).update(0)
    slow = Progress("sft", 10)
    clock.now += 3600
    slow.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "verify base: answer 100/200, 5.0 answers/s, 0:20 left",
        "sft: step 1/10, 3600.0 s/step, 9:00:00 left",
    ]


def test_a_log_file_gets_a_line_now_and_then_and_the_last(clock, capsys):
    line = Progress("sft", 100)
    for step in range(1, 101):
        clock.now += 1
        line.update(step)
    line.close()
    steps = [int(text.split("/")[0].split()[-1]) for text in capsys.readouterr().err.splitlines()]
    assert steps == [15, 30, 45, 60, 75, 90, 100]


def test_a_terminal_keeps_one_line_and_rewrites_it(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    line = Progress("sft", 3)
    clock.now += 2
    line.update(1, "a long note")
    line.update(2)
    line.close()
    text = capsys.readouterr().err
    first, second = text.removesuffix("\n").split("\r")[1:]
    assert text.count("\n") == 1 and first.endswith("a long note") and len(second) == len(first)
    assert second.rstrip() == "sft: step 2/3, 1.0 s/step, 0:01 left"
