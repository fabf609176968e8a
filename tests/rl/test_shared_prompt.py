"""Prompts that a group shares, computed once: beside the plain way, which computes them for every completion."""

import inspect
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from trl import GRPOTrainer

from krontune.rl.errors import RlError
from krontune.rl.shared_prompt import distinct_rows, pack, refuse_leaks, shared_prefill

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(attention="eager") -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model.set_attn_implementation(attention)
    return model


def padded(parts, side, width):
    ids = torch.zeros(len(parts), width, dtype=torch.long)
    for row, part in zip(ids, parts, strict=True):
        row[slice(width - len(part), None) if side == "left" else slice(0, len(part))] = torch.tensor(part)
    return ids, (ids != 0).long()


def batch(kinds=(0, 1, 0, 2, 0, 1), width=7, length=5):
    """Rows out of order, with 3, 2 and 1 completions for prompts of three lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 60, (size,), generator=generator).tolist() for size in (width, max(1, width - 3), 1)]
    completions = [torch.randint(3, 60, (1 + row % length,), generator=generator).tolist() for row in range(len(kinds))]
    return (*padded([prompts[kind] for kind in kinds], "left", width), *padded(completions, "right", length))


def plain_log_probs(model, prompt_ids, prompt_mask, completion_ids, completion_mask):
    """One row at a time, without any padding."""
    found = torch.zeros(completion_ids.shape)
    for number in range(len(prompt_ids)):
        prompt = prompt_ids[number][prompt_mask[number].bool()]
        completion = completion_ids[number][completion_mask[number].bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0]
        every = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found = found.index_put(
            (torch.full_like(completion, number), torch.arange(len(completion))),
            every[torch.arange(len(completion)), completion],
        )
    return found


def packed_log_probs(model, *rows):
    packed = pack(*rows)
    logits = model(
        input_ids=packed.input_ids, attention_mask=packed.mask, position_ids=packed.position_ids, use_cache=False
    ).logits
    every = logits.log_softmax(-1)
    found = every.gather(2, packed.labels.clamp(min=0)[:, :, None])[:, :, 0] * (packed.labels != -100)
    return found[packed.line[:, None], packed.places]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 5])
def test_values_and_gradients_are_those_of_each_row_alone(attention, width, length):
    model, rows = llama(attention), batch(width=width, length=length)
    weights = torch.randn(rows[2].shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for way in (plain_log_probs, packed_log_probs):
        model.zero_grad()
        found = way(model, *rows)
        (found * weights).sum().backward()
        gradients.append((found.detach(), [p.grad.clone() for p in model.parameters()]))
    (expected, expected_gradient), (found, gradient) = gradients
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_group_takes_one_prompt_and_its_completions():
    rows = batch(kinds=(0, 0, 0, 0), width=7, length=5)
    assert pack(*rows).input_ids.shape == (1, 6 + 4 * 5)


def test_equal_tokens_under_another_mask_are_another_prompt():
    ids = torch.tensor([[0, 5], [0, 5], [0, 5]])
    first, kind = distinct_rows(ids, torch.tensor([[0, 1], [1, 1], [0, 1]]))
    assert first.tolist() == [0, 1] and kind.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kinds", [(0, 1, 0, 2, 0, 1), (0, 1, 2)])
def test_greedy_answers_from_a_shared_prefill_are_the_plain_ones_and_generate_comes_back(kinds):
    model = llama()
    ids, mask, _, _ = batch(kinds)
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**asked)
    read = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    with shared_prefill(model):
        assert torch.equal(model.generate(**asked), expected)
    hook.remove()
    assert "generate" not in vars(model)
    copies = len(kinds) > 3
    assert read[0] == (3 * 6 if copies else 3 * 7) and read[1] == (len(kinds) if copies else 3)


def test_what_cannot_keep_completions_apart_is_refused():
    with pytest.raises(RlError, match="sliding_attention"):
        model: Any = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
        model.config.layer_types = ["full_attention", "sliding_attention"]
        refuse_leaks(model)
    with pytest.raises(RlError, match="sliding_window 4"):
        refuse_leaks(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4, attn_implementation="eager")))
    refuse_leaks(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, attn_implementation="eager")))
    model = llama()
    refuse_leaks(model)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _, given, out: out + out.cumsum(1))  # as a recurrent layer would
    with pytest.raises(RlError, match="see each other"):
        refuse_leaks(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RlError, match="eager or sdpa"):
        refuse_leaks(model)


def test_trl_still_scores_through_the_method_that_is_overridden():
    assert "_get_per_token_logps_and_entropies" in vars(GRPOTrainer)
    assert "self._get_per_token_logps_and_entropies(" in inspect.getsource(GRPOTrainer._compute_loss)
