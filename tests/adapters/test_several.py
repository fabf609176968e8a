"""Several adapters in one model: batches that mix them, and weighted sums."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, load_base

SIZES = (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits.float()


def layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def pair(base, shake, one=None, other=None):
    """A model with two adapters of random values, in eval mode."""
    one, other = ({"target_modules": ["q_proj", "up_proj"], "r": 4, "n_shapes": 2} | (c or {}) for c in (one, other))
    model = get_peft_model(base, MokaConfig(**one), adapter_name="one")
    model.add_adapter("other", MokaConfig(**other))
    shake(model, "one", seed=1), shake(model, "other", seed=2)
    return model.eval()


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_each_row_of_a_mixed_batch_goes_through_its_own_adapter(tiny_folder, tokens, shake, quantization):
    base, _ = load_base(tiny_folder, quantization, dtype=torch.float32, device="cpu")
    model = pair(base, shake, other={"target_modules": ["v_proj"], "r": 2, "gate": "none"})
    mixed = logits(model, tokens, adapter_names=["other", "__base__", "one"])
    expected = []
    for row, name in enumerate(["other", "__base__", "one"]):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(logits(model, tokens)[row])
        else:
            model.set_adapter(name)
            expected.append(logits(model, tokens)[row])
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[2]).abs().max() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_each_adapter_alone_does(tiny, tokens, shake, beams):
    model = pair(tiny, shake)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mixed = model.generate(tokens, adapter_names=["one", "other", "one"], **options)
    for row, name in enumerate(["one", "other", "one"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(tokens, **options)[row])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_mixed_batch_passes_the_encoder_before_its_rows_are_repeated_for_beams(tokens, shake, beams):
    widths = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in SIZES}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, init_std=0.2, **widths, **special)
    model = pair(BartForConditionalGeneration(config), shake, *[{"target_modules": ["q_proj", "fc1"]}] * 2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=tokens, adapter_names=["one", "other", "one"], **options)
    for row, name in enumerate(["one", "other", "one"]):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(input_ids=tokens, **options)[row])


def test_mixed_batches_that_cannot_be_are_refused(tiny, tokens, shake):
    model = pair(tiny, shake)
    with pytest.raises(AdapterError, match=r"non-existing adapter\(s\): third"):
        model(tokens, adapter_names=["one", "third", "one"])
    with pytest.raises(AdapterError, match="got 2 and 3"):
        model(tokens, adapter_names=["one", "other"])
    model.merge_adapter(["one"])
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        model(tokens, adapter_names=["one"] * 3)
    model.unmerge_adapter()
    assert not any(layer._forward_pre_hooks for layer in layers(model))
    with pytest.raises(AdapterError, match="training mode"):
        model.train()(tokens, adapter_names=["one"] * 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {}),
        ({"r": 7, "n_shapes": 3, "alpha": 2.0}, {"r": 7, "n_shapes": 3, "gate": "none"}),
        ({"r": 1, "n_shapes": 4, "alpha_pattern": {"q_proj": 0.3}}, {"r": 1, "n_shapes": 4}),
        ({"rank_pattern": {"q_proj": 5}}, {"rank_pattern": {"q_proj": 5}}),
        ({"identity": "A"}, {"identity": "A"}),
        ({"identity": "B"}, {"identity": "B"}),
        ({}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"gate": "none"}, {"gate": "none"}),
    ],
)
def test_a_weighted_sum_of_adapters_is_exact_and_reads_back(tiny_llama, tokens, shake, tmp_path, one, other):
    model = pair(tiny_llama(), shake, one, other)
    layers(model)[0].set_scale("one", 0.5)
    model.base_model.add_weighted_adapter(["one", "other"], [0.7, -1.3], "sum")
    for layer in layers(model):
        parts = [
            weight * layer.get_delta_weight(name)
            for name, weight in (("one", 0.7), ("other", -1.3))
            if name in layer.moka_A
        ]
        torch.testing.assert_close(layer.get_delta_weight("sum"), sum(parts), rtol=1e-4, atol=1e-4)
    model.set_adapter("sum")
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum")
    torch.testing.assert_close(logits(again, tokens), expected, rtol=1e-4, atol=1e-4)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".sum." in name and p.requires_grad)


def test_a_weighted_sum_takes_adapters_that_are_scaled_to_zero_or_merged(tiny, shake):
    model = pair(tiny, shake)
    for layer in layers(model):
        layer.set_scale("one", 0.0)
    model.merge_adapter(["other"])
    model.add_weighted_adapter(["one", "other"], [0.7, 2.0], "sum")
    for layer in layers(model):
        torch.testing.assert_close(layer.get_delta_weight("sum"), 2.0 * layer.get_delta_weight("other"))


def test_a_weighted_sum_over_a_bfloat16_base_is_as_exact(tiny_llama, shake):
    model = pair(tiny_llama().bfloat16(), shake)
    model.add_weighted_adapter(["one", "other"], [0.7, -1.3], "sum")
    for layer in layers(model):
        expected = 0.7 * layer.get_delta_weight("one") - 1.3 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({}, {"r": 5}, "differ in r: 4 and 5"),
        ({}, {"n_shapes": 3}, "differ in n_shapes"),
        ({}, {"identity": "A"}, "differ in identity"),
        ({}, {"shapes": [(8, 8), (4, 4)]}, "differ in their shapes for"),
        ({}, {"target_modules": ".*down_proj"}, "different expressions"),
        ({}, {"modules_to_save": ["norm"]}, "whole modules"),
    ],
)
def test_sums_that_would_not_be_exact_are_refused_and_leave_the_model(tiny, shake, one, other, words):
    model = pair(tiny, shake, one, other)
    with pytest.raises(AdapterError, match=words):
        model.base_model.add_weighted_adapter(["one", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"one", "other"}
    assert not any(".sum." in name for name, _ in model.named_parameters())


def test_sums_of_adapters_that_are_not_there_are_refused(tiny, shake):
    model = pair(tiny, shake)
    with pytest.raises(AdapterError, match="no adapter 'third'"):
        model.base_model.add_weighted_adapter(["one", "third"], [1.0, 1.0], "sum")
    with pytest.raises(AdapterError, match="an adapter 'one' already"):
        model.base_model.add_weighted_adapter(["one", "other"], [1.0, 1.0], "one")
    with pytest.raises(AdapterError, match="one weight an adapter"):
        model.base_model.add_weighted_adapter(["one", "other"], [1.0], "sum")
