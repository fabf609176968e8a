"""What a recipe will take."""

import json
import string

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from krontune.cli import app
from krontune.recipes import needs, probe
from krontune.recipes.loader import load
from krontune.recipes.plan import Plan, StagePlan, plan, plan_sweep, print_plan
from krontune.recipes.probe import at_hand
from krontune.recipes.rows import tokenize
from krontune.recipes.sweep import points

from .conftest import write_rows


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(needs, "hub_answers", lambda: False)


@pytest.fixture
def tiny(small, tmp_path):
    """The recipe `small` over a tiny random model of single characters, weights and all."""
    characters = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *string.printable])}
    words = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    small.write_text(small.read_text().replace("smollm2-135m", "./tiny, quantization: null"))
    return small


def stages(file, *overrides, probe=False):
    return {stage.stage: stage for stage in plan(load(file, overrides), probe).stages}


def test_steps_rows_and_tokens_of_every_stage(small):
    found = stages(
        small, "stages.sft.trainer.max_length=100", "stages.rl.trainer={max_steps: 3, max_completion_length: 50}"
    )
    assert (found["select"].rows, found["select"].memory) == (4, None)
    sft, rl, verify = found["sft"], found["rl"], found["verify"]
    assert (sft.rows, sft.steps, sft.tokens, sft.tokens_are) == (4, 2, 2 * 8 * 100, "bound")
    assert (rl.rows, rl.steps, rl.generated, rl.tokens_are) == (8, 3, 3 * 8 * 50, "bound")
    assert rl.tokens and 3 * 8 * (50 + 80) < rl.tokens < 3 * 8 * (50 + 130)
    assert (verify.runs, verify.rows, verify.generated) == (3, 6, 6 * 64)
    assert all(stage.memory and stage.seconds is None for stage in (sft, rl, verify))


def test_data_of_its_own_is_counted_to_the_token(small, tmp_path, tokenizer):
    rows = [{"text": "one two three"}, {"text": "four five six seven eight"}]
    write_rows(tmp_path / "own.jsonl", rows)
    own = ["stages.sft.data=own.jsonl", "stages.sft.trainer={num_train_epochs: 4, per_device_train_batch_size: 2}"]
    sft = stages(small, *own)["sft"]
    assert (sft.rows, sft.steps, sft.tokens_are) == (2, 4, "counted")
    assert sft.tokens == 4 * sum(len(tokenize(row, tokenizer)["input_ids"]) for row in rows)
    cut = stages(small, *own, "stages.sft.trainer.max_length=2")["sft"]
    assert cut.tokens == 4 * 2 * 2 and cut.memory.activations < sft.memory.activations


def test_more_rows_than_are_made_into_tokens_are_estimated(small, tmp_path, monkeypatch):
    monkeypatch.setattr("krontune.recipes.plan.COUNTED_ROWS", 3)
    write_rows(tmp_path / "own.jsonl", [{"text": "one two three"}] * 16)
    sft = stages(small, "stages.sft.data=own.jsonl", "stages.sft.trainer={num_train_epochs: 1}")["sft"]
    assert (sft.rows, sft.steps, sft.tokens, sft.tokens_are) == (16, 2, 16 * 4, "estimated")


def test_controls_are_runs_too(small):
    found = stages(small, "stages.sft.controls=[random]", "stages.rl.controls=[random, format]")
    assert (found["sft"].runs, found["rl"].runs, found["verify"].runs) == (2, 3, 6)


def test_without_the_model_what_the_recipe_says_is_still_planned(small):
    found = stages(small, "base.model=somebody/some-model")
    assert found["sft"].steps == 2 and found["sft"].memory is None and found["rl"].tokens is None
    assert not at_hand(load(small, ["base.model=somebody/some-model"]))


def test_a_model_at_hand_is_probed_and_the_time_grows_with_the_steps(tiny):
    assert at_hand(load(tiny))
    trainer = "max_completion_length: 8, per_device_train_batch_size: 8"
    found = stages(tiny, "stages.sft.controls=[random]", f"stages.rl.trainer={{max_steps: 2, {trainer}}}", probe=None)
    assert all(found[stage].seconds > 0 for stage in ("sft", "rl", "verify")) and found["select"].seconds is None
    many = stages(
        tiny, "stages.sft.trainer.max_steps=2000", f"stages.rl.trainer={{max_steps: 2000, {trainer}}}", probe=True
    )
    assert many["sft"].seconds > 20 * found["sft"].seconds and many["rl"].seconds > 20 * found["rl"].seconds


def test_the_plan_is_printed_as_tables_or_as_json(small):
    told = CliRunner().invoke(app, ["plan", str(small), "--no-probe"], env={"COLUMNS": "120"})
    assert told.exit_code == 0, told.output
    assert "small, on " in told.stdout and "activations" in told.stdout and "time was not probed" in told.stdout
    told = CliRunner().invoke(app, ["plan", str(small), "seed=3", "--json", "--no-probe"])
    found = json.loads(told.stdout)
    assert found["recipe"]["seed"] == 3 and found["probed"] is False
    assert [stage["stage"] for stage in found["stages"]] == ["select", "sft", "rl", "verify"]
    memory = found["stages"][1]["memory"]
    fixed = sum(memory[part] for part in ("weights", "adapter", "gradients", "optimizer"))
    assert memory["peak"] == fixed + max(memory["activations"] + memory["logits"], memory["rollouts"])


def test_of_a_stage_that_loads_no_model_no_memory_is_said_whatever_its_number(small, capsys):
    found = [StagePlan("dedup", rows=4), StagePlan("select-2", rows=4), StagePlan("sft-2", rows=4)]
    print_plan(Plan(load(small), found, probed=True))
    lines = capsys.readouterr().out.splitlines()
    said = {name: next("?" in line for line in lines if name in line) for name in ("dedup", "select-2", "sft-2")}
    assert said == {"dedup": False, "select-2": False, "sft-2": True}


def test_adapt_inf_takes_no_steps_where_it_warms_nothing_up(small):
    select = "{stage: select, method: adapt_inf, raw: pool.jsonl, k: 2}"
    warmed = select.replace("k: 2", "k: 2, warm_up: {steps: 3}")
    sft = "{stage: sft, data: pool.jsonl, trainer: {max_steps: 1}}"
    head = "name: small\nbase: {model: smollm2-135m}\nstages:\n"
    steps = []
    for stages_of in ([warmed, sft], [sft, select]):
        small.write_text(head + "".join(f"- {one}\n" for one in stages_of))
        steps.append(stages(small)["select"].steps)
    assert steps == [3, None]


def test_a_sweep_is_planned_point_by_point_in_one_table_or_as_json(small):
    small.write_text(small.read_text() + "sweep: {stages.sft.trainer.max_steps: [2, 5], stages.sft.adapter.r: [2]}\n")
    told = CliRunner().invoke(app, ["plan", str(small), "--no-probe"], env={"COLUMNS": "140"})
    assert told.exit_code == 0, told.output
    lines = [line for line in told.stdout.splitlines() if "max_steps=" in line]
    assert len(lines) == 2 and "max_steps=2,r=2" in lines[0] and "max_steps=5,r=2" in lines[1]
    assert told.stdout.count(" verify ") == 2 and "2 runs on " in told.stdout and "not probed" in told.stdout
    told = CliRunner().invoke(app, ["plan", str(small), "--json", "--no-probe"])
    found = json.loads(told.stdout)["points"]
    assert {name: point["stages"][1]["steps"] for name, point in found.items()} == {
        "max_steps=2,r=2": 2,
        "max_steps=5,r=2": 5,
    }
    assert all(
        point["recipe"]["stages"][1]["adapter"]["r"] == 2 and "sweep" not in point["recipe"] for point in found.values()
    )
    assert found["max_steps=2,r=2"] == json.loads(
        plan(load(small, ["sweep={}", "stages.sft.adapter.r=2"]), probe=False).as_json()
    )


def test_a_fault_of_one_point_is_told_before_any_is_planned(small):
    small.write_text(small.read_text() + "sweep: {stages.select.k: [4, 100]}\n")
    refused = CliRunner().invoke(app, ["plan", str(small), "--no-probe"])
    assert refused.exit_code == 2 and "k is 100 and the pool has 9 rows" in refused.stderr and not refused.stdout


def test_points_with_one_model_and_adapter_load_it_once(tiny, monkeypatch):
    loads = []
    real = probe.new_adapter
    monkeypatch.setattr(probe, "new_adapter", lambda *args: loads.append(args) or real(*args))
    monkeypatch.setattr(probe, "_seconds", lambda step, warm=False: 1.0)
    r, steps = "stages.sft.adapter.r: [2, 3]", "stages.sft.trainer.max_steps: [2, 400]"
    for order, expected in ((f"{r}, {steps}", 2), (f"{steps}, {r}", 4)):
        loads.clear()
        recipe = load(tiny, [f"sweep={{{order}}}"])
        found = plan_sweep(recipe, points(recipe), probe=True).points
        assert len(found) == 4 and all(one.stages[1].seconds for one in found.values())
        assert len(loads) == expected


def test_a_recipe_with_faults_is_not_planned(small):
    refused = CliRunner().invoke(app, ["plan", str(small), "stages.select.k=100"])
    assert refused.exit_code == 2 and "k is 100 and the pool has 9 rows" in refused.stderr and not refused.stdout
