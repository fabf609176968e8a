"""A tiny run from raw rows to a pushed adapter that PEFT loads from the Hub, with keys planted wherever one can be."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from krontune.cli import app
from krontune.recipes import masking

TOKEN = "hf_" + "PlantedPlantedPlantedPlanted123456"
KEYS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "5eed" * 10, "JUDGE_PASSWORD": "correct horse battery"}
OPTIONS = {"api_key": "judge-1234-5678", "password": "swordfish", "url": "https://judge.example"}
SECRETS = [*KEYS.values(), OPTIONS["api_key"], OPTIONS["password"]]

REWARD = """
import os
from pathlib import Path

class Judge:
    def __init__(self, api_key, password, url):
        assert api_key == "judge-1234-5678" and password == "swordfish"
        self.said = f"{url} refuses {api_key}, {password}, " + os.environ["JUDGE_PASSWORD"]

    def __call__(self, completions, answer, **columns):
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        if Path("broken").exists() and "trainer_state" in columns:  # not when it is tried before the run
            raise RuntimeError(self.said)
        return [1.0 if text == f"{word.upper()}?" else min(len(text), 50) / 100 for text, word in zip(texts, answer)]
"""
RECIPE = f"""\
name: planted
description: written with {TOKEN}
allow: ["judge_of_test:Judge"]
base: {{model: ./tiny, quantization: null}}
stages:
  - {{stage: select, raw: pool.jsonl, target: target.jsonl, k: 4}}
  - {{stage: sft, adapter: {{r: 2, target_modules: [q_proj]}}, trainer: {{max_steps: 1}}}}
  - stage: rl
    data: words.jsonl
    reward: judge_of_test:Judge
    reward_options: {json.dumps(OPTIONS)}
    guard: null
    trainer: {{max_steps: 1, num_generations: 2, per_device_train_batch_size: 2, max_completion_length: 4}}
  - {{stage: verify, task: {{name: lis, n: [3, 4]}}, instances: 4, max_new_tokens: 4}}
hub: {{repo: me/planted, dataset: me/rows, base_model: me/tiny}}
"""


@pytest.fixture
def planted(tmp_path, monkeypatch, hub, tokenizer):
    import loopback_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(masking, "_learned", set())
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loopback_hub, "TOKEN", TOKEN)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    rows = [{"text": f"text number {n}"} for n in range(9)]
    words = [
        {"prompt": f"Shout {w}.", "answer": w, "completion": f"{w.upper()}?"} for w in ("cat", "dog", "cat", "dog")
    ]
    for name, content in {"pool": rows, "target": rows[:1], "words": words}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (tmp_path / "judge_of_test.py").write_text(REWARD)
    (tmp_path / "planted.yaml").write_text(RECIPE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("judge_of_test", None)


def written(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


LOAD = """
import torch, krontune.adapters
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "me/planted"
model = AutoPeftModelForCausalLM.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path)
again = PeftModel.from_pretrained(base, name)
ids = AutoTokenizer.from_pretrained(name)("one two", return_tensors="pt")
local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny"), "run/adapter")
with torch.no_grad():
    first, second, third = (one(**ids).logits for one in (model, again, local))
assert torch.equal(first, second) and torch.equal(first, third)
assert type(model.peft_config["default"]).__name__ == "MokaConfig"
print("loaded")
"""


@pytest.mark.slow
def test_a_run_with_planted_keys_is_pushed_without_them_and_loads_from_the_hub(planted, hub):
    from loopback_hub import Repo

    def run():
        return CliRunner().invoke(app, ["run", "planted.yaml", "--out", "run", "--traceback"])

    (planted / "broken").touch()
    failed = run()
    assert failed.exit_code == 1 and "https://judge.example refuses (not shown)" in failed.stderr, failed.output
    assert "RuntimeError" in failed.stderr and "Traceback" in failed.stderr
    (planted / "broken").unlink()
    hub.drop = "before"
    first = run()
    assert first.exit_code == 0, first.output
    assert "not pushed to me/rows" in first.stdout and "`krontune push run --dataset me/rows` goes on" in first.stdout
    assert hub.dataset("me/rows").messages == ["initial commit"]
    assert len(hub.model("me/planted").commits) == 2  # a data set that is refused holds no adapter back
    pushed = CliRunner().invoke(app, ["push", "run"])
    assert pushed.exit_code == 0, pushed.output
    assert "adapter: nothing changed" in pushed.stdout
    assert len(hub.model("me/planted").commits) == 2 and len(hub.dataset("me/rows").commits) == 2
    assert hub.model("me/planted").private

    files = written(planted / "run")
    names = {file.name for file in files}
    assert {"recipe.yaml", "run.json", "metrics.jsonl", "report.html", "rlvr_report.json", "README.md"} <= names
    for (_, name), repo in hub.repos.items():
        files |= {f"{name}: {file}": data for file, data in repo.files.items()}
    for place, data in files.items():
        assert not [one for one in SECRETS if one.encode() in data], place
        assert not isinstance(place, str) or str(planted).encode() not in data, place
    for said in (failed, first, pushed):
        assert not [one for one in SECRETS if one in said.output]
    assert b"(not shown)" in hub.model("me/planted").files["recipe.yaml"]
    assert not [name for name in hub.model("me/planted").files if name.endswith((".bin", ".pt", ".pkl"))]

    base = {file.name: file.read_bytes() for file in (planted / "tiny").iterdir()}
    hub.repos["model", "me/tiny"] = Repo(False, [base])
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(planted / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, cwd=planted, env=environment, timeout=300
    )
    assert loaded.stdout == "loaded\n", loaded.stderr
