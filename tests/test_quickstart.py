"""The shortened quickstart, end to end on the real model: killed in the middle, continued, and run a third time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHORT = [
    "stages.select.k=96",
    "stages.sft.trainer.max_steps=12",
    "stages.rl.trainer.max_steps=2",
    "stages.rl.trainer.per_device_train_batch_size=16",
    "stages.rl.instances=50",
    "stages.verify.instances=32",
]


def start(out: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "krontune", "run", "quickstart", *SHORT, *overrides, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=out.parent)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=1200)
    return said


@pytest.fixture(scope="module")
def killed_and_continued(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    first = start(out)
    while not (out / "sft-random").is_dir():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    sft_finished = (out / "sft" / "done").stat().st_mtime_ns
    second = start(out)
    said = finish(second)
    assert second.returncode == 0, said
    return out, said, sft_finished


def test_continues_at_the_stage_that_was_killed(killed_and_continued):
    out, said, sft_finished = killed_and_continued
    assert "select: done before, skipped" in said and "sft: done before, skipped" in said
    assert (out / "sft" / "done").stat().st_mtime_ns == sft_finished
    for stage in ("select", "sft", "sft-random", "rl", "verify"):
        assert (out / stage / "done").is_file(), stage
    assert "sft-random: step" in said and "s/step" in said and "left" in said


def test_selection_finds_the_target_kind_and_the_control_does_not(killed_and_continued):
    out, _, _ = killed_and_continued
    select = json.loads((out / "run.json").read_text())["stages"]["select"]
    assert select["sources"]["selected"].get("lis", 0) >= 90
    assert select["sources"]["control"].get("lis", 0) < 30
    assert select["kl_reduction"]["selected"] > select["kl_reduction"]["control"] + 0.2


def test_selected_data_teaches_the_answer_form(killed_and_continued):
    out, said, _ = killed_and_continued
    result = json.loads((out / "verify" / "verify.json").read_text())
    models = result["models"]
    assert list(models) == ["base", "sft", "sft-random", "rl"]
    assert models["sft"]["parse_failure"]["value"] < 0.5 < models["base"]["parse_failure"]["value"]
    for scores in [*models.values(), *result["heuristics"].values()]:
        for rate in (scores["answer"], scores["certificate"], scores["gap"], scores["parse_failure"]):
            assert rate["n"] == 32 and rate["low"] <= rate["value"] <= rate["high"]
    assert [(one["from"], one["to"]) for one in result["changes"]][1:] == [("sft", "rl"), ("sft-random", "sft")]
    assert "certificate, after rl less after sft: " in said
    assert "after sft on the random control" in said and "heuristic: patience tails" in said
    losses = [line["loss"] for line in metrics(out, "sft") if "loss" in line]
    assert losses[-1] < losses[0] / 2


def test_the_record_says_what_was_run_on_what(killed_and_continued):
    out, _, _ = killed_and_continued
    record = json.loads((out / "run.json").read_text())
    assert record["name"] == "quickstart" and record["seed"] == 0
    assert set(record["versions"]) >= {"python", "krontune", "torch", "peft", "trl"}
    assert all(len(record["data"][name]["sha256"]) == 64 for name in ("raw", "target", "selected"))
    assert record["stages"]["rl"]["steps"] == 2 and record["stages"]["sft"]["seconds"] > 0
    assert "git" in record
    steps = [line["step"] for line in metrics(out, "sft-random") if "loss" in line]
    assert steps == sorted(set(steps)), "the killed attempt must leave no metrics"
    assert {line["step"] for line in metrics(out, "rl") if "reward" in line} == {1, 2}


def test_a_third_run_skips_everything(killed_and_continued):
    out, _, _ = killed_and_continued
    third = start(out)
    said = finish(third)
    assert third.returncode == 0 and said.count("done before, skipped") == 5, said


def test_another_recipe_is_refused_and_nothing_is_overwritten(killed_and_continued):
    out, _, _ = killed_and_continued
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != ".lock"}
    other = start(out, "name=another")
    said = finish(other)
    assert other.returncode == 2 and "another recipe" in said and "Traceback" not in said, said
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_peft_loads_the_adapter_in_a_fresh_process(killed_and_continued):
    out, _, _ = killed_and_continued
    code = (
        "import sys, torch, krontune.adapters\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "b = [p for n, p in model.named_parameters() if 'moka_B' in n]\n"
        "assert b and all(torch.isfinite(p).all() for p in b) and any(p.abs().max() > 0 for p in b)\n"
        "g = [p for n, p in model.named_parameters() if 'moka_gate' in n]\n"
        "assert g and all(p.dtype == torch.float32 for p in g) and any(p.abs().max() > 0 for p in g)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out / "adapter")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def metrics(out: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]
