"""Exported checkpoints against the adapted model."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from krontune.adapters import AdapterError, BaseModelError, MokaConfig, export_merged, load_base


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def adapted(model, shake, **options):
    options = {"target_modules": "all-linear", "r": 4} | options
    return shake(get_peft_model(model, MokaConfig(**options)), scale=0.1).eval()


def read(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("quantization", [None, "nf4", "fp4", "int8"])
def test_the_export_gives_the_logits_of_the_adapted_model(tiny_folder, tokens, shake, tmp_path, quantization):
    base, _ = load_base(tiny_folder, quantization, dtype=torch.float32, device="cpu")
    model = adapted(base, shake)
    expected = logits(model, tokens)
    plain = read(export_merged(model, tmp_path, dtype=torch.float32))
    # int8 rounds the activations too, which the plain model does not
    tolerance = 0.05 if quantization == "int8" else 1e-3
    assert (logits(plain, tokens) - expected).norm() < tolerance * expected.norm()
    assert torch.equal(logits(model, tokens), expected)  # and the model is as it was


def test_the_export_is_a_plain_checkpoint_in_bfloat16(tiny_folder, shake, tmp_path):
    base, _ = load_base(tiny_folder, "nf4", device="cpu")
    folder = export_merged(adapted(base, shake), tmp_path / "new" / "folder")
    config = json.loads((folder / "config.json").read_text())
    assert folder == tmp_path / "new" / "folder"
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert read(folder).state_dict().keys() == read(tiny_folder).state_dict().keys()
    assert {value.dtype for value in read(folder).state_dict().values()} == {torch.bfloat16}


def test_biases_of_the_base_are_kept(tiny_llama, tokens, shake, tmp_path):
    base = tiny_llama(attention_bias=True)
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model = adapted(base, shake)
    expected = logits(model, tokens)
    torch.testing.assert_close(
        logits(read(export_merged(model, tmp_path, torch.float32)), tokens), expected, rtol=1e-4, atol=1e-4
    )


def test_all_active_adapters_are_merged(tiny, tokens, shake, tmp_path):
    model = adapted(tiny, shake)
    model.add_adapter("other", MokaConfig(target_modules=["v_proj", "o_proj"], r=2))
    shake(model, "other", seed=3, scale=0.1)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, tokens)
    plain = read(export_merged(model, tmp_path, dtype=torch.float32))
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_output_layer_trained_in_full_is_untied_from_the_embedding(tiny_llama, tokens, shake, tmp_path):
    model = adapted(tiny_llama(tie_word_embeddings=True), shake, target_modules=["q_proj"], modules_to_save=["lm_head"])
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight, std=0.2)
    expected = logits(model, tokens)
    plain = read(export_merged(model, tmp_path, dtype=torch.float32))
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-4)
    assert not plain.config.tie_word_embeddings


def test_tied_weights_that_are_not_adapted_stay_tied(tied_folder, tokens, shake, tmp_path):
    base, _ = load_base(tied_folder, "nf4", device="cpu")
    plain = read(export_merged(adapted(base, shake), tmp_path))
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_quantised_layers_without_an_adapter_are_de_quantised_too(tiny_folder, tokens, shake, tmp_path):
    base, _ = load_base(tiny_folder, "nf4", dtype=torch.float32, device="cpu")
    model = adapted(base, shake, target_modules=["q_proj"])
    expected = logits(model, tokens)
    plain = read(export_merged(model, tmp_path, dtype=torch.float32))
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_modules_trained_in_full_are_written_as_trained(tiny, tokens, shake, tmp_path, module):
    model = adapted(tiny, shake, target_modules=["q_proj"], modules_to_save=[module])
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    expected = logits(model, tokens)
    plain = read(export_merged(model, tmp_path, dtype=torch.float32))
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_folder_is_merged_into_its_base(tiny_folder, tokens, shake, tmp_path, quantization):
    base, _ = load_base(tiny_folder, quantization, dtype=torch.float32, device="cpu")
    model = adapted(base, shake)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, tokens)
    out = export_merged(tmp_path / "adapter", tmp_path / "out", torch.float32, quantization=quantization)
    torch.testing.assert_close(logits(read(out), tokens), expected, rtol=1e-3, atol=1e-3)
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"] == [14, 15, 16]


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="adapter_config.json"):
        export_merged(tmp_path, tmp_path / "out")


def test_an_adapter_that_does_not_name_its_base_is_refused(tiny, tmp_path):
    tiny.name_or_path = ""
    tiny.config._name_or_path = ""
    model = get_peft_model(tiny, MokaConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="which base model"):
        export_merged(tmp_path, tmp_path / "out")


def test_an_adapter_whose_base_has_gone_is_refused(tiny, tmp_path):
    model = get_peft_model(tiny, MokaConfig())
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    model.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="does not exist"):
        export_merged(tmp_path, tmp_path / "out")


def test_models_that_cannot_be_merged_are_refused_before_anything_is_written(tiny_llama, shake, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="not MoKA's.*Linear"):
        export_merged(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), out)
    model = adapted(tiny_llama(), shake)
    with model.disable_adapter(), pytest.raises(AdapterError, match="no active MoKA adapter"):
        export_merged(model, out)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        export_merged(model, out)
    assert not out.exists()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_checkpoint_is_written_quantised_again_on_request(tiny_folder, tokens, shake, tmp_path, quantization):
    base, _ = load_base(tiny_folder, "nf4", dtype=torch.float32, device="cpu")
    model = adapted(base, shake)
    expected = logits(model, tokens)
    with model.disable_adapter():
        effect = (logits(model, tokens) - expected).norm()
    folder = export_merged(model, tmp_path, torch.float32, requantize=quantization)
    again = read(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["load_in_4bit"] == (
        quantization == "nf4"
    )
    assert again.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert (logits(again, tokens) - expected).norm() < {"nf4": 0.7, "int8": 0.3}[quantization] * effect


def test_the_export_makes_no_second_model_in_float32(tiny_llama, shake, tmp_path, monkeypatch):
    made = []
    model = adapted(tiny_llama().bfloat16(), shake)
    kind = type(model.get_base_model())
    start = kind.__init__
    monkeypatch.setattr(kind, "__init__", lambda self, *a, **k: (start(self, *a, **k), made.append(self))[0])
    devices = []
    load = kind.load_state_dict
    monkeypatch.setattr(
        kind,
        "load_state_dict",
        lambda self, *a, **k: (devices.append({p.device.type for p in self.parameters()}), load(self, *a, **k))[1],
    )
    export_merged(model, tmp_path)
    assert len(made) == 1 and devices == [{"meta"}]


def test_an_adapter_over_the_embedded_model_is_exported_from_its_folder(embedded, tmp_path):
    base, _ = embedded
    model = get_peft_model(base, MokaConfig(layers_to_transform=[0], r=2, init_weights=False))
    expected = model.base_model.model.model.layers[0].self_attn.q_proj.delta_matrix("default")
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    plain = read(export_merged(tmp_path / "adapter", tmp_path / "out", torch.float32))
    published, _ = load_base("smollm2-135m", None, dtype=torch.float32, device="cpu")
    change = plain.model.layers[0].self_attn.q_proj.weight - published.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(change.detach(), expected.detach(), rtol=1e-3, atol=1e-5)
