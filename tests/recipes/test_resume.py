"""A training stage that is cut goes on from its last checkpoint and ends with the same bits."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trl.trainer import utils as trl_utils

from krontune.recipes import chain
from krontune.recipes.checkpoints import MARK, last_checkpoint, remove_checkpoints, saving
from krontune.recipes.loader import load
from krontune.recipes.progress import Report

from .conftest import write_model

torch.set_num_threads(1)

RECIPE = """\
name: tiny
base: {model: ./model, quantization: null}
stages:
  - stage: sft
    data: {puzzles: [lis], size: 8}
    adapter: {r: 2, n_shapes: 2, target_modules: [q_proj, v_proj], dropout: 0.1}
    trainer: {max_steps: 9, per_device_train_batch_size: 2, logging_steps: 3, save_steps: 2, learning_rate: 1e-2}
  - stage: rl
    task: {name: lis, n: [3, 4]}
    instances: 4
    reward: random
    credit: {horizon: [2, 8], credit_truncated: true, head_refresh: 2}
    trainer:
      max_steps: 9
      per_device_train_batch_size: 4
      num_generations: 4
      num_iterations: 2
      max_completion_length: 12
      logging_steps: 2
      save_steps: 1
      learning_rate: 1e-2
"""
TIMES = ("runtime", "per_second", "step_time")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A recipe that trains a tiny model twice, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path / "tiny.yaml"


def numbers(run: Path) -> list:
    """All metrics but times, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]


def weights(run: Path) -> list:
    return [(run / stage / "adapter" / "adapter_model.safetensors").read_bytes() for stage in ("sft", "rl")]


def cut_after(monkeypatch, cuts: list) -> None:
    """Stop the run, as Ctrl-C does, after the first of these (stage, step), then after the second, and so on."""
    plain = Report.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        plain(self, args, state, control, **kwargs)
        if cuts and cuts[0] == (self.stage, state.global_step):
            cuts.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "on_step_end", on_step_end)


def test_a_run_that_is_cut_again_and_again_ends_with_the_metrics_and_adapters_of_one_that_is_not(
    tiny, monkeypatch, capsys
):
    recipe = load(tiny)
    chain.run(recipe, "whole")
    capsys.readouterr()
    cuts = [("sft", 2), ("sft", 8), ("rl", 2), ("rl", 7)]
    cut_after(monkeypatch, cuts)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            chain.run(recipe, "cut")
        for half in Path("cut/sft/trainer").glob("checkpoint-6/optimizer.pt"):
            half.write_bytes(half.read_bytes()[:-9])
    chain.run(recipe, "cut")
    went_on = [line for line in capsys.readouterr().err.splitlines() if "goes on" in line]
    # Step 2 of sft was cut before it was saved; checkpoint 6 is only a half, so 4 is taken.
    steps = [("sft", 4), ("rl", 1), ("rl", 6)]
    assert went_on == [f"{stage}: goes on after step {step}" for stage, step in steps]
    assert weights(Path("cut")) == weights(Path("whole"))
    assert numbers(Path("cut")) == numbers(Path("whole"))
    for stage, steps in {"sft": [6, 8], "rl": [7, 8]}.items():  # the recipe asks for checkpoints: the last two are left
        left = Path("cut", stage, "trainer").glob(f"checkpoint-*/{MARK}")
        assert sorted(int(path.parent.name.split("-")[1]) for path in left) == steps


def checkpoint(stage: Path, step: int, key: str) -> Path:
    """As a trainer leaves it, with a mark but for the key of "none"."""
    folder = stage / "trainer" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    mark = {"key": key, "step": step, "seconds": 1.0, "state": {}, "files": {"optimizer.pt": digest}}
    (folder / MARK).write_text(json.dumps(mark))
    return folder


def test_only_a_whole_checkpoint_of_the_same_stage_is_taken_and_others_are_removed(tmp_path):
    assert last_checkpoint(tmp_path, "a") is None
    for step in (8, 9, 10):
        checkpoint(tmp_path, step, "a")
    (checkpoint(tmp_path, 11, "a") / "optimizer.pt").write_bytes(b"ab")
    (checkpoint(tmp_path, 12, "a") / "optimizer.pt").unlink()
    (checkpoint(tmp_path, 13, "a") / MARK).unlink()
    (checkpoint(tmp_path, 14, "a") / MARK).write_text('{"key": "a", "st')
    checkpoint(tmp_path, 15, "b")
    found = last_checkpoint(tmp_path, "a")
    assert found.step == 10 and found.path.name == "checkpoint-10"
    assert {path.name for path in (tmp_path / "trainer").iterdir()} == {"checkpoint-8", "checkpoint-9", "checkpoint-10"}
    assert last_checkpoint(tmp_path, "b") is None and not list((tmp_path / "trainer").iterdir())


def test_checkpoints_that_nobody_asked_for_are_removed_with_their_folder(tmp_path):
    checkpoint(tmp_path, 8, "a")
    (tmp_path / "trainer" / "README.md").write_text("TRL's")
    remove_checkpoints(tmp_path)
    assert not (tmp_path / "trainer").exists()
    remove_checkpoints(tmp_path)


def test_the_recipe_says_how_often_to_save_and_one_whole_checkpoint_always_stays():
    assert saving({}) == {"save_strategy": "steps", "save_steps": 0.05, "save_total_limit": 2}
    given = {"save_strategy": "epoch", "save_steps": 7, "save_total_limit": 1, "max_steps": 3}
    assert saving(given) == {"save_strategy": "epoch", "save_steps": 7, "save_total_limit": 2}
    assert saving({"save_total_limit": None})["save_total_limit"] is None


# ---------------------------------------------------------------- killed


@pytest.mark.slow
def test_ten_kills_at_random_points_lose_nothing(tiny):
    command = [sys.executable, "-m", "recipes.test_resume", "10"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [Path(line) for line in done.stdout.split()]
    for run in runs:
        assert weights(run) == weights(Path("whole"))
        assert numbers(run) == numbers(Path("whole"))
    assert runs and done.stderr.count("goes on after step") > 2


def killed_runs(kills: int) -> None:
    """Runs the recipe of the working folder, killed so many times; prints the folders that came to their end.

    Each attempt is a process of its own, split from this one, which has imported what takes long and computed nothing.
    """
    rng = random.Random(0)

    def attempt(folder: str, seconds: float | None) -> bool:
        """Whether it came to its end."""
        child = os.fork()
        if not child:
            chain.run(load("tiny.yaml"), folder, say=lambda line: None)
            os._exit(0)
        ends = None if seconds is None else time.monotonic() + seconds
        while ends is None or time.monotonic() < ends:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                assert status == 0, status
                return True
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    begun = time.monotonic()
    attempt("whole", None)
    whole, number = time.monotonic() - begun, 0
    while kills:
        folder = f"killed-{number}"
        if attempt(folder, rng.uniform(0.05, 0.7) * whole):
            print(folder)
            number += 1
        else:
            kills -= 1
    if Path(f"killed-{number}").exists():
        attempt(f"killed-{number}", None)
        print(f"killed-{number}")


def test_the_head_of_sft_sees_only_what_is_learned_from(tiny, monkeypatch):
    tiny.write_text(RECIPE[: RECIPE.index("  - stage: rl")])
    targets = []
    plain = trl_utils._ChunkedLogProbFunction

    class Seen:
        @staticmethod
        def apply(hidden, weight, bias, labels, *others):
            targets.append(labels)
            return plain.apply(hidden, weight, bias, labels, *others)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Seen)
    chain.run(load(tiny, ["stages.sft.trainer.max_steps=1"]), "run")
    assert len(targets) == 1
    assert not any((labels == 0).any() for labels in targets)  # padding, which TRL gives positions without a label


if __name__ == "__main__":
    killed_runs(int(sys.argv[1]))
