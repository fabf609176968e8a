"""A training stage that is cut goes on from its last checkpoint and ends with the same bits."""

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
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.recipes import chain
from krontune.recipes.checkpoints import MARK, last_checkpoint, saving
from krontune.recipes.loader import load
from krontune.recipes.progress import Report

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
def tiny(tmp_path, tokenizer, monkeypatch) -> Path:
    """A recipe that trains a random model of two layers twice, in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **size)).save_pretrained("model")
    tokenizer.save_pretrained("model")
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


def test_a_run_that_is_cut_six_times_has_the_metrics_and_adapters_of_one_that_is_not(tiny, monkeypatch, capsys):
    recipe = load(tiny)
    chain.run(recipe, "whole")
    capsys.readouterr()
    cuts = [("sft", 2), ("sft", 4), ("sft", 8), ("rl", 2), ("rl", 7), ("rl", 9)]
    cut_after(monkeypatch, cuts)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            chain.run(recipe, "cut")
    chain.run(recipe, "cut")
    went_on = [line for line in capsys.readouterr().err.splitlines() if "goes on" in line]
    # Step 2 of sft was cut before it was saved: nothing to go on from.
    assert went_on == [f"{stage}: goes on after step {step}" for stage, step in
                       [("sft", 2), ("sft", 6), ("rl", 1), ("rl", 6), ("rl", 8)]]
    assert weights(Path("cut")) == weights(Path("whole"))
    assert numbers(Path("cut")) == numbers(Path("whole"))
