"""Registration with PEFT, and adapters that are saved and read again."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import hotswap
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from krontune.adapters import (
    AdapterError,
    MokaConfig,
    MokaModel,
    hotswap_adapter,
    layer,
    register,
    registration,
)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def saved(tiny_folder, tokens, shake, tmp_path):
    """(folder of a trained-like adapter, the logits it gives)."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = shake(get_peft_model(base, MokaConfig(target_modules="all-linear", r=4, n_shapes=3, alpha=2.0)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model.eval(), tokens)


def in_a_fresh_process(code, *arguments):
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    return run.returncode, run.stdout.strip(), run.stderr


def test_a_saved_adapter_gives_the_same_logits(saved, tiny_folder, tokens):
    folder, expected = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    assert torch.equal(logits(model, tokens), expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_saved_adapter_can_be_trained_on(saved, tiny_folder, tokens):
    folder, _ = saved
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".moka_" in n)


def test_low_cpu_mem_usage_and_a_second_adapter(saved, tiny_folder, tokens):
    folder, expected = saved
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model = PeftModel.from_pretrained(base, folder, adapter_name="one", low_cpu_mem_usage=True)
    model.load_adapter(folder, adapter_name="two", low_cpu_mem_usage=True)
    assert torch.equal(logits(model, tokens), expected)
    model.set_adapter("two")
    assert torch.equal(logits(model, tokens), expected)


def test_transformers_loads_and_adds_adapters_itself(saved, tiny_folder, tokens):
    folder, expected = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), tokens), expected)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    base = logits(model, tokens)
    model.load_adapter(folder)
    assert torch.equal(logits(model, tokens), expected)
    model.disable_adapters()
    assert torch.equal(logits(model, tokens), base)


def test_a_fresh_process_that_imports_the_room_reads_the_adapter(saved, tokens, tmp_path):
    folder, expected = saved
    torch.save({"tokens": tokens, "expected": expected}, tmp_path / "check.pt")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(PeftConfig.from_pretrained(folder)))
    code = """
import sys, pickle, torch, krontune.adapters
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(1)
check = torch.load(sys.argv[2])
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(model(check["tokens"]).logits, check["expected"])
print(pickle.load(open(sys.argv[3], "rb")).peft_type.name)
"""
    status, out, err = in_a_fresh_process(code, folder, tmp_path / "check.pt", tmp_path / "config.pickle")
    assert (status, out) == (0, "MOKA"), err


def test_a_peft_with_another_moka_is_refused_at_import():
    code = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
class Foreign: pass
PEFT_TYPE_TO_CONFIG_MAPPING["MOKA"] = Foreign
import krontune.adapters
"""
    status, _, err = in_a_fresh_process(code)
    assert status == 1
    assert "RuntimeError: peft" in err and "already has a tuner named MOKA (__main__.Foreign)" in err


def test_registration_is_idempotent():
    register(), register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MOKA] is MokaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOKA] is MokaModel
    assert [member.name for member in PeftType].count("MOKA") == 1


def test_the_enum_member_is_a_full_one():
    member = PeftType.MOKA
    assert (member.name, member.value) == ("MOKA", "MOKA")
    assert isinstance(member, PeftType) and member == "MOKA"
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert PeftType("MOKA") is member and PeftType["MOKA"] is member
    assert member in list(PeftType) and json.dumps(member) == '"MOKA"'


def test_the_config_survives_json(tmp_path):
    config = MokaConfig(
        r=4,
        shapes=[(8, 16), (4, 2)],
        gate="none",
        dropout=0.1,
        target_modules=["q_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 0.5},
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, MokaConfig)
    assert [tuple(shape) for shape in again.shapes] == config.shapes
    for name in (
        "r",
        "alpha",
        "gate",
        "dropout",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "peft_type",
    ):
        assert getattr(again, name) == getattr(config, name)


def test_an_adapter_keeps_its_shapes_where_the_choice_of_shapes_has_changed(saved, tokens, monkeypatch):
    folder, expected = saved
    resolved = json.loads((folder / "adapter_config.json").read_text())["resolved_shapes"]
    assert set(resolved) == {"64x64:3", "32x64:3", "128x64:3", "64x128:3"}
    monkeypatch.setattr(layer, "balanced_shapes", lambda n_out, n_in, n_shapes: [(1, n_in)])
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder), tokens), expected)


def test_an_adapter_of_balanced_shapes_and_no_alpha_keeps_its_scale(tiny_llama, tokens, shake, tmp_path):
    """As every adapter was saved before ladders were there."""
    model = shake(get_peft_model(tiny_llama(), MokaConfig(target_modules=["q_proj"], r=6, shapes="balanced")))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["shapes"], written["alpha"]) == ("balanced", None)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    attention: Any = again.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.moka_alpha["default"] == 6.0
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_explicit_shapes_of_a_config_win_over_those_of_an_earlier_model(tiny_llama):
    config = MokaConfig(target_modules=["q_proj"], r=2)
    get_peft_model(tiny_llama(), config)
    config.shapes = [(4, 2)]
    model = get_peft_model(tiny_llama(), config)
    moka = model.base_model.model.model.layers[0].self_attn.q_proj
    assert [tuple(a.shape) for a in moka.moka_A["default"]] == [(2, 4, 2)]


def test_only_the_adapter_and_the_modules_to_save_are_written(tiny, tmp_path):
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in names
    assert all(".q_proj.moka_" in name for name in names - {"base_model.model.lm_head.weight"})
    assert "base_model.model.model.layers.1.self_attn.q_proj.moka_gate.logits" in names


@pytest.mark.parametrize(("version", "warned"), [("0.21.2", False), ("0.20.1", True), ("0.22.0", True), ("1.0", True)])
def test_a_peft_outside_the_tested_range_is_named_with_the_range(monkeypatch, version, warned):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.MOKA)
    monkeypatch.setattr(registration, "register_peft_method", lambda **_: None)
    monkeypatch.setattr(peft, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        register()
    words = f"peft >= 0.21, < 0.22, and peft {version} is installed"
    assert [words in str(warning.message) for warning in caught] == [True] * warned


def test_a_process_that_imports_nothing_reads_a_pickled_model_and_its_config(tiny, shake, tokens, tmp_path):
    """As in a spawned worker, a pickle is what comes first, and must bring the registration along."""
    model = shake(get_peft_model(tiny, MokaConfig(r=3, target_modules=["q_proj"])))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, tokens, logits(model, tokens))))
    code = """
import pickle, sys, torch
torch.set_num_threads(1)
model, tokens, expected = pickle.load(open(sys.argv[1], "rb"))
from peft import get_peft_config
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, expected)
print(model.peft_config["default"].peft_type.name, get_peft_config({"peft_type": "MOKA", "r": 7}).r)
"""
    status, out, err = in_a_fresh_process(code, tmp_path / "model.pickle")
    assert (status, out) == (0, "MOKA 7"), err


SPAWNING = """
import sys

class Rows:
    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
    def __len__(self):
        return len(self.tokens)
    def __getitem__(self, row):
        return answers(self.model, self.tokens[row : row + 1])

def answers(model, tokens):
    import torch
    from peft import get_peft_config, get_peft_model
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = model(tokens).logits[0]
    config = model.peft_config["default"]
    fresh = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), type(config)(r=1, target_modules=["0"]))
    kinds = [config.peft_type, get_peft_config({"peft_type": "MOKA"}).peft_type, fresh.peft_config["default"].peft_type]
    return logits, [kind.name for kind in kinds]

def main():
    import multiprocessing, torch
    from torch.utils.data import DataLoader
    model, tokens, expected = torch.load(sys.argv[1], weights_only=False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = [pool.apply(answers, (model, tokens[:1]))]
    loader = DataLoader(Rows(model, tokens), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    found += loader
    for (logits, kinds), wanted in zip(found, [expected[0], *expected], strict=True):
        torch.testing.assert_close(logits, wanted)
        assert kinds == ["MOKA"] * 3
    print(len(found))

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_spawned_workers_of_multiprocessing_and_of_a_data_loader_use_the_model(tiny, shake, tokens, tmp_path):
    """The workers import the script, in which only pickles name krontune."""
    model = shake(get_peft_model(tiny, MokaConfig(r=3, target_modules=["q_proj"], shapes_pattern={"q_proj": "ladder"})))
    torch.save((model, tokens, logits(model, tokens)), tmp_path / "model.pt")
    (tmp_path / "spawn.py").write_text(SPAWNING)
    command = [sys.executable, str(tmp_path / "spawn.py"), str(tmp_path / "model.pt")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout.strip()) == (0, "4"), run.stderr


def test_the_config_and_the_model_survive_copying_and_pickling_in_place(tiny, shake, tokens):
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "shapes_pattern": {"q_proj": [(8, 4)]}}
    model = shake(get_peft_model(tiny, MokaConfig(**options)))
    expected = logits(model, tokens)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.peft_config["default"] == model.peft_config["default"]
        assert again.peft_config["default"].peft_type is PeftType.MOKA
        assert torch.equal(logits(again, tokens), expected)
        with torch.no_grad():
            again.base_model.model.model.layers[0].self_attn.q_proj.moka_B["default"][0].zero_()
        assert not torch.equal(logits(again, tokens), expected) and torch.equal(logits(model, tokens), expected)
    config = MokaConfig(**options)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_importing_anew_registers_the_new_classes_under_the_same_member():
    code = """
import sys, krontune.adapters as first
from peft.utils.peft_types import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
member = PeftType.MOKA
for name in [name for name in sys.modules if name.startswith("krontune")]:
    del sys.modules[name]
import krontune.adapters as second
assert PeftType.MOKA is member and [m.name for m in PeftType].count("MOKA") == 1
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is second.MokaConfig is not first.MokaConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[member] is second.MokaModel
"""
    status, _, err = in_a_fresh_process(code)
    assert status == 0, err


def test_modules_to_save_come_back_with_the_adapter(tiny_llama, tokens, shake, tmp_path):
    model = shake(get_peft_model(tiny_llama(), MokaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])))
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_transformers_own_add_adapter_trains_and_saves(tiny_llama, tokens, shake, tmp_path):
    model = tiny_llama()
    base = logits(model, tokens)
    model.add_adapter(MokaConfig(r=3, target_modules=["q_proj"]), adapter_name="mine")
    assert torch.equal(logits(model, tokens), base)
    shake(model, "mine")
    expected = logits(model, tokens)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".moka_" in name)
    model.save_pretrained(tmp_path)
    again = tiny_llama()
    again.load_adapter(tmp_path, adapter_name="again")
    assert torch.equal(logits(again, tokens), expected)


def test_a_hot_swap_writes_the_saved_adapter_into_the_tensors_that_are_there(saved, tiny_folder, tokens, shake):
    folder, expected = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    shake(model, seed=9)
    with pytest.raises(ValueError, match="MOKA was passed"):
        hotswap.hotswap_adapter(model, folder, "default")
    held = [p for name, p in model.named_parameters() if ".moka_" in name]
    assert not torch.allclose(logits(model, tokens), expected)
    hotswap_adapter(model, folder)
    assert torch.equal(logits(model, tokens), expected)
    assert all(p is q for p, q in zip(held, (p for n, p in model.named_parameters() if ".moka_" in n), strict=True))


@pytest.mark.slow
def test_a_hot_swap_does_not_compile_a_compiled_model_again(saved, tiny_folder, tokens, shake):
    folder, expected = saved
    model = shake(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder), seed=9)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    assert not torch.allclose(logits(compiled, tokens), expected)
    graphs = counter.frame_count
    hotswap_adapter(model, folder)
    torch.testing.assert_close(logits(compiled, tokens), expected, rtol=1e-4, atol=1e-4)
    assert graphs > 0 and counter.frame_count == graphs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 3.0}, "has alpha=2.0, and 'default' has 3.0"),
        ({"gate": "none"}, "has gate='softmax'"),
        ({"r": 5}, "has r=4"),
        ({"shapes": [(4, 4)]}, "has shapes='balanced'"),
        ({"target_modules": ["q_proj"]}, "has not the tensors of 'default': .*moka_A"),
    ],
)
def test_a_hot_swap_of_adapters_that_differ_is_refused_and_leaves_the_model(saved, tiny, tokens, shake, changes, words):
    folder, _ = saved
    options = {"target_modules": "all-linear", "r": 4, "n_shapes": 3, "alpha": 2.0} | changes
    model = shake(get_peft_model(tiny, MokaConfig(**options)))
    expected = logits(model, tokens)
    with pytest.raises(AdapterError, match=words):
        hotswap_adapter(model, folder)
    assert torch.equal(logits(model, tokens), expected)


def test_a_hot_swap_needs_an_unmerged_moka_adapter_and_a_saved_one(saved, tiny, tmp_path):
    folder, _ = saved
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear", r=4, n_shapes=3, alpha=2.0))
    with pytest.raises(AdapterError, match="no MoKA adapter 'other'"):
        hotswap_adapter(model, folder, "other")
    peft.LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="type PeftType.LORA"):
        hotswap_adapter(model, tmp_path)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        hotswap_adapter(model, folder)


def test_an_adapter_that_started_at_the_nearest_sum_reads_back_for_training_without_memory(
    tiny_llama, tokens, shake, tmp_path
):
    model = shake(get_peft_model(tiny_llama(), MokaConfig(r=3, init_weights="nearest")))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
