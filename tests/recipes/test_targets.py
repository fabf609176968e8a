"""Which modules an adapter would adapt, on a model without weights."""

import time

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.adapters import AdapterError, MokaConfig
from krontune.adapters.layer import MokaLayer
from krontune.recipes import needs
from krontune.recipes.loader import load
from krontune.recipes.needs import notes
from krontune.recipes.preflight import check
from krontune.recipes.schema_model import Adapter, BaseModelSection
from krontune.recipes.targets import match, meta_model, skeleton

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def tiny(**changes):
    return skeleton(LlamaConfig(**(TINY | {"tie_word_embeddings": False} | changes)))


@pytest.fixture
def folder(small, tmp_path):
    """A folder with a model's configuration alone, in the working directory of the recipe `small`."""
    LlamaConfig(**TINY, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "tiny")
    return small


def faults_of(file, *overrides):
    return [str(fault).replace(str(file), "r") for fault in check(load(file, ["base.model=./tiny", *overrides]))]


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "n_shapes": 4},
        {"target_modules": r".*layers\.1\..*_proj", "exclude_modules": ["up_proj"], "shapes": "ladder"},
    ],
)
def test_the_modules_are_those_that_a_model_with_weights_gets(adapter):
    found = match(tiny(), Adapter(**adapter))
    config = MokaConfig(task_type="CAUSAL_LM", **adapter)
    real = get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False)), config)
    layers = {name: m for name, m in real.base_model.model.named_modules() if isinstance(m, MokaLayer)}
    assert sorted(found.modules) == sorted(layers)
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.parameters == sum(p.numel() for p in real.get_base_model().parameters()) - found.trainable
    for layer in layers.values():
        size = layer.out_features, layer.in_features
        assert found.shapes[size] == [tuple(stack.shape[1:]) for stack in layer.moka_A["default"]]
        assert found.counts[size] == sum((m.out_features, m.in_features) == size for m in layers.values())


def test_a_model_of_eight_billion_parameters_takes_seconds_and_no_memory():
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256
    )
    start = time.perf_counter()
    model = skeleton(config)
    found = match(model, Adapter(target_modules=["q_proj", "v_proj"]))
    assert time.perf_counter() - start < 8
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
    assert found.parameters == 8_030_261_248 and found.counts == {(4096, 4096): 32, (1024, 4096): 32}
    assert next(found.lines()).startswith("64 modules, ")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("target_modules=[q_porj]", "'q_porj' matches no module of the model; did you mean 'q_proj'?"),
        ("target_modules=[q_proj, self_attn.v_prj]", "'self_attn.v_prj' matches no module of the model; did you mean "),
        ("target_modules=[zzz]", "its linear ones are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        ("target_modules=q_proj", "a text is a regular expression over whole names"),
        ("target_modules=[lm_head]", "'lm_head' is the output layer: trainers multiply by its weight themselves"),
        ("target_modules=[norm]", "MoKA adapts linear layers, and 'model.norm' is of type LlamaRMSNorm"),
        (
            "exclude_modules=[up_prj]",
            "'up_prj' matches no module of the model; did you mean 'up_proj'",
        ),
        ("exclude_modules=[q_proj, v_proj]", "No modules were targeted for adaptation"),
    ],
)
def test_what_adapts_nothing_or_cannot_be_adapted_is_a_fault(folder, adapter, message):
    small = folder
    text = small.read_text().replace("stage: sft\n", "stage: sft\n    adapter: {r: 2}\n")
    small.write_text(text)
    tied = ["stages.sft.adapter." + adapter]
    if "lm_head" in adapter:
        LlamaConfig(**TINY, tie_word_embeddings=True).save_pretrained("tiny")
    [fault] = faults_of(small, *tied)
    assert message in fault


def test_all_wrong_names_are_found_at_once(folder):
    faults = faults_of(folder, "stages.sft.adapter={target_modules: [q_porj, v_porj], exclude_modules: [k_porj]}")
    assert [fault.split("'; ")[0] for fault in faults if "did you mean" in fault] != []
    assert sum("matches no module" in fault for fault in faults) == 3


def test_an_output_layer_of_its_own_is_a_fault(folder):
    LlamaConfig(**TINY, tie_word_embeddings=False).save_pretrained("tiny")
    [fault] = faults_of(folder, "stages.sft.adapter.target_modules=[lm_head]")
    assert "'lm_head' is the output layer: trainers multiply by its weight themselves" in fault


def test_a_size_without_factors_is_refused_with_the_factors_and_a_ladder_takes_it():
    model = {"intermediate_size": 127, "hidden_size": 61, "num_attention_heads": 1, "head_dim": 16}
    message = r"'model.layers.0.mlp.up_proj' has 127 outputs and 61 inputs.*127 = 127, 61 = 61"
    with pytest.raises(AdapterError, match=message):
        match(tiny(**model), Adapter(target_modules=["up_proj"]))
    assert match(tiny(**model), Adapter(target_modules=["up_proj"], shapes="ladder")).shapes == {(127, 61): [(1, 61)]}
    # One size of two with factors is enough for products of a higher rank.
    assert match(tiny(**model | {"hidden_size": 64}), Adapter(target_modules=["up_proj"])).trainable


def test_a_folder_whose_configuration_is_none_is_a_fault_of_the_model(folder, tmp_path):
    (tmp_path / "tiny" / "config.json").write_text("{}")
    [fault] = faults_of(folder)
    assert fault.startswith("override 'base.model=./tiny'") and "has a config.json that cannot be used" in fault


def test_a_model_of_the_hub_without_network_gives_a_note_and_no_fault(folder, monkeypatch):
    monkeypatch.setattr(needs, "hub_answers", lambda: False)
    monkeypatch.setattr("krontune.recipes.preflight._hub_faults", lambda repo, revision: iter(()))
    recipe = load(folder, ["base.model=somebody/some-model", "stages.sft.adapter.target_modules=[q_porj]"])
    assert check(recipe) == []
    assert "its modules, its context and its memory were not looked at" in " ".join(notes(recipe))


def test_a_configuration_in_the_cache_of_the_hub_is_enough(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "hub_answers", lambda: False)
    cache = tmp_path / "hub" / "models--somebody--some-model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    LlamaConfig(**TINY).save_pretrained(cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    base = BaseModelSection(model="somebody/some-model")
    assert meta_model(base).config.hidden_size == 64
