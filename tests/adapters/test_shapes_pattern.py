"""Shapes by module, `shapes_pattern`: which apply where, and that a saved adapter comes back with them."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, layer

EVERY_KIND = {"q_proj": "ladder", r"layers\.1\.self_attn\.v_proj": [(8, 16), (4, 2)], "down_proj": "balanced"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MokaLayer)}


def shapes_of(model, end):
    (moka,) = (module for name, module in layers(model).items() if name.endswith(end))
    return [tuple(a.shape[1:]) for a in moka.moka_A["default"]]


def config(**changes):
    options = {"r": 4, "n_shapes": 3, "shapes": [(4, 4)], "target_modules": TARGETS, "shapes_pattern": EVERY_KIND}
    return MokaConfig(**options | changes)


def test_each_module_takes_the_shapes_of_its_pattern_and_the_others_those_of_the_config(tiny):
    model = get_peft_model(tiny, config())
    assert shapes_of(model, "layers.0.self_attn.q_proj") == [(1, 64), (2, 32), (4, 16)]
    assert shapes_of(model, "layers.0.self_attn.v_proj") == [(4, 4)]
    assert shapes_of(model, "layers.1.self_attn.v_proj") == [(8, 16), (4, 2)]
    assert shapes_of(model, "layers.1.mlp.down_proj") == layer.balanced_shapes(64, 128, 3)
    resolved = model.peft_config["default"].resolved_shapes
    assert set(resolved) == {
        "64x64:3-ladder:q_proj",
        "32x64:3",
        r"32x64:3:layers\.1\.self_attn\.v_proj",
        "64x128:3:down_proj",
    }


def test_a_ladder_by_pattern_has_the_scale_and_the_start_of_a_ladder(tiny_llama):
    by_pattern = layers(get_peft_model(tiny_llama(), config(r=3)))["base_model.model.model.layers.0.self_attn.q_proj"]
    assert by_pattern.moka_alpha["default"] == 6.0
    assert by_pattern.moka_A["default"][2].abs().max() <= 64**-0.5  # by its own width of 16 it would reach 1 / 4
    balanced = layers(get_peft_model(tiny_llama(), config(r=3, shapes="ladder")))
    assert balanced["base_model.model.model.layers.0.mlp.down_proj"].moka_alpha["default"] == 3.0


def test_a_new_process_reads_the_shapes_of_each_module(tiny_folder, tiny_llama, tokens, shake, tmp_path):
    model = shake(get_peft_model(tiny_llama(), config()))
    expected = logits(model, tokens)
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    model.save_pretrained(tmp_path)
    torch.save((tokens, expected), tmp_path / "check.pt")
    code = """
import sys, torch, krontune.adapters
from peft import AutoPeftModelForCausalLM
torch.set_num_threads(1)
tokens, expected = torch.load(sys.argv[1] + "/check.pt")
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(model(tokens).logits, expected)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_saved_adapter_keeps_its_shapes_where_the_choice_has_changed(
    tiny_llama, tokens, shake, tmp_path, monkeypatch
):
    model = shake(get_peft_model(tiny_llama(), config()))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["shapes_pattern"] == {
        key: [list(pair) for pair in shapes] if isinstance(shapes, list) else shapes
        for key, shapes in EVERY_KIND.items()
    }
    for choice in ("balanced_shapes", "ladder_shapes"):
        monkeypatch.setattr(layer, choice, lambda n_out, n_in, n_shapes: [(n_out, 1)])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert again.peft_config["default"].shapes_pattern == EVERY_KIND


def test_a_weighted_sum_of_adapters_with_shapes_by_module_is_exact(tiny_llama, shake, tmp_path):
    model = get_peft_model(tiny_llama(), config(), adapter_name="one")
    model.add_adapter("other", config())
    shake(model, "one", seed=1), shake(model, "other", seed=2)
    model.add_weighted_adapter(["one", "other"], [0.7, -1.3], "sum")
    for moka in layers(model).values():
        expected = 0.7 * moka.get_delta_weight("one") - 1.3 * moka.get_delta_weight("other")
        torch.testing.assert_close(moka.get_delta_weight("sum"), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "sum", adapter_name="sum")
    for name, moka in layers(again).items():
        assert torch.equal(moka.get_delta_weight("sum"), layers(model)[name].get_delta_weight("sum"))


def test_adapters_of_other_patterns_have_no_weighted_sum(tiny):
    model = get_peft_model(tiny, config(), adapter_name="one")
    model.add_adapter("other", config(shapes_pattern={}))
    with pytest.raises(AdapterError, match="'one' and 'other' differ in shapes_pattern"):
        model.add_weighted_adapter(["one", "other"], [1.0, 1.0], "sum")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"shapes_pattern": {"k_proj": "ladder"}},
            "'k_proj' matches the end of no adapted.*down_proj, q_proj, v",
        ),
        (
            {"shapes_pattern": {"q_proj": [(48, 64)]}},
            r"shapes_pattern\['q_proj'\]: shape \(48, 64\) does not fit a lay",
        ),
        ({"shapes_pattern": {"q_proj": [(4, 4)] * 5}}, r"shapes_pattern\['q_proj'\]: 5 shapes for r = 4 products"),
        ({"shapes_pattern": {"q_proj": [(4, 8)]}, "identity": "A"}, r"\['q_proj'\]: shape \(4, 8\).* makes A 4 x 8"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_refused_and_leave_it_as_it_was(tiny, tokens, changes, words):
    expected = logits(tiny, tokens)
    with pytest.raises(AdapterError, match=words):
        get_peft_model(tiny, config(**changes))
    assert not layers(tiny) and torch.equal(logits(tiny, tokens), expected)
    get_peft_model(tiny, config())


def test_a_second_adapter_that_does_not_fit_leaves_the_first_one(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, config()))
    expected, held = logits(model, tokens), set(layers(model))
    with pytest.raises(AdapterError, match="'k_proj' matches"):
        model.add_adapter("other", config(target_modules=[*TARGETS, "o_proj"], shapes_pattern={"k_proj": "ladder"}))
    assert torch.equal(logits(model, tokens), expected) and set(layers(model)) == held
    assert not any(".other." in name for name, _ in model.named_parameters())
    model.add_adapter("other", config())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("ladder", "shapes_pattern must map patterns to shapes, got 'ladder'"),
        ({"q_proj": "square"}, r"shapes_pattern\['q_proj'\] must be 'ladder', 'balanced' or a list .* got 'square'"),
        ({"q_proj": []}, r"shapes_pattern\['q_proj'\] must be"),
        ({"q_proj": [(8, 0)]}, r"shapes_pattern\['q_proj'\] must be"),
        ({"q_(": "ladder"}, r"'q_\(' is no regular expression"),
    ],
)
def test_wrong_patterns_are_refused_by_name(pattern, words):
    with pytest.raises(AdapterError, match=words):
        MokaConfig(shapes_pattern=pattern)


@pytest.mark.parametrize(
    ("name", "values"),
    [("rank_pattern", (2, 3)), ("alpha_pattern", (2.0, 3.0)), ("shapes_pattern", ("ladder", "balanced"))],
)
def test_patterns_whose_order_decides_are_refused_as_a_saved_adapter_has_another_order(tiny_llama, name, values):
    one, other = r"layers\.1\..*", r".*v_proj"
    with pytest.raises(AdapterError, match=f"of {name}, which differ"):
        get_peft_model(tiny_llama(), MokaConfig(**{name: dict(zip((one, other), values, strict=True))}))
    get_peft_model(tiny_llama(), MokaConfig(**{name: dict(zip((other, one), values, strict=True))}))
    get_peft_model(tiny_llama(), MokaConfig(**{name: dict.fromkeys((one, other), values[0])}))
