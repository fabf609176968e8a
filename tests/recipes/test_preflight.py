import inspect
import re
from importlib.util import find_spec

import pytest
from transformers import LlamaConfig
from trl import GRPOTrainer

from krontune.recipes.loader import load
from krontune.recipes.preflight import CHOICES, check


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
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    assert faults_of(small, "base.model=somebody/some-model") == []
    for folder in (str(tmp_path), "./no", "~/no-such-model"):
        small.write_text(small.read_text().replace("model: smollm2-135m", f"model: {folder}"))
        [fault] = faults_of(small)
        small.write_text(small.read_text().replace(f"model: {folder}", "model: smollm2-135m"))
        assert fault.startswith("r:2:8: model folder ") and folder.removeprefix("~") in fault
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert faults_of(small, "base.model=./model") == []


def test_a_model_that_the_hub_does_not_have_is_a_fault_and_a_hub_out_of_reach_is_none(small, monkeypatch):
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    def hub_raises(error):
        def model_info(*args, **kwargs):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        return faults_of(small, "base.model=somebody/some-model")

    answer = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.test"))
    [fault] = hub_raises(RepositoryNotFoundError("not found", response=answer))
    assert "the Hub has no model 'somebody/some-model'" in fault
    for error in (httpx2.ConnectError("no network"), httpx2.ReadTimeout("slow"), OSError("offline")):
        assert hub_raises(error) == []


def test_a_name_that_no_hub_can_have_is_a_fault(small):
    [fault] = faults_of(small, "base.model='some model'")
    assert "'some model' is neither a folder nor a model id of the Hub" in fault


def test_an_attention_that_needs_a_gpu_is_a_fault_where_there_is_none(small, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    [fault] = faults_of(small, "base.attn_implementation=flash_attention_2")
    assert "flash_attention_2 needs a GPU" in fault


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_that_is_not_installed_is_a_fault_before_anything_is_trained(small):
    [fault] = faults_of(small, "stages.rl.trainer.use_vllm=true")
    assert "use_vllm needs the package vllm, which is not installed" in fault
    assert faults_of(small, "base.attn_implementation=sdpa") == []


# ---------------------------------------------------------------- values that train nothing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rate=.nan", "learning_rate is nan; give a finite number"),
        ("trainer.learning_rate=.inf", "learning_rate is inf; give a finite number"),
        ("trainer.learning_rate=-1e-3", "learning_rate is -0.001; give at least 0"),
        ("trainer.max_steps=0", "max_steps is 0; give at least 1"),
        ("trainer.per_device_train_batch_size=0", "per_device_train_batch_size is 0; give at least 1"),
        ("adapter.target_modules='(q_proj'", "'(q_proj' is no regular expression"),
    ],
)
def test_values_that_train_nothing_or_break_the_run_are_faults(small, override, message):
    assert any(message in fault for fault in faults_of(small, f"stages.sft.{override}"))


# ---------------------------------------------------------------- data


def test_every_broken_source_is_found_at_once_with_its_place_its_file_and_its_line(small, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    text = small.read_text().replace("raw: pool.jsonl", "raw: [pool.jsonl, broken.jsonl, gone.txt]")
    small.write_text(text.replace("target.jsonl", "target.csv"))
    broken, gone, kind = faults_of(small)
    assert broken.startswith("r:5:23: broken.jsonl:2: not JSON")
    assert gone.startswith("r:5:37: raw: there is no file 'gone.txt'")
    assert kind.startswith("r:6:5: target: 'target.csv' does not end in one of .jsonl")


@pytest.mark.parametrize("key", ["raw", "target"])
def test_an_empty_file_is_a_fault(small, tmp_path, key):
    (tmp_path / "empty.jsonl").write_text("\n")
    override = f"stages.select.{key}=empty.jsonl"
    assert faults_of(small, override) == [f"override {override!r}: {key} is empty: its sources hold no rows"]
    assert faults_of(small, f"stages.select.{key}=[empty.jsonl, pool.jsonl]") == []


@pytest.mark.parametrize("key", ["raw", "target"])
def test_a_file_of_blank_texts_is_a_fault(small, tmp_path, key):
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n' * 4)
    [fault] = faults_of(small, f"stages.select.{key}=blank.jsonl")
    assert f"{key} is blank: none of its 4 rows holds a word" in fault


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
        ("stages.rl.task.options={values: [9, 1]}", "r:11:5", "values must be an inclusive range"),
        ("stages.rl.instances=100", "r:11:5", "nothing new in split 'train'"),
        ("stages.verify.task={name: lis, n: [1, 3]}", "override", "n must be a number of rows"),
        ("stages.verify.instances=100", "r:14:5", "nothing new in split 'test'"),
        ("stages.sft.adapter.alpha=.inf", "override", "alpha must be a positive number, got inf"),
        (
            "stages.sft.trainer.lr_scheduler_type=cosin",
            "r:9:5",
            "trl.SFTConfig refuses these values: cosin is not a valid",
        ),
        ("stages.rl.trainer.loss_type=grpoo", "override", "loss_type is 'grpoo'; allowed: 'grpo', 'bnpo'"),
        ("stages.rl.trainer.importance_sampling_level=seq", "override", "allowed: 'token', 'sequence'"),
        ("stages.rl.trainer.scale_rewards=std", "override", "allowed: 'group', 'batch', 'none'"),
        ("stages.rl.trainer.num_generations=3", "r:13:5", "trl.GRPOConfig refuses these values: "),
        ("stages.rl.trainer.num_generations=0", "r:13:5", "ZeroDivisionError: integer modulo by zero"),
    ],
)
def test_what_cannot_be_built_is_a_fault_with_its_reason(small, monkeypatch, override, place, fault):
    monkeypatch.setattr("krontune.rl.tasks.splits.MAX_TRIES", 300)
    narrow = ["stages.rl.task.options={values: [1, 4]}"] if "instances" in override else []
    found = faults_of(small, *narrow, override)
    assert any(one.startswith(place) and fault in one for one in found), found
    assert all("\n" not in one for one in found)


def test_a_reason_of_several_lines_stays_one_fault_of_one_line(small, monkeypatch):
    def refuse(**arguments):
        raise TypeError("no\n  such option")

    monkeypatch.setattr("trl.SFTConfig", refuse)
    assert faults_of(small) == ["r:9:5: trl.SFTConfig refuses these values: TypeError: no such option"]


def test_the_choices_are_those_that_trl_compares_with():
    """Fails when a release of TRL takes other losses, levels or scales than `check` does."""
    source = inspect.getsource(GRPOTrainer)
    for key, allowed in CHOICES.items():
        texts = set()
        for one, many in re.findall(rf'self\.{key} (?:== ("\w+")|in \[([^\]]+)\])', source):
            texts |= set(re.findall(r'"(\w+)"', one or many))
        assert texts == {value for value in allowed if isinstance(value, str)}, key
