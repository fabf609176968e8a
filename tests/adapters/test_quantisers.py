"""Bases quantised by HQQ and torchao, where those packages are installed."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from krontune.adapters import MokaConfig, MokaLayer, export_merged

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def hqq_base(folder):
    """transformers refuses HQQ on a CPU, so the linear layers are put in place by hand."""
    core = pytest.importorskip("hqq.core.quantize")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, linear in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, child = name.rpartition(".")
            options = core.BaseQuantizeConfig(nbits=4, group_size=32)
            packed = core.HQQLinear(linear, options, compute_dtype=torch.float32, device="cpu")
            setattr(model.get_submodule(parent), child, packed)
    return model


def torchao_base(folder):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.fixture(params=[hqq_base, torchao_base])
def load(request, tiny_folder):
    return lambda: request.param(tiny_folder)


def test_the_adapter_starts_at_the_base_trains_and_reads_back(load, tokens, shake, tmp_path):
    base = load()
    expected = logits(base, tokens)
    model = get_peft_model(base, MokaConfig(target_modules=["q_proj", "up_proj"], r=4))
    torch.testing.assert_close(logits(model, tokens), expected)
    shake(model, scale=0.2)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if ".moka_" in name)
    adapted = logits(model, tokens)
    assert (adapted - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path), tokens), adapted)


def test_merging_and_unmerging_leaves_every_bit(load, tokens, shake):
    model = shake(get_peft_model(load(), MokaConfig(target_modules=["q_proj", "up_proj"], r=4)), scale=0.2)
    expected = logits(model, tokens)
    weights = [layer.base_matrix() for layer in layers(model)]
    with model.disable_adapter():
        effect = (logits(model, tokens) - expected).norm()
    for _ in range(3):
        model.merge_adapter()
        assert (logits(model, tokens) - expected).norm() < 0.8 * effect
        model.unmerge_adapter()
        assert torch.equal(logits(model, tokens), expected)
    assert all(torch.equal(layer.base_matrix(), w) for layer, w in zip(layers(model), weights, strict=True))


def test_the_export_is_a_plain_checkpoint(load, tokens, shake, tmp_path):
    model = shake(get_peft_model(load(), MokaConfig(target_modules=["q_proj", "up_proj"], r=4)), scale=0.2)
    expected = logits(model, tokens)
    plain = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path, torch.float32))
    assert (logits(plain, tokens) - expected).norm() < 0.02 * expected.norm()


def test_a_bias_survives_a_merge(shake, tiny_llama, tokens, tmp_path):
    base = tiny_llama(attention_bias=True)
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    base.save_pretrained(tmp_path)
    model = shake(get_peft_model(hqq_base(tmp_path), MokaConfig(target_modules=["q_proj"])), scale=1e-4)
    expected = logits(model, tokens)
    assert (logits(model.merge_and_unload(), tokens) - expected).norm() < 0.2 * expected.norm()
