"""Merging into plain and quantised weights, and the two traps of quantised bases."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, export_merged, load_base

pytestmark = pytest.mark.filterwarnings("ignore:Merging into quantised weights", "ignore:Already following adapters")
QUANTIZATIONS = ["nf4", "fp4", "int8"]


def layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def quantised(folder, quantization, **options):
    model, _ = load_base(folder, quantization, device="cpu")
    return get_peft_model(model, MokaConfig(**({"target_modules": "all-linear", "r": 4} | options)))


def tensors_of(value, name=""):
    """Every tensor in a quantisation state, nested ones too."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (bnb.functional.QuantState, bnb.MatmulLtState)):
        for key, below in vars(value).items():
            yield from tensors_of(below, f"{name}.{key}")


def packed(model):
    """Copies of everything that the quantised layers hold."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            found[f"{name}.weight"] = module.weight.data.clone()
            for owner in (module, module.weight):
                for key in ("quant_state", "state", "CB", "SCB"):
                    for path, tensor in tensors_of(getattr(owner, key, None), f"{name}.{type(owner).__name__}.{key}"):
                        found[path] = tensor.clone()
    assert found
    return found


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(model, tokens):
    model.train()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"gate": "none"}, {"r": 7, "n_shapes": 3}, {"dropout": 0.3}])
def test_merged_output_is_the_unmerged_output(tiny, tokens, shake, options):
    base = logits(tiny, tokens)
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear", **options)), scale=0.1).eval()
    expected = logits(model, tokens)
    assert (expected - base).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), base, rtol=1e-4, atol=1e-4)


def test_disabling_a_merged_adapter_gives_the_base(tiny, tokens, shake):
    base = logits(tiny, tokens)
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear")), scale=0.1)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), base, rtol=1e-4, atol=1e-4)


def test_merging_twice_merges_once(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear")), scale=0.1)
    model.merge_adapter()
    expected = logits(model, tokens)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert torch.equal(logits(model, tokens), expected)


def test_merge_and_unload_leaves_a_plain_model(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear")), scale=0.1)
    expected = logits(model, tokens)
    plain = model.merge_and_unload(safe_merge=True)
    assert not layers(plain) and not any(".moka_" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain, tokens), expected, rtol=1e-4, atol=1e-4)


def test_safe_merge_refuses_weights_that_are_not_finite(tiny, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"])))
    layer = layers(model)[0]
    before = layer.base_layer.weight.clone()
    layer.moka_B["default"][0].data[0, 0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_safe_merge_over_a_quantised_base_leaves_it_as_it_was(tiny_folder, quantization):
    model = quantised(tiny_folder, quantization)
    before = packed(model)
    layers(model)[0].moka_gate["default"].logits.data[0] = float("nan")
    with pytest.raises(AdapterError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    after = packed(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_adapter_weight_gets_a_gradient_over_a_quantised_base(tiny_folder, tokens, shake, quantization):
    model = shake(quantised(tiny_folder, quantization), scale=0.1)
    grads = gradients(model, tokens)
    assert set(grads) == {name for name, _ in model.named_parameters() if ".moka_" in name}
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_merging_and_unmerging_leaves_every_bit_of_a_quantised_base(tiny_folder, tokens, shake, quantization):
    model = shake(quantised(tiny_folder, quantization), scale=0.1).eval()
    expected = logits(model, tokens)
    with model.disable_adapter():
        base = logits(model, tokens)
    before = packed(model)
    for _ in range(3):
        model.merge_adapter()
        merged = logits(model, tokens)
        model.unmerge_adapter()
        assert equal_states(packed(model), before)
        assert torch.equal(logits(model, tokens), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    assert (merged - expected).norm() < (merged - base).norm()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_adapters_merged_one_after_the_other_come_out_again(tiny_folder, tokens, shake, quantization):
    model = quantised(tiny_folder, quantization)
    model.add_adapter("other", MokaConfig(target_modules=["q_proj", "v_proj"], r=3))
    shake(model, scale=0.1), shake(model, "other", seed=2, scale=0.1)
    expected = logits(model.eval(), tokens)
    before = packed(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert layers(model)[0].merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert equal_states(packed(model), before)
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_merge_before_the_first_forward_comes_out_again(tiny_folder, tokens, shake, quantization):
    untouched = shake(quantised(tiny_folder, quantization), scale=0.1)
    model = shake(quantised(tiny_folder, quantization), scale=0.1)
    model.merge_adapter()
    logits(model, tokens)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), logits(untouched, tokens))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_that_was_merged_can_be_moved_and_copied(tiny_folder, tokens, shake, quantization):
    model = shake(quantised(tiny_folder, quantization), scale=0.1)
    expected = logits(model, tokens)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(copy.deepcopy(model).to("cpu"), tokens), expected)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_after_a_merge_cycle_are_those_before(tiny_folder, tokens, shake, quantization):
    model = shake(quantised(tiny_folder, quantization), scale=0.1)
    before = gradients(model, tokens)
    model.merge_adapter()
    model.unmerge_adapter()
    after = gradients(model, tokens)
    assert equal_states(after, before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradients_after_generating_are_those_before(tiny_folder, tokens, shake, quantization):
    model = shake(quantised(tiny_folder, quantization), scale=0.1)
    before = gradients(model, tokens)
    model.eval()
    model.generate(tokens, max_new_tokens=2, do_sample=False)
    logits(model, tokens)
    assert equal_states(gradients(model, tokens), before)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks weights only where there is AVX512_BF16")
def test_without_the_cure_an_eval_forward_takes_gradients_away(tiny_folder, tokens, shake):
    """The trap that `keep_trainable_layout` closes: if this fails, bitsandbytes has closed it itself."""
    model = shake(quantised(tiny_folder, "nf4"), scale=0.1)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True
    before = gradients(model, tokens)
    logits(model.eval(), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = gradients(model, tokens)
    first_a = next(name for name in before if "layers.0.self_attn.q_proj.moka_A" in name)
    assert (after[first_a] - before[first_a]).norm() > 0.5 * before[first_a].norm()


def test_merging_into_four_bits_loses_a_small_update_and_exporting_keeps_it(tiny_folder, tokens, shake, tmp_path):

    model = shake(quantised(tiny_folder, "nf4"), scale=0.05).eval()
    expected = logits(model, tokens)
    with model.disable_adapter():
        effect = (expected - logits(model, tokens)).norm()
    exported = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path, dtype=torch.float32))
    with pytest.warns(UserWarning, match="export_merged"):
        warnings.simplefilter("default")
        model.merge_adapter()
    assert (logits(exported, tokens) - expected).norm() < 0.2 * effect
    assert (logits(model, tokens) - expected).norm() > 0.7 * effect


@pytest.mark.parametrize("quantization", [*QUANTIZATIONS, None])
def test_a_thousand_merge_cycles_leave_every_bit(tiny_folder, shake, quantization):
    """As many as the weight syncs of a long run. Plain weights are bfloat16, where adding and taking away drifts."""
    model, _ = load_base(tiny_folder, quantization, device="cpu")
    model = shake(get_peft_model(model, MokaConfig(target_modules=["q_proj"], layers_to_transform=[0])), scale=0.3)
    layer = layers(model)[0]
    base = layer.base_layer
    before = packed(model) if quantization else {"weight": base.weight.clone()}
    parameter = base.weight
    for _ in range(1000):
        layer.merge()
        assert layer.merged
        layer.unmerge()
    after = packed(model) if quantization else {"weight": base.weight}
    assert all(torch.equal(after[name], before[name]) for name in before)  # int8 fills in a part at its first use
    assert base.weight is parameter


def test_unmerging_follows_a_model_that_was_moved_to_another_dtype(tiny, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"])))
    weight = layers(model)[0].base_layer.weight.clone()
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    assert torch.equal(layers(model)[0].base_layer.weight, weight.bfloat16())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_merging_into_four_bits_warns_with_the_loss_that_it_measured(tiny_folder, shake, scale):
    model = shake(quantised(tiny_folder, "nf4"), scale=scale)
    before = {layer: layer.base_matrix() for layer in layers(model)}
    with pytest.warns(UserWarning, match="the error is") as caught:
        model.merge_adapter()
    messages = [str(warning.message) for warning in caught if "the error is" in str(warning.message)]
    assert len(messages) == 1
    lost = sum((layer.base_matrix() - w - layer.delta_matrix("default")).square().sum() for layer, w in before.items())
    update = sum(layer.delta_matrix("default").square().sum() for layer in before)
    assert f"the error is {(lost / update).sqrt():.0%} of the update" in messages[0]
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="the error is"):
        model.merge_and_unload()


def test_merging_into_plain_weights_does_not_warn(tiny, shake):
    model = shake(get_peft_model(tiny, MokaConfig()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Merging into")
        model.merge_adapter()
