"""Which finished stages still stand when a recipe or its data have changed; stages here only write what they read."""

import json
import os
from pathlib import Path

import pytest

from krontune.recipes import chain
from krontune.recipes.inputs import settings_of
from krontune.recipes.loader import load
from krontune.recipes.run_folder import RunFolder, WrongFolder
from krontune.recipes.select import CONTROL, SELECTED
from krontune.recipes.steps import steps

ALL = ["select", "sft", "rl", "verify"]
LR = "stages.sft.trainer.learning_rate"


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The names of the stages that were started."""
    names: list[str] = []

    def begin(name, folder):
        names.append(name)
        return folder.begin(name)

    def select(recipe, step, folder):
        place, stage = begin(step.name, folder), step.stage
        (place / SELECTED).write_text("".join(Path(path).read_text()[: stage.k] for path in stage.raw))
        (place / CONTROL).write_text("random")
        folder.add_data("selected", text=(place / SELECTED).read_text())
        folder.finish(step.name)

    def train(recipe, step, folder):
        name = step.name
        place = begin(name, folder)
        read = [folder.path / step.start / "adapter/weights"] if step.start else []
        read += [folder.path / step.rows / SELECTED] if step.rows else []
        (place / "adapter").mkdir()
        before = " ".join(file.read_text() for file in read)
        text = f"{name} {recipe.seed} {step.stage.trainer.learning_rate} ({before})"
        (place / "adapter" / "weights").write_text(text)
        folder.log(name, 1, {"text": text})
        folder.finish(name, text=text)

    def verify(recipe, step, folder):
        begin(step.name, folder)
        read = [(folder.path / name / "adapter" / "weights").read_text() for name in step.adapters]
        folder.finish(step.name, read=read)

    for name, stub in {"select": select, "sft": train, "rl": train, "verify": verify}.items():
        monkeypatch.setattr(chain, f"run_{name}", stub)
    monkeypatch.setattr(chain, "check", lambda recipe: [])
    monkeypatch.setattr(chain, "publish", lambda path: None)
    return names


@pytest.fixture
def again(small, started):
    """A function that runs the recipe with overrides in the folder "run": what was started, and what was said."""

    def run(*overrides):
        started.clear()
        said: list[str] = []
        chain.run(load(small, overrides), "run", say=said.append)
        return list(started), said

    assert run()[0] == ALL
    return run


def record() -> dict:
    return json.loads(Path("run/run.json").read_text())


def test_a_changed_key_reruns_its_stage_and_what_stands_on_it_and_keeps_what_was(again):
    before = Path("run/sft/adapter/weights").read_text()
    ran, said = again(f"{LR}=2e-4")
    assert ran == ["sft", "rl", "verify"]
    [old] = Path("run").glob("sft.old-*")
    what = "sft: trainer.learning_rate changed (0.001 -> 0.0002), runs again; what it made before is kept in"
    assert said[:2] == ["select: done before, skipped", f"{what} {old.name}"]
    assert any(line.startswith("rl: sft made something else, runs again") for line in said)
    assert (old / "adapter" / "weights").read_text() == before
    assert json.loads((old / "metrics.jsonl").read_text())["text"] == before
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["sft", "rl"] and all("0.0002" in line["text"] for line in lines)
    assert "0.0002" in Path("run/adapter/weights").read_text()
    assert load("run/recipe.yaml").stage("sft").trainer.learning_rate == 2e-4
    assert again(f"{LR}=2e-4")[0] == []


@pytest.mark.parametrize(
    ("overrides", "ran"),
    [
        (["stages.verify.instances=7"], ["verify"]),
        (["stages.rl.trainer.learning_rate=1"], ["rl", "verify"]),
        (["base.revision=v2"], ["sft", "rl", "verify"]),
        (["seed=5"], ALL),
        (["stages.sft.controls=[random]"], ["sft-random", "verify"]),
        (["description=other", "stages.select.ngrams=2", "stages.rl.trainer.save_steps=9"], []),
    ],
)
def test_only_what_depends_on_a_change_runs_again(again, overrides, ran):
    found, said = again(*overrides)
    assert found == ran
    assert sum(line.endswith("done before, skipped") for line in said) == len(ALL) - len(set(ran) & set(ALL))


def test_a_changed_data_file_reruns_its_stage_and_a_touched_or_missing_one_does_not(again):
    pool = Path("pool.jsonl")
    os.utime(pool, (1, 1))
    assert again()[0] == []
    text = pool.read_text()
    pool.write_text("new" + text[3:])
    ran, said = again()
    assert ran == ALL and said[0].startswith("select: pool.jsonl changed, runs again")
    pool.unlink()
    assert again()[0] == []


def test_a_stage_that_makes_the_same_again_leaves_what_stands_on_it(again):
    with Path("target.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert again()[0] == ["select"]


def test_a_change_that_is_taken_back_takes_the_stages_back_without_a_run(again):
    first = {name: Path("run", name, "adapter/weights").read_text() for name in ("sft", "rl")}
    metrics = sorted(Path("run/metrics.jsonl").read_text().splitlines())
    again(f"{LR}=2e-4")
    ran, said = again()
    assert ran == [] and sum("taken from" in line for line in said) == 3
    assert {name: Path("run", name, "adapter/weights").read_text() for name in ("sft", "rl")} == first
    assert Path("run/adapter/weights").read_text() == first["rl"]
    assert sorted(Path("run/metrics.jsonl").read_text().splitlines()) == metrics
    assert record()["stages"]["verify"]["read"] == [first["sft"], first["rl"]]
    assert again(f"{LR}=2e-4")[0] == []


def test_what_is_no_longer_in_the_recipe_is_kept_aside_and_out_of_the_record(again):
    again("stages.sft.controls=[random]")
    ran, said = again()
    assert ran == [] and said[0].startswith("sft-random: no longer in the recipe, kept in sft-random.old-")
    assert set(record()["stages"]) == set(ALL) and not Path("run/sft-random").exists()
    assert "sft-random" not in Path("run/metrics.jsonl").read_text()
    assert again("stages.sft.controls=[random]")[0] == []


def test_a_cut_in_a_rerun_loses_nothing_and_the_next_run_goes_on_there(again, started, monkeypatch):
    plain = chain.run_rl

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "run_rl", cut)
    with pytest.raises(KeyboardInterrupt):
        again(f"{LR}=2e-4")
    assert started == ["sft"] and Path("run/rl/done").is_file()
    monkeypatch.setattr(chain, "run_rl", plain)
    assert again(f"{LR}=2e-4")[0] == ["rl", "verify"]


def test_a_changed_file_of_own_code_reruns_the_stage_that_names_it(again):
    Path("own_pay_here.py").write_text("def pay(completions, **columns): return [1.0 for _ in completions]\n")
    rl = "{stage: rl, task: {name: lis, n: [3, 5]}, reward: own_pay_here:pay, trainer: {max_steps: 1}}"
    own = ["allow=[own_pay_here:pay]", f"stages.rl={rl}"]
    again(*own)
    assert again(*own)[0] == []
    Path("own_pay_here.py").write_text("def pay(completions, **columns): return [2.0 for _ in completions]\n")
    assert again(*own)[0][0] == "rl"


SEVERAL = """\
stages:
  - {stage: select, raw: pool.jsonl, target: target.jsonl, k: 4}
  - {stage: sft, trainer: {learning_rate: 1e-3}}
  - {stage: verify, task: {name: lis, n: [3, 5]}}
  - {stage: select, raw: pool.jsonl, target: target.jsonl, k: 6}
  - {stage: sft, controls: [random], trainer: {learning_rate: 2e-3}}
  - {stage: rl, task: {name: lis, n: [3, 5]}, trainer: {learning_rate: 3e-3}}
  - {stage: verify}
"""
SECOND = ["sft-2", "sft-2-random", "rl", "verify-2"]


@pytest.mark.parametrize(
    ("override", "ran"),
    [
        ("stages.sft-2.trainer.learning_rate=1", SECOND),
        ("stages.select-2.ngrams=3", ["select-2"]),
        ("stages.select.k=5", ["select", "sft", "verify", *SECOND]),
        ("stages.rl.trainer.learning_rate=1", ["rl", "verify-2"]),
        ("stages.rl.reward=answer", ["verify", "rl", "verify-2"]),
    ],
)
def test_of_several_stages_of_a_kind_those_run_again_that_depend_on_the_change(small, started, override, ran):
    small.write_text(small.read_text().partition("stages:")[0] + SEVERAL)
    chain.run(load(small), "run", say=lambda line: None)
    assert started == ["select", "sft", "verify", "select-2", *SECOND]
    first = Path("run/sft/adapter/weights").read_text()
    assert first in Path("run/sft-2/adapter/weights").read_text(), "the newest adapter is continued"
    assert Path("run/adapter/weights").read_text() == Path("run/rl/adapter/weights").read_text()
    started.clear()
    said: list[str] = []
    chain.run(load(small, [override]), "run", say=said.append)
    assert started == ran


MORE = (
    "[{stage: select, raw: pool.jsonl, target: target.jsonl, k: 4}, {stage: sft, trainer: {max_steps: 2, "
    "learning_rate: 1e-3}}, {stage: sft, data: pool.jsonl}, {stage: rl, task: {name: lis, n: [3, 5]}, instances: 8, "
    "trainer: {max_steps: 1}}, {stage: verify, instances: 6}]"
)


def test_a_stage_in_between_is_a_reason_that_is_told(again):
    found, said = again("stages=" + MORE)
    assert found == ["sft-2", "rl", "verify"]
    assert any(line.startswith("rl: sft is no longer read, sft-2 is new, runs again") for line in said), said


# ---------------------------------------------------------------- folders of an early version


@pytest.fixture
def early(again):
    """The folder as the first version left it: markers without what the stages were made from."""
    for mark in Path("run").glob("*/done"):
        mark.write_text(json.dumps({key: json.loads(mark.read_text())[key] for key in ("finished", "seconds")}))
    found = record()
    del found["files"]
    Path("run/run.json").write_text(json.dumps(found))
    return again


@pytest.mark.parametrize(
    ("overrides", "ran"),
    [([], []), (["stages.verify.instances=7"], ["verify"]), ([f"{LR}=2e-4"], ["sft", "rl", "verify"])],
)
def test_a_folder_of_an_early_version_is_read_by_its_recipe(early, overrides, ran):
    assert early(*overrides)[0] == ran
    assert early(*overrides)[0] == []
    assert len(list(Path("run").glob("*.old-*"))) == len(ran)


def test_what_an_early_version_built_on_a_stage_that_ran_since_runs_again(early, monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chain, "run_rl", cut)
        with pytest.raises(KeyboardInterrupt):
            early(f"{LR}=2e-4")
    assert early(f"{LR}=2e-4")[0] == ["rl", "verify"]


def test_an_early_folder_whose_recipe_cannot_be_read_is_refused_unchanged(early):
    text = Path("run/recipe.yaml").read_text()
    Path("run/recipe.yaml").write_text(text + "forgotten: 1\n")
    with pytest.raises(WrongFolder, match="cannot be read"):
        early()


# ---------------------------------------------------------------- cut attempts


def test_nothing_is_kept_of_a_cut_attempt_at_something_else_but_what_may_be_reused(small):
    with RunFolder("run", load(small)) as folder:
        folder.expect("verify", {"a": 1})
        place = folder.begin("verify", keep=("part",), reuse=("answers",))
        for name in ("part", "answers", "rest"):
            (place / name).write_text(name)
        folder.log("verify", 1, {})
        folder.begin("verify", keep=("part",), reuse=("answers",), step=1)
        assert {one.name for one in place.iterdir()} == {"part", "answers", "begun"} and folder.metrics("verify")
        folder.expect("verify", {"a": 2})
        folder.begin("verify", keep=("part",), reuse=("answers",))
        assert {one.name for one in place.iterdir()} == {"answers", "begun"} and not folder.metrics("verify")
        folder.finish("verify")
        folder.expect("verify", {"a": 3})
        folder.begin("verify", reuse=("answers",))
        assert {one.name for one in place.iterdir()} == {"answers", "begun"}


def test_the_checkpoints_of_a_cut_attempt_at_something_else_are_kept_and_taken_back(small):
    with RunFolder("run", load(small)) as folder:
        folder.expect("sft", {"a": 1})
        place = folder.begin("sft", keep=("trainer",))
        (place / "trainer" / "checkpoint-1").mkdir(parents=True)
        folder.log("sft", 1, {"loss": 2.0})
    with RunFolder("run", load(small)) as folder:  # as one that forgets an override
        moved = folder.expect("sft", {"a": 2})
        assert moved.name.startswith("sft.old-") and (moved / "trainer" / "checkpoint-1").is_dir()
        assert not (folder.begin("sft", keep=("trainer",)) / "trainer").exists() and folder.metrics("sft") == []
        folder.finish("sft")
        assert folder.expect("sft", {"a": 1}) is None
        assert (folder.begin("sft", keep=("trainer",), step=1) / "trainer" / "checkpoint-1").is_dir()
        assert folder.metrics("sft") == [{"stage": "sft", "step": 1, "loss": 2.0}]
        assert not moved.exists() and len(list(folder.path.glob("sft.old-*"))) == 1


def test_a_value_whose_key_sounds_like_a_secret_counts_and_a_secret_is_not_written_down(small):
    def rl_inputs(options):
        recipe = load(small, [f"stages.rl.reward_options={options}"])
        return settings_of(recipe, next(step for step in steps(recipe) if step.name == "rl"))

    assert rl_inputs("{answer_key: solution}") != rl_inputs("{answer_key: answer}")
    assert "s3cretvalue99" not in str(rl_inputs("{api_key: s3cretvalue99}"))
