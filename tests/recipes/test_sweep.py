"""Sweeps: which points there are, what they share, and what a failed one leaves; the stages here only write."""

import json
from pathlib import Path

import pytest

from krontune.recipes import chain, sweep
from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.run_folder import RunError, WrongFolder
from krontune.recipes.sweep import points, run_sweep

LR, R = "stages.sft.trainer.learning_rate", "stages.sft.adapter.r"
SWEEP = f"sweep:\n  {LR}: [1e-4, 2e-4]\n  {R}: [2, 4]\n"
NAMES = [f"learning_rate={rate},r={r}" for rate in ("0.0001", "0.0002") for r in (2, 4)]


@pytest.fixture
def started(monkeypatch):
    """The stages that were started; one whose name and learning rate stand in `fails` raises."""
    names: list = []
    names_fails: set = set()

    def work(recipe, step, folder):
        stage = step.stage
        rate = recipe.stage("sft").trainer.learning_rate
        names.append((folder.path.name, stage.stage))
        place = folder.begin(stage.stage)
        if (folder.path.name, stage.stage) in names_fails:
            raise RuntimeError("boom")
        if stage.stage in ("sft", "rl"):
            (place / "adapter").mkdir()
            adapter = recipe.stage("sft").adapter
            (place / "adapter" / "weights").write_text(f"{stage.stage} {rate} {adapter.r if adapter else None}")
            folder.log(stage.stage, 1, {"loss": rate})
        folder.finish(stage.stage, steps=1)

    for name in ("select", "sft", "rl", "verify"):
        monkeypatch.setattr(chain, f"run_{name}", work)
    for module in (chain, sweep):
        monkeypatch.setattr(module, "check", lambda recipe: [])
    monkeypatch.setattr(chain, "publish", lambda path: None)
    return names, names_fails


@pytest.fixture
def swept(small):
    small.write_text(small.read_text() + SWEEP)
    return small


def test_the_points_are_the_product_each_a_recipe_without_a_sweep(swept):
    found = points(load(swept))
    assert list(found) == NAMES
    settings = [(one.stage("sft").trainer.learning_rate, one.stage("sft").adapter.r) for one in found.values()]
    assert settings == [(1e-4, 2), (1e-4, 4), (2e-4, 2), (2e-4, 4)]
    assert all(one.sweep == {} and one.stage("sft").trainer.max_steps == 2 for one in found.values())


def test_names_are_whole_paths_where_last_words_meet_and_fit_a_folder():
    assert sweep.point_name({"a.n": [3, 5], "b.n": "x/y"}) == "a.n=_3,5_,b.n=x_y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sweep: {{{R}: [2, many]}}\n", "16:9: with stages.sft.adapter.r=many: r: 'many' is not a whole number"),
        ("sweep: {stages.sft.adapter.q: [2]}\n", "unknown key 'q'"),
        ("sweep: {stages.dpo.r: [2]}\n", "no item 'dpo'"),
        (f"sweep: {{{R}: []}}\n", "must have at least 1 item"),
    ],
)
def test_a_point_that_is_no_recipe_is_a_fault_of_the_file_before_anything_runs(small, text, message):
    small.write_text(small.read_text() + text)
    with pytest.raises(RecipeError) as caught:
        load(small)
    assert message in str(caught.value) and all(fault.where.startswith(str(small)) for fault in caught.value.faults)


def test_a_sweep_shares_what_is_the_same_and_ends_with_one_table(swept, started, capsys):
    said: list[str] = []
    runs = run_sweep(load(swept), "all", say=said.append)
    assert [run.path for run in runs] == [Path("all", name) for name in NAMES]
    names, _ = started
    assert [stage for _, stage in names] == ["select"] + 4 * ["sft", "rl", "verify"]
    assert all((run.path / "select" / "done").is_file() and run.record["stages"]["select"] for run in runs)
    assert (runs[3].adapter / "weights").read_text() == "rl 0.0002 4"
    assert all(len((run.path / "metrics.jsonl").read_text().splitlines()) == 2 for run in runs)
    assert "runs side by side" in capsys.readouterr().out and Path("all/sweep.html").is_file()
    names.clear()
    run_sweep(load(swept), "all", say=said.append)
    assert names == []


def test_a_failed_point_does_not_lose_the_others_and_is_the_only_one_run_again(swept, started):
    names, fails = started
    fails.add((NAMES[1], "rl"))
    with pytest.raises(RunError, match=r"1 of 4 points of the sweep failed.*\nlearning_rate=0.0001,r=4: .*boom"):
        run_sweep(load(swept), "all", say=lambda line: None)
    assert sum((Path("all", name) / "verify" / "done").is_file() for name in NAMES) == 3
    fails.clear()
    names.clear()
    assert len(run_sweep(load(swept), "all", say=lambda line: None)) == 4
    assert names == [(NAMES[1], "rl"), (NAMES[1], "verify")]


def test_ctrl_c_ends_the_whole_sweep(swept, started, monkeypatch):
    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(load(swept), "all", say=lambda line: None)


def test_a_sweep_and_a_single_run_do_not_share_a_folder(swept, small, started):
    recipe = load(swept)
    with pytest.raises(RunError, match="run_sweep"):
        chain.run(recipe, "all")
    run_sweep(recipe, "all", say=lambda line: None)
    single = load(swept, ["sweep={}"])
    with pytest.raises(WrongFolder, match="is no run folder"):
        chain.run(single, "all", say=lambda line: None)
    chain.run(single, "one", say=lambda line: None)
    with pytest.raises(WrongFolder, match="holds a single run"):
        run_sweep(recipe, "one", say=lambda line: None)
    assert "sweep" not in json.dumps(load("one/recipe.yaml").model_dump(exclude_defaults=True))
