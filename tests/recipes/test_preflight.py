import pytest

from krontune.recipes.loader import load
from krontune.recipes.preflight import check


def faults_of(file, *overrides):
    return [str(fault).replace(str(file), "r") for fault in check(load(file, overrides))]


def test_a_recipe_that_can_run_has_no_faults_and_leaves_no_files(small, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert faults_of(small) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_the_shipped_recipe_can_run():
    sizes = ["stages.select.raw=[{shipped: prose}]", "stages.rl.instances=20", "stages.verify.instances=20"]
    assert check(load("quickstart", sizes)) == []


def test_the_model_is_looked_up_and_not_loaded(small, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("krontune.recipes.training.load_base", refuse)
    assert faults_of(small, "base.model=somebody/some-model") == []
    for folder in (str(tmp_path), "./no", "~/no-such-model"):
        small.write_text(small.read_text().replace("model: smollm2-135m", f"model: {folder}"))
        [fault] = faults_of(small)
        small.write_text(small.read_text().replace(f"model: {folder}", "model: smollm2-135m"))
        assert fault.startswith("r:2:8: model folder ") and folder.removeprefix("~") in fault
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert faults_of(small, "base.model=./model") == []


# ---------------------------------------------------------------- data


def test_every_broken_source_is_found_at_once_with_its_place_its_file_and_its_line(small, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    text = small.read_text().replace("raw: pool.jsonl", "raw: [pool.jsonl, broken.jsonl, gone.txt]")
    small.write_text(text.replace("target.jsonl", "target.csv"))
    broken, gone, kind = faults_of(small)
    assert broken.startswith("r:5:23: broken.jsonl:2: not JSON")
    assert gone.startswith("r:5:37: raw: there is no file 'gone.txt'")
    assert kind.startswith("r:6:5: target: 'target.csv' does not end in one of .jsonl, .parquet, .txt")


@pytest.mark.parametrize("key", ["raw", "target"])
def test_an_empty_file_is_a_fault(small, tmp_path, key):
    (tmp_path / "empty.jsonl").write_text("\n")
    override = f"stages.select.{key}=empty.jsonl"
    assert faults_of(small, override) == [f"override {override!r}: {key} is empty: its sources hold no rows"]
    assert faults_of(small, f"stages.select.{key}=[empty.jsonl, pool.jsonl]") == []


def test_more_picks_than_the_pool_has_rows_are_a_fault(small):
    assert faults_of(small, "stages.select.k=9") == []
    override = "stages.select.k=10"
    assert faults_of(small, override) == [f"override {override!r}: k is 10 and the pool has 9 rows; give at most 9"]


def test_an_unreadable_pool_is_not_also_called_too_small(small):
    [fault] = faults_of(small, "stages.select.raw=[pool.jsonl, gone.jsonl]", "stages.select.k=10")
    assert "gone.jsonl" in fault


def test_data_of_the_sft_stage_is_read(small, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    [gone] = faults_of(small, "stages.sft.data=gone.jsonl")
    [empty] = faults_of(small, "stages.sft.data=empty.txt")
    assert "data: there is no file 'gone.jsonl'" in gone and "data is empty" in empty


def test_puzzles_that_cannot_be_made_are_a_fault(small):
    [fault] = faults_of(small, "stages.select.target={puzzles: [lis], size: 5, n: [5, 3]}")
    assert fault.endswith("n must be a number of rows, 2 or more, or a pair [low, high] of them, got [5, 3]")


# ---------------------------------------------------------------- tasks, adapters, trainers


@pytest.mark.parametrize(
    ("override", "place", "fault"),
    [
        ("stages.rl.task.n=[5, 3]", "r:11:5", "n must be a number of rows"),
        ("stages.rl.task.values=[9, 1]", "r:11:5", "values must be an inclusive range"),
        ("stages.rl.instances=100", "r:11:5", "nothing new in split 'train'"),
        ("stages.verify.task={name: lis, n: [1, 3]}", "override", "n must be a number of rows"),
        ("stages.verify.instances=100", "r:14:5", "nothing new in split 'test'"),
        ("stages.sft.adapter.alpha=.inf", "override", "alpha must be a positive number, got inf"),
        (
            "stages.sft.trainer.lr_scheduler_type=cosin",
            "r:9:5",
            "trl.SFTConfig refuses these values: cosin is not a valid",
        ),
        ("stages.rl.trainer.num_generations=3", "r:13:5", "trl.GRPOConfig refuses these values: "),
        ("stages.rl.trainer.num_generations=0", "r:13:5", "ZeroDivisionError: integer modulo by zero"),
    ],
)
def test_what_cannot_be_built_is_a_fault_with_its_reason(small, monkeypatch, override, place, fault):
    monkeypatch.setattr("krontune.rl.tasks.splits.MAX_TRIES", 300)
    narrow = ["stages.rl.task.values=[1, 4]"] if "instances" in override else []
    found = faults_of(small, *narrow, override)
    assert any(one.startswith(place) and fault in one for one in found), found
    assert all("\n" not in one for one in found)


def test_a_reason_of_several_lines_stays_one_fault_of_one_line(small, monkeypatch):
    def refuse(**arguments):
        raise TypeError("no\n  such option")

    monkeypatch.setattr("trl.SFTConfig", refuse)
    assert faults_of(small) == ["r:9:5: trl.SFTConfig refuses these values: TypeError: no such option"]
