"""Which stages run, in which order, and where a cut run goes on; the stages themselves only write files here."""

import errno
import json

import pytest

from krontune.recipes import chain
from krontune.recipes.faults import Fault, RecipeError
from krontune.recipes.loader import load
from krontune.recipes.run_folder import RunError, RunFolder, WrongFolder

ALL = ["select", "sft", "rl", "verify"]


class Stages:
    """Stands for the four stages: notes each start, and raises what `fails` holds for it, half way."""

    def __init__(self):
        self.started, self.checked, self.fails, self.faults = [], 0, {}, []

    def stage(self, name, adapter=False):
        def run(recipe, step, folder):
            assert step.stage.stage == name
            self.work(step.name, folder, adapter, list(step.adapters))

        return run

    def work(self, name, folder, adapter, adapters):
        self.started.append(name)
        place = folder.begin(name)
        (place / "half").write_text(name)
        if name in self.fails:
            raise self.fails.pop(name)
        if adapter:
            (place / "adapter").mkdir()
            (place / "adapter" / "weights").write_text(name)
        folder.finish(name, adapters=adapters)

    def check(self, recipe):
        self.checked += 1
        return self.faults


@pytest.fixture
def stages(monkeypatch) -> Stages:
    stages = Stages()
    for name in ("select", "verify"):
        monkeypatch.setattr(chain, f"run_{name}", stages.stage(name))
    for name in ("sft", "rl"):
        monkeypatch.setattr(chain, f"run_{name}", stages.stage(name, adapter=True))
    monkeypatch.setattr(chain, "check", stages.check)
    return stages


@pytest.fixture
def recipe(small):
    return load(small)


def content(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_every_stage_runs_once_in_order_and_the_last_adapter_is_put_forward(recipe, tmp_path, stages):
    said = []
    run = chain.run(recipe, tmp_path / "run", say=said.append)
    assert stages.started == ALL and stages.checked == 1
    assert [line.split(":")[0] for line in said] == ALL and all("done in" in line for line in said)
    assert run.path == tmp_path / "run" and list(run.record["stages"]) == ALL
    assert (run.adapter / "weights").read_text() == "rl"
    assert json.loads((run.path / "run.json").read_text()) == run.record


def test_the_adapter_put_forward_is_that_of_the_last_stage_that_the_recipe_still_has(small, recipe, tmp_path, stages):
    run = chain.run(recipe, tmp_path / "run")
    without = (
        "stages=[{stage: select, raw: pool.jsonl, target: target.jsonl, k: 4}, {stage: sft, trainer: {max_steps: 2}}]"
    )
    chain.run(load(small, [without]), tmp_path / "run")
    assert (run.adapter / "weights").read_text() == "sft"
    (run.adapter / "README.md").write_text("a card, written later")
    chain.run(load(small, [without]), tmp_path / "run")
    assert (run.adapter / "README.md").is_file(), "the same adapter is left as it is"
    chain.run(load(small, [without.split(", {stage: sft")[0] + "]"]), tmp_path / "run")
    assert not run.adapter.exists()


def test_the_default_folder_is_named_after_the_recipe(recipe, tmp_path, stages):
    assert (tmp_path / chain.run(recipe, say=lambda line: None).path).samefile(tmp_path / "runs" / "small")


def test_controls_are_steps_of_their_own_and_verified(small, tmp_path, stages):
    run = chain.run(load(small, ["stages.sft.controls=[random]"]), tmp_path / "run")
    assert stages.started == ["select", "sft", "sft-random", "rl", "verify"]
    assert run.record["stages"]["verify"]["adapters"] == ["sft", "sft-random", "rl"]


def test_a_run_without_training_puts_no_adapter_forward(small, tmp_path, stages):
    text = small.read_text()
    small.write_text(text[: text.index("  - stage: sft")])
    run = chain.run(load(small), tmp_path / "run")
    assert stages.started == ["select"] and not run.adapter.exists()


def test_a_finished_run_does_nothing_again(recipe, tmp_path, stages):
    first = chain.run(recipe, tmp_path / "run")
    before = content(first.path)
    stages.started.clear()
    said = []
    again = chain.run(recipe, tmp_path / "run", say=said.append)
    assert stages.started == [] and stages.checked == 1
    assert said == [f"{name}: done before, skipped" for name in ALL]
    assert again.record["stages"] == first.record["stages"]
    after = content(first.path)
    assert {name for name in before if before[name] != after[name]} <= {chain.Path("run.json")}


FAILURES = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), RuntimeError("boom")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("cut", ALL)
def test_a_cut_run_goes_on_at_the_stage_that_was_cut(recipe, tmp_path, stages, cut, failure):
    stages.fails = {cut: failure}
    with pytest.raises(type(failure)):
        chain.run(recipe, tmp_path / "run")
    done = ALL[: ALL.index(cut)]
    assert stages.started == [*done, cut]
    assert [name for name in ALL if (tmp_path / "run" / name / "done").is_file()] == done
    assert not (tmp_path / "run" / "adapter").exists()
    before = {name: content(tmp_path / "run" / name) for name in done}

    stages.started.clear()
    run = chain.run(recipe, tmp_path / "run")
    assert stages.started == ALL[len(done) :]
    assert {name: content(run.path / name) for name in done} == before
    assert list(run.record["stages"]) == ALL and (run.adapter / "weights").read_text() == "rl"


def test_an_adapter_whose_copy_was_cut_is_copied_again(recipe, tmp_path, stages, monkeypatch):
    def cut(source, target):
        target.mkdir()
        (target / "weigh").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chain.shutil, "copytree", cut)
        with pytest.raises(KeyboardInterrupt):
            chain.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    run = chain.run(recipe, tmp_path / "run")
    assert [file.name for file in run.adapter.iterdir()] == ["weights"]
    assert not list(run.path.glob(".adapter*"))


def test_a_recipe_with_faults_writes_nothing_and_the_mended_one_may_take_the_folder(small, tmp_path, stages):
    stages.faults = [Fault("r:1:1", "no")]
    with pytest.raises(RecipeError, match="r:1:1: no"):
        chain.run(load(small, ["seed=1"]), tmp_path / "run")
    assert stages.started == [] and not (tmp_path / "run").exists()
    stages.faults = []
    chain.run(load(small, ["seed=2"]), tmp_path / "run")
    assert stages.started == ALL


def test_the_folder_of_another_recipe_is_refused_before_anything_is_read_or_written(small, tmp_path, stages):
    stages.fails = {"rl": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        chain.run(load(small), tmp_path / "run")
    before = content(tmp_path / "run")
    stages.started.clear()
    stages.checked = 0
    with pytest.raises(WrongFolder, match="another recipe, 'small', and this one is 'other'"):
        chain.run(load(small, ["name=other"]), tmp_path / "run")
    assert stages.started == [] and stages.checked == 0 and content(tmp_path / "run") == before


def test_two_runs_at_once_do_not_share_a_folder(recipe, tmp_path, stages):
    with RunFolder(tmp_path / "run", recipe):
        with pytest.raises(WrongFolder, match="another krontune runs"):
            chain.run(recipe, tmp_path / "run")
    assert stages.started == []


def test_a_run_is_pushed_at_its_end_and_a_push_that_fails_does_not_fail_it(small, tmp_path, stages, monkeypatch):
    pushed, said = [], []

    def push(path, say):
        pushed.append((path, (path / "report.html").is_file()))
        raise RunError("not pushed to me/x: no network; `krontune push` goes on")

    monkeypatch.setattr("krontune.recipes.hub.push", push)
    run = chain.run(load(small, ["hub.repo=me/x"]), tmp_path / "run", say=said.append)
    assert pushed == [(run.path, True)] and said[-1].startswith("not pushed to me/x")
    assert (run.adapter / "weights").read_text() == "rl"
    chain.run(load(small), tmp_path / "other", say=said.append)
    assert len(pushed) == 1
