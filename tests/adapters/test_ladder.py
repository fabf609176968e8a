import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear

from krontune.adapters import MokaConfig, MokaLinear
from krontune.adapters.ladder import ladder_shapes

SIZES = [(4096, 4096), (1024, 4096), (192, 576), (11008, 4096), (896, 128), (49152, 576), (151936, 896), (45, 27)]


@pytest.mark.parametrize("size", SIZES)
def test_rungs_divide_the_layer_rise_in_rank_and_cost_what_a_lora_of_rank_one_does(size):
    n_out, n_in = size
    shapes = ladder_shapes(n_out, n_in, 5)
    ranks = []
    for t, a_in in shapes:
        b_out, b_in = n_out // t, n_in // a_in
        assert (t * b_out, a_in * b_in) == size and b_in == t
        assert t * a_in + b_out * b_in == n_out + n_in
        ranks.append(min(t, a_in) * min(b_out, b_in))
    assert ranks[0] == 1 and all(later >= 4 * rank for rank, later in zip(ranks, ranks[1:], strict=False))
    assert ladder_shapes(n_out, n_in, 2) == shapes[:2]


def test_sizes_without_a_common_divisor_leave_rank_one():
    assert ladder_shapes(7, 13, 5) == [(1, 13)]


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="must be positive, got 0, 4 and 1"):
        ladder_shapes(0, 4, 1)


def test_the_first_rung_is_lora(tiny_llama, tokens):
    """Products of one row and one column, without a gate, are a LoRA of lora_alpha = 2 r: equal outputs and starts."""
    options = {"target_modules": ["q_proj", "v_proj"], "r": 3}
    lora: Any = get_peft_model(tiny_llama(), LoraConfig(lora_alpha=6, **options))
    moka = get_peft_model(tiny_llama(), MokaConfig(shapes="ladder", n_shapes=1, gate="none", **options))
    theirs: list[Any] = [m for m in lora.modules() if isinstance(m, LoraLinear)]
    ours = [m for m in moka.modules() if isinstance(m, MokaLinear)]
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        new_a, new_b = a.held("default")
        assert new_a[0].shape == (3, 1, a.in_features)
        torch.testing.assert_close(new_a[0].abs().max(), b.lora_A["default"].weight.abs().max(), rtol=0.1, atol=0.0)
        torch.nn.init.normal_(b.lora_B["default"].weight)
        new_a[0].data.copy_(b.lora_A["default"].weight.data[:, None, :])
        new_b[0].data.copy_(b.lora_B["default"].weight.data.T[:, :, None])
    torch.testing.assert_close(moka(tokens).logits, lora(tokens).logits, rtol=1e-4, atol=1e-5)


def test_alpha_is_twice_r_on_a_ladder_and_r_elsewhere():
    assert MokaConfig(r=6, shapes="ladder").alpha_of(6) == 12.0
    assert MokaConfig(r=6, shapes="balanced").alpha_of(6) == 6.0
    assert MokaConfig(r=6, shapes="ladder", identity="A").alpha_of(6) == 6.0
    assert MokaConfig(r=6, shapes="ladder", alpha=3.0).alpha_of(4) == 3.0


@pytest.mark.parametrize("start", [True, "nearest"])
def test_every_a_of_a_ladder_starts_with_numbers_of_a_loras_size(start):
    layer = MokaLinear(
        torch.nn.Linear(256, 256), "default", MokaConfig(r=10, shapes="ladder", init_weights=start), r=10, alpha=20.0
    )
    a, b = layer.held("default")
    assert len(a) == 5
    for stack in a:
        assert stack.square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.15)
    assert not any(stack.any() for stack in b)


def test_a_ladder_trains_merges_and_reads_back(tiny_llama, tokens, shake, tmp_path):
    model: Any = shake(get_peft_model(tiny_llama(), MokaConfig(shapes="ladder", target_modules="all-linear")))
    expected = model(tokens).logits
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    torch.testing.assert_close(again(tokens).logits, expected, rtol=0.0, atol=0.0)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
