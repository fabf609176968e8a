"""Several stages of a kind in one recipe: their names, what each takes from those before, and what runs again."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from krontune.cli import app
from krontune.recipes.compare import comparison
from krontune.recipes.content import key_of
from krontune.recipes.faults import RecipeError
from krontune.recipes.inputs import settings_of
from krontune.recipes.lifelong import is_sequence
from krontune.recipes.links import rl_of
from krontune.recipes.loader import load
from krontune.recipes.names import is_control, numbered, order, parts
from krontune.recipes.run_report import read_run
from krontune.recipes.select_adapt_inf import adapter_section
from krontune.recipes.steps import steps

from .conftest import write_model, write_rows

HEAD = "name: several\nbase: {model: ./model, quantization: null}\nstages:\n"
SELECT = "- {stage: select, raw: pool.jsonl, target: pool.jsonl, k: 3}\n"
SFT = "- {stage: sft}\n"
RL = "- {stage: rl, task: {name: lis, n: [3, 4]}}\n"
VERIFY = "- {stage: verify, task: {name: lis, n: [3, 4]}, instances: 2, max_new_tokens: 2, checks: [triplet]}\n"


def recipe_of(stages: str, *overrides: str):
    Path("r.yaml").write_text(HEAD + stages)
    return load("r.yaml", overrides)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- names


def test_a_name_is_the_kind_and_from_the_second_on_its_number_and_is_read_back():
    names = numbered(["select", "sft", "rl", "sft", "sft", "rl"])
    assert names == ["select", "sft", "rl", "sft-2", "sft-3", "rl-2"]
    for name in names:
        assert parts(name).stage == name and not is_control(name)
        found = parts(f"{name}-random")
        assert (found.stage, found.kind, found.control) == (name, parts(name).kind, "random")
    assert not is_control("base") and parts("base").stage == "base" and parts("sft-balanced").stage == "sft"
    mixed = ["verify", "rl-random", "sft-10", "sft-2", "rl", "sft", "select", "dedup"]
    assert sorted(mixed, key=order) == ["dedup", "select", "sft", "sft-2", "sft-10", "rl", "rl-random", "verify"]


# ---------------------------------------------------------------- what a stage takes


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (SELECT + SFT + RL + VERIFY, "select() sft(select) rl(sft) verify(sft, rl)"),
        (
            SELECT + SFT + SELECT + SFT + VERIFY,
            "select() sft(select) select-2() sft-2(select-2, sft) verify(sft, sft-2)",
        ),
        (
            SELECT + SFT + VERIFY + RL + SFT + RL + VERIFY,
            "select() sft(select) verify(sft) rl(sft) sft-2(select, rl) rl-2(sft-2) verify-2(sft, rl, sft-2, rl-2)",
        ),
        (
            SELECT + "- {stage: sft, controls: [random]}\n" + SFT.replace("sft", "sft, controls: [random]") + VERIFY,
            "select() sft(select) sft-random(select) sft-2(select, sft) sft-2-random(select, sft) "
            "verify(sft, sft-random, sft-2, sft-2-random)",
        ),
        (
            "- {stage: dedup, data: pool.jsonl}\n- {stage: select, target: pool.jsonl, k: 3}\n"
            "- {stage: dedup, data: select}\n- {stage: sft, data: dedup}\n- {stage: select, target: a.jsonl, k: 1}\n",
            "dedup() select(dedup) dedup-2(select) sft(dedup-2) select-2(dedup-2)",
        ),
        (
            "- {stage: sft, data: pool.jsonl}\n" + RL + "- {stage: select, method: adapt_inf, raw: a.jsonl, k: 1}\n",
            "sft() rl(sft) select(rl)",
        ),
    ],
)
def test_a_stage_reads_the_newest_rows_and_continues_the_newest_adapter(here, stages, expected):
    found = [f"{step.name}({', '.join(step.needs)})" for step in steps(recipe_of(stages))]
    assert " ".join(found) == expected


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            SELECT + SFT + RL + "- {stage: sft, adapter: {r: 2}}\n",
            "r.yaml:7:16: the sft stage continues the rl stage's adapter; leave 'adapter' out",
        ),
        (
            SELECT + SFT + SFT + RL.replace("]}", "]}, adapter: {r: 2}"),
            "r.yaml:7:45: the rl stage continues the sft-2 stage's adapter; leave 'adapter' out",
        ),
        (
            "- {stage: sft, data: a.jsonl}\n" + SELECT + "- {stage: sft, controls: [balanced]}\n",
            "r.yaml:6:27: the control 'balanced' needs a select stage of method adapt_inf; here: ['random']",
        ),
        (
            "- {stage: sft, data: a.jsonl}\n- {stage: select, method: adapt_inf, datasets: [{name: a, raw: a.jsonl}], "
            "k: 1, adapter_from: x}\n" + SFT,
            "r.yaml:5:81: the adapter of the sft stage is trained on; leave 'adapter_from' out",
        ),
        (
            "- {stage: select, method: adapt_inf, datasets: [{name: a, raw: a.jsonl}], k: 1}\n" + SELECT + SFT,
            "r.yaml:4:38: the sft stage trains between datasets, and none with data: select comes after this stage",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused_where_they_stand(here, stages, fault):
    with pytest.raises(RecipeError) as caught:
        recipe_of(stages)
    assert str(caught.value) == fault


def test_a_verify_stage_is_about_the_newest_rl_stage_and_two_equal_stages_are_told_apart(here):
    first, second = (RL.replace("lis", name) for name in ("lis", "countdown"))
    verify = "- {stage: verify}\n"
    recipe = recipe_of(SELECT + SFT + first + verify + SFT + second + verify)
    assert [rl_of(recipe, recipe.stage(name)).task.name for name in ("verify", "verify-2")] == ["lis", "countdown"]
    before = recipe_of(SELECT + SFT + VERIFY + first)
    assert rl_of(before, before.stage("verify")) is before.stage("rl"), "of whose head-room it may ask"
    assert recipe.stage("sft") == recipe.stage("sft-2") and recipe.name_of(recipe.stage("sft-2")) == "sft-2"


def test_over_datasets_each_sft_stage_follows_its_own_select_stage(here):
    sequence = "- {stage: select, method: adapt_inf, datasets: [{name: a, raw: a.jsonl}], k: 1}\n"
    recipe = recipe_of(sequence + "- {stage: sft, adapter: {r: 7}}\n" + SELECT + SFT)
    assert [is_sequence(recipe, recipe.stage(name)) for name in ("sft", "sft-2")] == [True, False]
    assert adapter_section(recipe, recipe.stage("select")).r == 7
    late = recipe_of("- {stage: sft, data: a.jsonl}\n" + sequence + SFT)
    assert steps(late)[2].needs == ("select", "sft") and is_sequence(late, late.stage("sft-2"))


def test_a_recipe_that_extends_another_changes_the_second_by_the_second_and_adds_one_more_where_it_stands(here):
    Path("parent.yaml").write_text(HEAD + SELECT + SFT + RL + SFT + VERIFY)
    child = "extends: parent.yaml\nname: child\nstages:\n" + SFT + "- {stage: sft, trainer: {max_steps: 7}}\n"
    Path("child.yaml").write_text(child)
    recipe = load("child.yaml")
    assert recipe.names == ["select", "sft", "rl", "sft-2", "verify"]
    assert [recipe.stage(name).trainer.max_steps for name in ("sft", "sft-2")] != [7, 7]
    assert recipe.stage("sft-2").trainer.max_steps == 7
    Path("parent.yaml").write_text(HEAD + SELECT + SFT + RL + VERIFY)
    Path("child.yaml").write_text("extends: parent.yaml\nname: child\nstages:\n" + SFT + RL + SFT)
    assert load("child.yaml").names == ["select", "sft", "rl", "sft-2", "verify"]


# ---------------------------------------------------------------- folders of today


KEYS = {
    "select": "76d088229ed80189",
    "sft": "0f218d400aa16635",
    "sft-random": "52a482da2a029fa3",
    "rl": "3df48903e4e70147",
    "verify": "5d2a165fdc27c53f",
}


def test_what_a_stage_was_made_from_is_described_as_it_was_before_there_could_be_several(small):
    """A finished stage of such a folder must not run again: these are the hashes that version 0.1 wrote."""
    recipe = load(small, ["stages.sft.controls=[random]"])
    found = {step.name: key_of(settings_of(recipe, step))[:16] for step in steps(recipe)}
    assert found == KEYS
    spelled = load(small, ["stages.sft.adapter={method: moka, r: 10}"])
    assert key_of(settings_of(spelled, steps(spelled)[1]))[:16] == KEYS["sft"]


# ---------------------------------------------------------------- a whole run


CHAIN = """\
- {stage: dedup, data: pool.jsonl}
- stage: sft
  data: dedup
  adapter: {r: 2, n_shapes: 2, target_modules: [q_proj]}
  trainer: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-2}
VERIFY- stage: sft
  data: {puzzles: [lis], size: 4}
  trainer: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 0.0}
VERIFY"""


def run(*overrides: str) -> list[str]:
    done = CliRunner().invoke(app, ["run", "r.yaml", *overrides])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_second_sft_stage_goes_on_from_the_first_and_a_change_of_it_leaves_the_first_alone(here):
    write_model(here / "model")
    rows = [{"text": " ".join(f"{word}{n}" for word in ("one", "two", "three", "four", "five", "six"))} for n in "abc"]
    write_rows(here / "pool.jsonl", [*rows, rows[1], rows[0]])
    recipe_of(CHAIN.replace("VERIFY", VERIFY))
    folder = Path("runs/several")
    said = run()
    assert [line.split(":")[0] for line in said[:5]] == ["dedup", "sft", "verify", "sft-2", "verify-2"]
    record = json.loads((folder / "run.json").read_text())
    assert record["stages"]["dedup"]["kept"] == 3 and record["data"]["sft"]["rows"] == 3
    weights = {name: (folder / name / "adapter/adapter_model.safetensors") for name in ("sft", "sft-2", ".")}
    first = weights["sft"].read_bytes()
    assert first == weights["sft-2"].read_bytes() == weights["."].read_bytes(), "it learned nothing at rate 0"
    asked = {file.name.partition("-greedy")[0] for file in (folder / "verify-2/answers").glob("*-greedy-*")}
    assert asked == {"sft-2"}, "the base and the first adapter were asked by the first verify stage"
    assert any("dedup: 3 of 5 rows kept; left out: 2 exact" in line for line in said)
    assert sum("held-out lis instances" in line for line in said) == 2

    said = run("stages.sft-2.trainer.learning_rate=1e-2", "stages.sft-2.trainer.max_steps=3")
    assert [line for line in said if "skipped" in line] == [
        f"{name}: done before, skipped" for name in ("dedup", "sft", "verify")
    ]
    changed = "sft-2: trainer.max_steps changed (1 -> 3), trainer.learning_rate changed (0.0 -> 0.01), runs again; what"
    assert any(line.startswith(changed) for line in said), said
    assert any(line.startswith("verify-2: sft-2 made something else, runs again") for line in said)
    record = json.loads((folder / "run.json").read_text())
    assert [record["stages"][name]["steps"] for name in ("sft", "sft-2")] == [1, 3]
    assert first == weights["sft"].read_bytes() != weights["sft-2"].read_bytes() == weights["."].read_bytes()
    assert list(json.loads((folder / "verify-2/verify.json").read_text())["models"]) == ["base", "sft", "sft-2"]

    page = (folder / "report.html").read_text()
    for title in ("Models (verify-2)", "Models (verify)", "After training: after sft-2 (verify-2)", "Copies taken out"):
        assert f">{title}</h" in page, title
    found = read_run(folder)
    assert list(found.verified) == ["verify", "verify-2"] and list(found.verify["models"]) == ["base", "sft", "sft-2"]
    assert ["sft-2: steps", "3"] in comparison([found], ["one"])
