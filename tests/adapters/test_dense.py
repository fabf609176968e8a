"""Dense weights for the time of a block."""

import pytest
import torch
from peft import get_peft_model

from krontune.adapters import MokaConfig, MokaLayer, dense_weights, load_base


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


@pytest.fixture(params=["nf4", "int8", None])
def model(request, tiny_folder, shake):
    base, _ = load_base(tiny_folder, request.param, device="cpu")
    return shake(get_peft_model(base, MokaConfig(target_modules="all-linear", r=4)), scale=0.1).eval()


def adapted_layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def test_the_logits_are_those_of_the_adapter_up_to_rounding(model, tokens):
    expected = logits(model, tokens)
    with model.disable_adapter():
        effect = (logits(model, tokens) - expected).norm()
    with dense_weights(model):
        inside = logits(model, tokens)
    assert (inside - expected).norm() < 0.03 * expected.norm() < 0.3 * effect


def test_float32_weights_are_nearer_than_bfloat16_ones(tiny_folder, tokens, shake):
    base, _ = load_base(tiny_folder, "nf4", dtype=torch.float32, device="cpu")
    model = shake(get_peft_model(base, MokaConfig(target_modules="all-linear")), scale=0.1).eval()
    expected = logits(model, tokens)
    with dense_weights(model, torch.float32):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-3, atol=1e-3)


def test_neither_the_quantised_layer_nor_the_factors_run_inside(model, tokens, monkeypatch):
    calls = []
    monkeypatch.setattr(MokaLayer, "update", lambda *_: calls.append("update"))
    for layer in adapted_layers(model):
        layer.base_layer.register_forward_pre_hook(lambda *_: calls.append("base"))
    with dense_weights(model):
        logits(model, tokens)
    assert not calls


def test_everything_is_as_before_after_the_block(model, tokens):
    expected = logits(model, tokens)
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    with dense_weights(model):
        logits(model, tokens)
    assert torch.equal(logits(model, tokens), expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".moka_" in name)


def test_everything_is_as_before_after_an_exception(model, tokens):
    expected = logits(model, tokens)
    with pytest.raises(KeyError), dense_weights(model):
        raise KeyError
    assert torch.equal(logits(model, tokens), expected)


def test_a_forward_that_another_library_put_on_the_layer_comes_back(model, tokens):
    layer = adapted_layers(model)[0]
    original, calls = layer.forward, []
    layer.forward = lambda x: calls.append(1) or original(x)
    with dense_weights(model):
        logits(model, tokens)
    assert not calls
    logits(model, tokens)
    assert calls


def test_generation_gives_the_same_tokens_where_rounding_does_not_decide(tiny_folder, tokens, shake):
    base, _ = load_base(tiny_folder, "nf4", dtype=torch.float32, device="cpu")
    model = shake(get_peft_model(base, MokaConfig(target_modules="all-linear")), scale=0.1).eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **options)
    with dense_weights(model, torch.float32):
        assert torch.equal(model.generate(tokens, **options), expected)


def test_the_embedded_model_says_the_same_inside(embedded):
    model, tokenizer = embedded
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with dense_weights(model):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_disabled_adapters_stay_disabled_inside(model, tokens):
    with model.disable_adapter():
        expected = logits(model, tokens)
        with dense_weights(model):
            inside = logits(model, tokens)
    assert (inside - expected).norm() < 0.03 * expected.norm()


def test_merged_adapters_run_as_they_are(model, tokens):
    model.merge_adapter()
    expected = logits(model, tokens)
    with dense_weights(model):
        assert torch.equal(logits(model, tokens), expected)


def test_a_quantised_model_without_an_adapter_runs_dense_too(tiny_folder, tokens):
    model, _ = load_base(tiny_folder, "nf4", device="cpu")
    expected = logits(model, tokens)
    with dense_weights(model):
        assert "forward" in vars(model.model.layers[0].mlp.up_proj)
        inside = logits(model, tokens)
    assert (inside - expected).norm() < 0.03 * expected.norm()
    assert not any("forward" in vars(module) for module in model.modules())


def test_adapters_may_be_switched_disabled_and_scaled_inside(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj", "up_proj"])), scale=0.1).eval()
    model.add_adapter("other", MokaConfig(target_modules=["q_proj"], r=2))
    shake(model, "other", seed=2, scale=0.3)

    def outputs():
        found = []
        for name in ("other", "default"):
            model.set_adapter(name)
            found.append(logits(model, tokens))
            with model.disable_adapter():
                found.append(logits(model, tokens))
            for layer in adapted_layers(model):
                layer.set_scale(name, 0.3)
            found.append(logits(model, tokens))
            for layer in adapted_layers(model):
                layer.set_scale(name, 1.0)
        return found

    expected = outputs()
    with dense_weights(model, torch.float32):
        inside = outputs()
    for one, other in zip(inside, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all((one - other).abs().max() > 1e-2 for one, other in zip(expected, expected[1:], strict=False))


def test_mixed_batches_and_merges_inside_give_what_they_give_outside(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"])), scale=0.3).eval()
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        expected = model(tokens, adapter_names=names).logits
        with dense_weights(model, torch.float32):
            assert torch.equal(model(tokens, adapter_names=names).logits, expected)
            model.merge_adapter()
            for layer in adapted_layers(model):
                layer.set_scale("default", 2.0)  # which merged weights do not follow
            torch.testing.assert_close(model(tokens).logits[0], expected[0], rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            for layer in adapted_layers(model):
                layer.set_scale("default", 1.0)
            torch.testing.assert_close(model(tokens).logits[0], expected[0], rtol=1e-4, atol=1e-4)
