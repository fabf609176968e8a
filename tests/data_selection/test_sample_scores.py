import importlib.util
from pathlib import Path

import pytest
import torch

from krontune.data_selection import DataSelectionError, scores
from krontune.data_selection.encoding import Encoded, collate, encode, without_images
from krontune.data_selection.scores import (
    MemberMeans,
    answer_logits,
    answer_places,
    sample_means,
    token_scores,
    token_scores_and_gradient,
)

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

WORDS = tiny.tokenizer()


def naive_scores(model, ids, labels):
    """nll, el2n and entropy of one unpadded row (T,), a token at a time, in float64."""
    logits = model(input_ids=ids[None]).logits[0].double()
    found = []
    for t in range(len(ids) - 1):
        if labels[t + 1] == -100:
            continue
        p = torch.softmax(logits[t], dim=0)
        one_hot = torch.zeros_like(p)
        one_hot[labels[t + 1]] = 1
        found.append([-p[labels[t + 1]].log(), (p - one_hot).norm(), -(p * p.log()).sum()])
    return torch.tensor(found).mean(0) if found else torch.full((3,), torch.nan)


@torch.no_grad()
def batched_scores(model, inputs, labels):
    places, targets, owner = answer_places(labels)
    found = token_scores(answer_logits(model, inputs, places), targets)
    return {name: sample_means(values, owner, len(labels)) for name, values in found.items()}


def test_batched_scores_equal_one_token_at_a_time():
    model = tiny.tiny_llama()
    inputs, labels = tiny.batch()
    labels[3] = -100
    found = batched_scores(model, inputs, labels)
    for i, length in enumerate(inputs["attention_mask"].sum(1)):
        with torch.no_grad():
            expected = naive_scores(model, inputs["input_ids"][i, :length], labels[i, :length])
        for name, value in zip(("nll", "el2n", "entropy"), expected, strict=True):
            assert found[name][i] == pytest.approx(float(value), rel=1e-5, nan_ok=True), name
    assert torch.isnan(expected).all()


def test_the_head_runs_at_answer_positions_alone():
    model = tiny.tiny_llama()
    inputs, labels = tiny.batch()
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2].numel()))
    batched_scores(model, inputs, labels)
    handle.remove()
    assert rows == [int((labels[:, 1:] != -100).sum())]
    assert model(**inputs).logits.shape[:2] == labels.shape  # the hook is gone


def test_the_first_token_is_never_predicted():
    inputs, labels = tiny.batch(lengths=(4,), prompts=(0,))
    places, targets, owner = answer_places(labels)
    assert places.tolist() == [[True, True, True, False]] and owner.tolist() == [0, 0, 0]
    assert targets.tolist() == labels[0, 1:].tolist()


def test_logits_that_a_model_caps_are_scored_capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=0.5, initializer_range=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    inputs, labels = tiny.batch(vocab=64)
    found = batched_scores(model, inputs, labels)
    with torch.no_grad():
        expected = naive_scores(model, inputs["input_ids"][1], labels[1])
    assert found["nll"][1] == pytest.approx(float(expected[0]), rel=1e-4)


def test_extreme_logits_give_finite_scores():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-torch.inf, 1.0, 0.0]])
    found = token_scores(logits, torch.tensor([0, 1, 1]))
    assert all(torch.isfinite(values).all() for values in found.values())
    assert found["nll"][0] == 0 and found["el2n"][0] == 0 and found["entropy"][0] == 0
    assert found["entropy"][1] == pytest.approx(torch.log(torch.tensor(3.0)).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_the_gradient_at_the_logits_is_autograds_in_pieces_of_any_size(tokens, dtype, monkeypatch):
    torch.manual_seed(0)
    logits = (torch.randn(tokens, 11) * 3).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 11, (tokens,)), torch.rand(tokens)
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    (expected,) = torch.autograd.grad((nll * weights).sum(), logits)
    whole = token_scores(logits.detach(), targets)
    monkeypatch.setattr(scores, "CPU_NUMBERS", 25)  # two tokens at a time
    found, gradient = token_scores_and_gradient(logits.detach(), targets, weights)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(found["nll"], nll.detach())
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(token_scores(logits.detach(), targets), whole)


def test_running_means_equal_all_pairs_of_members():
    members = torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    means = MemberMeans(torch.float64)
    for logits in members:
        means.add(logits)
    mutual, reverse = means.measures()
    p = torch.softmax(members, -1)
    mean = p.mean(0)

    def kl(one, other):
        return (one * (one.log() - other.log())).sum(-1)

    torch.testing.assert_close(mutual, torch.stack([kl(q, mean) for q in p]).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(reverse, torch.stack([kl(mean, q) for q in p]).mean(0), rtol=1e-10, atol=1e-12)
    pairs = torch.stack([kl(q, w) for q in p for w in p]).mean(0)
    torch.testing.assert_close(mutual + reverse, pairs, rtol=1e-10, atol=1e-12)


def test_members_that_agree_have_no_epistemic_uncertainty():
    means = MemberMeans()
    for _ in range(3):
        means.add(torch.tensor([[1.0, 2.0, 30.0], [0.0, 0.0, 0.0]]))
    assert torch.stack(means.measures()).max() < 1e-6


def text_of(encoded):
    answer = encoded.input_ids[encoded.labels != -100]
    return "".join(WORDS.convert_ids_to_tokens(encoded.input_ids)), "".join(WORDS.convert_ids_to_tokens(answer))


def test_answers_of_each_form_of_row():
    def form(row):
        return text_of(encode(WORDS, row, "row 0"))

    assert form("abc") == form({"text": "abc"}) == ("abc</s>", "abc</s>")
    assert form({"prompt": "1+1=", "completion": "2"}) == ("1+1=2</s>", "2</s>")
    question, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    expected = ("[user]hi</s>[assistant]yo</s>", "yo</s>")
    assert form({"prompt": [question], "completion": [answer]}) == expected
    assert form({"messages": [question, answer]}) == expected
    several = form({"messages": [question, answer, question, answer]})
    assert several == ("[user]hi</s>[assistant]yo</s>" * 2, "yo</s>yo</s>")
    assert form({"messages": [question]}) == ("[user]hi</s>", "")
    ids = WORDS("abcd")["input_ids"]
    assert form({"input_ids": ids, "completion_mask": [0, 0, 1, 1]}) == ("abcd", "cd")
    assert form({"input_ids": ids, "labels": [-100, *ids[1:]]}) == ("abcd", "bcd")


def test_a_prompt_whose_last_token_merges_with_the_answer_is_cut_before_it():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), eos_token="</s>", pad_token="</s>"
    )
    encoded = encode(merging, {"prompt": "ca", "completion": "bc"}, "row 0")
    assert encoded.input_ids.tolist() == [3, 4, 3, 0] and encoded.labels.tolist() == [-100, 4, 3, 0]


def test_a_row_is_cut_at_max_length_and_one_without_answer_is_left():
    encoded = encode(WORDS, {"prompt": "abcdef", "completion": "g"}, "row 0", max_length=4)
    assert len(encoded) == 4 and encoded.answers == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, r"row 7: no row to score in the columns \['question'\]"),
        (3, "row 7: 3 is a int"),
        ({"input_ids": [1, 2], "labels": [1]}, "row 7: input_ids"),
        ({"input_ids": [1, 2], "completion_mask": [1]}, "row 7: completion_mask has 1"),
        ({"input_ids": [[1, 2], [3]]}, r"row 7: input_ids is \[\[1, 2\], \[3\]\]; give one flat list"),
        ({"input_ids": [1, 2], "labels": [0.5, 1.5]}, "row 7: labels is .* flat list of token numbers"),
        ({"input_ids": [1, 3000]}, "row 7: input_ids run from 1 to 3000, and the tokenizer has 104 tokens"),
        ({"input_ids": [-100, 5]}, "row 7: input_ids run from -100 to 5"),
        ({"text": "x", "images": [object()]}, "row 7 has images; give score_samples the model's processor"),
        ({"messages": [{"content": "x"}]}, "row 7: the chat template cannot render|''"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(row, message):
    with pytest.raises(DataSelectionError, match=message):
        if "messages" in (row if isinstance(row, dict) else {}):
            strict = tiny.tokenizer()
            strict.chat_template = "{{ raise_exception('roles must be given') }}"
            encode(strict, row, "row 7")
        encode(WORDS, row, "row 7")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgetful = tiny.tokenizer()
    forgetful.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% else %}-{% endif %}"
        "{% endfor %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert encode(forgetful, {"messages": turns}, "row 0").answers == 1
    with pytest.raises(DataSelectionError, match="rewrites turn 1"):
        encode(forgetful, {"messages": turns * 2}, "row 0")


def test_image_tokens_are_removed_and_not_blanked():
    pixels = torch.ones(1, 3, 2, 2)
    row = Encoded(torch.tensor([5, 9, 9, 6, 7]), torch.tensor([-100, -100, -100, -100, 7]), {"pixel_values": pixels})
    blind = without_images(row, [9])
    assert blind.input_ids.tolist() == [5, 6, 7] and blind.labels.tolist() == [-100, -100, 7] and not blind.images
    inputs, labels = collate([row, blind, row], pad=0)
    assert inputs["pixel_values"].shape == (2, 3, 2, 2) and inputs["attention_mask"].sum(1).tolist() == [5, 3, 5]
    assert labels[1].tolist() == [-100, -100, 7, -100, -100]
