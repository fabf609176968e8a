import errno
import hashlib
import json
import subprocess

import pytest

from krontune.recipes import run_folder
from krontune.recipes.loader import load
from krontune.recipes.run_folder import RunError, RunFolder, WrongFolder, recipe_text


def tree(folder):
    """Every file below with its bytes and time of change."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.fixture
def recipe(small):
    return load(small)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "one"


# ---------------------------------------------------------------- whose folder it is


def test_nothing_is_written_before_the_folder_is_entered(recipe, path):
    RunFolder(path, recipe)
    assert not path.exists()


def test_an_entered_folder_holds_the_recipe_as_resolved_and_the_circumstances(small, path):
    recipe = load(small, ["seed=7", "stages.sft.trainer.max_steps=9"])
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        folder.add_data("raw", rows=9)
    kept = load(path / "recipe.yaml")
    assert (kept.seed, kept.stage("sft").trainer.max_steps, kept.stage("select").k) == (7, 9, 4)
    record = json.loads((path / "run.json").read_text())
    assert (record["name"], record["seed"], record["data"]) == ("small", 7, {"raw": {"rows": 9}})
    assert {"python", "krontune", "torch", "trl", "peft"} <= set(record["versions"])
    assert record["machine"]["cpus"] >= 1 and record["last_started"].endswith("+00:00")
    assert record["recipe_sha256"] == hashlib.sha256((path / "recipe.yaml").read_bytes()).hexdigest()


def test_the_same_recipe_goes_on_with_the_record(recipe, path):
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        folder.finish("select", n=4)
    with RunFolder(path, recipe) as folder:
        assert folder.is_done("select") and not folder.is_done("sft")
        assert folder.record["stages"]["select"]["n"] == 4


def test_another_recipe_is_refused_by_its_name_and_nothing_changes(small, path):
    with RunFolder(path, load(small)) as folder:
        folder.begin("select")
        folder.finish("select")
    before = tree(path)
    with pytest.raises(WrongFolder) as caught:
        RunFolder(path, load(small, ["name=other"]))
    assert tree(path) == before
    assert all(word in str(caught.value) for word in (str(path), "'small'", "'other'", "--out"))
    (path / "recipe.yaml").write_text("name: [")
    before = tree(path)
    with pytest.raises(WrongFolder, match=r"recipe.yaml is damaged"):
        RunFolder(path, load(small))
    assert tree(path) == before


def test_another_recipe_that_came_in_between_is_refused_too(small, path):
    early = RunFolder(path, load(small))
    with RunFolder(path, load(small, ["name=other"])):
        pass
    before = tree(path)
    with pytest.raises(WrongFolder, match="another recipe"), early:
        pass
    assert tree(path) == before


def test_a_folder_of_other_files_or_a_file_is_refused(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    for path in (tmp_path / "mine", tmp_path / "pool.jsonl"):
        with pytest.raises(WrongFolder, match="is no run folder"):
            RunFolder(path, recipe)
    assert tree(tmp_path) == before


def test_an_empty_folder_is_taken(recipe, path):
    path.mkdir(parents=True)
    with RunFolder(path, recipe):
        assert (path / "recipe.yaml").is_file()


# ---------------------------------------------------------------- the lock


def test_a_folder_in_use_is_refused_until_it_is_left(recipe, path):
    with RunFolder(path, recipe):
        with pytest.raises(WrongFolder, match="another krontune runs in"), RunFolder(path, recipe):
            pass
    with RunFolder(path, recipe):
        pass


def test_a_folder_is_left_when_a_stage_raises(recipe, path):
    with pytest.raises(KeyboardInterrupt), RunFolder(path, recipe):
        raise KeyboardInterrupt
    with RunFolder(path, recipe):
        pass


def test_a_disk_that_was_full_at_the_start_leaves_a_folder_that_can_be_entered(recipe, path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomic", full)
        with pytest.raises(OSError, match="No space"), RunFolder(path, recipe):
            pass
    with RunFolder(path, recipe):
        assert load(path / "recipe.yaml").name == "small"


# ---------------------------------------------------------------- stages and metrics


def test_a_stage_is_done_only_once_it_is_finished(recipe, path):
    with RunFolder(path, recipe) as folder:
        stage = folder.begin("sft")
        assert stage == path / "sft" and list(stage.iterdir()) == [] and not folder.is_done("sft")
        folder.finish("sft", steps=3)
        assert folder.is_done("sft")
    record = json.loads((path / "run.json").read_text())["stages"]["sft"]
    assert record["steps"] == 3 and record["seconds"] >= 0
    assert json.loads((path / "sft" / "done").read_text())["seconds"] == record["seconds"]


def test_a_stage_whose_record_cannot_be_written_is_not_done(recipe, path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with RunFolder(path, recipe) as folder:
        folder.begin("sft")
        monkeypatch.setattr(run_folder, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            folder.finish("sft")
        assert not folder.is_done("sft")


def test_a_stage_that_begins_again_leaves_no_files_and_no_metrics_of_the_cut_attempt(recipe, path):
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        folder.log("select", 1, {"rows": 9})
        folder.finish("select")
        (folder.begin("sft") / "half").write_text("half")
        folder.log("sft", 1, {"loss": 2.0})
        folder.log("sft", 2, {"loss": 1.5})
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "sft", "st')
        assert [line["step"] for line in folder.metrics("sft")] == [1, 2]
        assert list(folder.begin("sft").iterdir()) == []
        assert folder.metrics("sft") == []
        folder.log("sft", 1, {"loss": 2.1})
        assert folder.metrics("sft") == [{"stage": "sft", "step": 1, "loss": 2.1}]
        assert folder.metrics("select") == [{"stage": "select", "step": 1, "rows": 9}] and folder.is_done("select")
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 1], "no line is left that was cut while it was written"


def test_metrics_of_a_run_that_logged_nothing_are_empty(recipe, path):
    with RunFolder(path, recipe) as folder:
        assert folder.metrics("sft") == []


# ---------------------------------------------------------------- where it ran


def test_the_record_names_the_commit_and_whether_it_was_changed(recipe, tmp_path, path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout

    git("init", "--quiet")
    git("add", "pool.jsonl")
    git("commit", "--quiet", "--message", "pool")
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        assert folder.record["git"] == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "pool.jsonl").write_text("changed")
    with RunFolder(path, recipe) as folder:
        assert folder.record["git"]["dirty"] is False, "what is done keeps the circumstances under which it was"
        folder.begin("select")
        assert folder.record["git"]["dirty"] is True


def test_outside_a_repository_and_without_git_the_record_says_so(recipe, tmp_path, path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        assert folder.record["git"] is None
    monkeypatch.setenv("PATH", "")
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        assert folder.record["git"] is None


def test_the_text_of_a_recipe_holds_its_defaults_and_of_a_trainer_what_was_given(recipe):
    text = recipe_text(recipe)
    assert "k: 4" in text and "learning_rate: 0.001" in text and "ngrams: 2" in text and "seed: 0" in text
    assert "weight_decay" not in text


def test_what_a_kill_in_the_first_moment_leaves_is_no_other_run(recipe, path):
    path.mkdir(parents=True)
    (path / ".recipe.yaml.123.tmp").write_text("na")
    with RunFolder(path, recipe) as folder:
        assert (folder.path / "recipe.yaml").is_file()


def test_a_damaged_record_is_named_and_a_lost_one_undoes_the_stages(recipe, path):
    with RunFolder(path, recipe) as folder:
        folder.begin("select")
        folder.finish("select")
    assert RunFolder(path, recipe).is_done("select")
    (path / "run.json").write_text("")
    with pytest.raises(RunError, match=r"run.json is damaged"):
        RunFolder(path, recipe)
    (path / "run.json").unlink()
    assert not RunFolder(path, recipe).is_done("select")
