"""Bases quantised by HQQ, torchao, GPTQ and AWQ, where those packages are installed."""

import importlib

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, dense_weights, export_merged

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


def gptq_base(folder):
    return packed_by_gptqmodel(folder, "torch", "TorchLinear")


def awq_base(folder):
    return packed_by_gptqmodel(folder, "torch_awq", "AwqTorchLinear")


def packed_by_gptqmodel(folder, module, name):
    """Each linear layer rounded to the nearest of 16 levels a group; the calibration changes only the levels."""
    pytest.importorskip("optimum"), pytest.importorskip("gptqmodel")
    kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for path, linear in list(model.named_modules()):
        if path.endswith("_proj"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, packed(kind, linear))
    return model


def packed(kind, linear, group=32):
    m, n = linear.weight.shape
    options = {"bits": 4, "group_size": group, "sym": False, "desc_act": False, "in_features": n, "out_features": m}
    layer = kind(**options, bias=False, pack_dtype=torch.int32, register_buffers=False)
    groups = linear.weight.detach().view(m, -1, group)
    scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()  # (m, n / group)
    layer.pack(linear, scales, (-groups.amin(-1) / scales).round(), torch.arange(n, dtype=torch.int32) // group)
    layer.post_init()
    return layer


@pytest.fixture(params=[hqq_base, torchao_base])
def load(request, tiny_folder):
    return lambda: request.param(tiny_folder)


@pytest.fixture(params=[gptq_base, awq_base])
def load_forward_only(request, tiny_folder):
    return lambda: request.param(tiny_folder)


def starts_trains_and_reads_back(load, tokens, shake, tmp_path):
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


def test_the_adapter_starts_at_the_base_trains_and_reads_back(load, tokens, shake, tmp_path):
    starts_trains_and_reads_back(load, tokens, shake, tmp_path)


def test_the_adapter_does_so_over_gptq_and_awq_too(load_forward_only, tokens, shake, tmp_path):
    starts_trains_and_reads_back(load_forward_only, tokens, shake, tmp_path)


def test_over_gptq_and_awq_each_layer_gives_the_base_and_the_update(load_forward_only, tiny_folder, shake):
    model = shake(get_peft_model(load_forward_only(), MokaConfig(target_modules=["q_proj", "down_proj"], r=4)))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MokaLayer):
            assert layer.quantization_backend.backend_name == "gptq"  # PEFT tells the two apart by nothing else
            x = torch.randn(600, layer.in_features)
            rounded = layer.base_layer(x)
            exact = plain.get_submodule(name)(x)
            assert 0.01 < (rounded - exact).norm() / exact.norm() < 0.2
            update = x @ layer.get_delta_weight("default").T
            torch.testing.assert_close(layer(x) - rounded, update, rtol=1e-3, atol=1e-3)


def test_what_needs_the_weight_is_refused_over_gptq_and_awq(load_forward_only, tokens, shake, tmp_path):
    model = shake(get_peft_model(load_forward_only(), MokaConfig(target_modules=["q_proj"], r=4)))
    expected = logits(model, tokens)
    with pytest.raises(AdapterError, match="TorchLinear.*cannot be de-quantised"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="TorchLinear.*cannot be de-quantised"):
        export_merged(model, tmp_path)
    with pytest.raises(AdapterError, match="init_weights='nearest' needs"):
        get_peft_model(load_forward_only(), MokaConfig(init_weights="nearest"))
    with dense_weights(model):
        assert torch.equal(logits(model, tokens), expected)  # such layers run as they are
    assert torch.equal(logits(model, tokens), expected)


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
