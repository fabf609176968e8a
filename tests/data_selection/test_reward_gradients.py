import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import decoders

from krontune.data_selection import DataSelectionError, score_samples
from krontune.data_selection.encoding import encode, prompt_tokens
from krontune.data_selection.gradients import plan_gradients
from krontune.data_selection.reward_gradients import advantages, of_trl, reward_gradients, sample_answers
from krontune.data_selection.targeted import select_for_target
from krontune.rl import CertificateReward, get_task

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

WORDS = tiny.tokenizer()
PROMPTS = [{"prompt": "1+1=", "pays": "2"}, {"prompt": [{"role": "user", "content": "a?"}], "pays": "a"}]


def odd(row, text):
    """Pays answers of all kinds differently."""
    return sum(map(ord, text)) % 7 + 0.5 * text.count(row["pays"])


@pytest.fixture(scope="module", params=["lora", "moka"])
def model(request):
    adapt = {"lora": tiny.with_lora, "moka": tiny.with_moka}[request.param]
    return adapt(tiny.tiny_llama(vocab_size=104))


def log_p(model, answer):
    """Of a whole sampled answer."""
    kept = answer.labels[1:] != -100
    logits = model(input_ids=answer.input_ids[None]).logits[0, :-1][kept]
    return -torch.nn.functional.cross_entropy(logits, answer.labels[1:][kept], reduction="sum")


def gradient(model, loss, names):
    parameters = dict(model.named_parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [parameters[name] for name in names])])


def test_vectors_equal_one_answer_at_a_time(model, tmp_path):
    settings = {"samples": 5, "max_new_tokens": 4, "seed": 3}
    store = reward_gradients(model, WORDS, PROMPTS, odd, name="odd", projection=None, batch_size=2,
                             out_dir=tmp_path / "whole", **settings)  # fmt: skip
    sketched = reward_gradients(model, WORDS, PROMPTS, odd, name="odd", projection=2048, out_dir=tmp_path / "sketch",
                                **settings)  # fmt: skip
    names = plan_gradients(model, "last").names
    model.requires_grad_(True)
    for i, row in enumerate(PROMPTS):
        answers = sample_answers(model, WORDS, row, "row", 5, 4, seed=3 + i)
        texts = [WORDS.decode(a.input_ids[a.labels != -100], skip_special_tokens=True) for a in answers]
        rewards = np.array([odd(row, text) for text in texts])
        loss = torch.zeros(())
        for k in range(5):
            others = [rewards[j] for j in range(5) if j != k]
            loss = loss - (rewards[k] - np.mean(others)) * log_p(model, answers[k]) / 5
        expected = gradient(model, loss, names).numpy()
        assert rewards.std() > 0, "the test says nothing where all are paid alike"
        np.testing.assert_allclose(store.vectors[i], expected, atol=1e-5 * np.linalg.norm(expected))
        assert store.scores["reward"][i] == pytest.approx(rewards.mean())
        assert store.scores["reward_spread"][i] == pytest.approx(rewards.std())
    assert sketched.vectors.shape == (2, 2048)
    own, theirs = store.vectors @ store.vectors.T, np.float32(sketched.vectors) @ np.float32(sketched.vectors).T
    cosine = own[0, 1] / np.sqrt(own[0, 0] * own[1, 1])
    assert theirs[0, 1] == pytest.approx(cosine, abs=0.1)


def test_the_estimate_tends_to_the_gradient_of_the_expected_reward(tmp_path):
    """One-token answers can be counted out: J = sum_y p(y) r(y)."""
    model = tiny.with_lora(tiny.tiny_llama(vocab_size=104))
    row = PROMPTS[0]
    store = reward_gradients(model, WORDS, [row], odd, name="odd", projection=None, samples=4000, max_new_tokens=1,
                             batch_size=500, out_dir=tmp_path)  # fmt: skip
    model.requires_grad_(True)
    p = torch.softmax(model(input_ids=torch.tensor([prompt_tokens(WORDS, row, "row")])).logits[0, -1], -1)
    paid = torch.tensor([odd(row, WORDS.decode([y], skip_special_tokens=True)) for y in range(104)])
    exact = gradient(model, -(p * paid).sum(), plan_gradients(model, "last").names).numpy()
    found = store.vectors[0]
    assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.9
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(exact), rel=0.3)


def test_rows_that_give_the_paid_answer_are_picked(tmp_path):
    model = tiny.with_lora(tiny.tiny_llama(vocab_size=104))
    pool = [{"prompt": "1+1=", "completion": "27"[i % 2]} for i in range(8)]
    store = score_samples(model, WORDS, pool, ("nll",), projection=None, out_dir=tmp_path / "pool")
    target = reward_gradients(model, WORDS, [PROMPTS[0]], lambda row, text: float(text.startswith("2")), name="two",
                              projection=None, samples=400, max_new_tokens=1, batch_size=100,
                              out_dir=tmp_path / "target")  # fmt: skip
    assert select_for_target(store, target, budget=4).indices.tolist() == [0, 2, 4, 6]


@pytest.mark.slow
def test_a_verifier_of_a_task_pays_and_rows_that_give_its_answer_are_picked(tmp_path, monkeypatch):
    words = tiny.tokenizer()
    words.backend_tokenizer.decoder = decoders.Fuse()  # characters stand beside each other, without blanks
    prompts = list(get_task("lis").dataset(2, 3, seed=1))
    right = [row["completion"][0]["content"] for row in prompts]
    wrong = [text.replace("answer{", "answer{9").replace("ids{", "ids{9") for text in right]
    reward = of_trl(CertificateReward("lis"))
    assert [reward(row, text) for row, text in zip(prompts, right, strict=True)] == [1.0, 1.0]
    assert [reward(row, text) for row, text in zip(prompts, wrong, strict=True)] == [0.0, 0.0]

    def answered(row, text):
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}

    def drawn(model, words, row, where, *rest):
        at = int(where.removeprefix("row "))
        return [encode(words, answered(row, text), where) for text in (right[at], wrong[at])]

    monkeypatch.setattr("krontune.data_selection.reward_gradients.sample_answers", drawn)
    model = tiny.with_lora(tiny.tiny_llama(vocab_size=104, max_position_embeddings=512))
    target = reward_gradients(model, words, prompts, reward, name="lis", projection=None, out_dir=tmp_path / "target")
    assert target.scores["reward"].tolist() == [0.5, 0.5]
    pool = [answered(row, text) for texts in (wrong, right) for row, text in zip(prompts, texts, strict=True)]
    store = score_samples(model, words, pool, ("nll",), projection=None, out_dir=tmp_path / "pool")
    assert select_for_target(store, target, budget=2).indices.tolist() == [2, 3]


def test_a_store_is_completed_and_one_of_another_reward_refused(tmp_path):
    model = tiny.with_lora(tiny.tiny_llama(vocab_size=104))
    settings = {"samples": 3, "max_new_tokens": 2, "projection": 64}
    whole = reward_gradients(model, WORDS, PROMPTS, odd, name="odd", out_dir=tmp_path / "a", **settings)
    for part in (1, 0):
        reward_gradients(model, WORDS, PROMPTS, odd, name="odd", out_dir=tmp_path / "b", part=(part, 2), **settings)
    for name in ("vectors.f16", "scores.arrow", "done.map"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(DataSelectionError, match="reward: 'odd' there, 'letters' now"):
        reward_gradients(model, WORDS, PROMPTS, odd, name="letters", out_dir=tmp_path / "a", **settings)
    even = reward_gradients(model, WORDS, PROMPTS, lambda *_: 1.0, name="one", out_dir=tmp_path / "c", **settings)
    assert not even.vectors.any() and whole.complete
    with pytest.raises(DataSelectionError, match="is nan; give a finite number"):
        reward_gradients(model, WORDS, PROMPTS, lambda r, t: float("nan"), name="x", out_dir=tmp_path / "d", **settings)
    with pytest.raises(DataSelectionError, match="row 0: the reward of .* is 'good'; give a finite number"):
        reward_gradients(model, WORDS, PROMPTS, lambda r, t: "good", name="x", out_dir=tmp_path / "g", **settings)
    with pytest.raises(DataSelectionError, match="no 'prompt'"):
        reward_gradients(model, WORDS, [{"text": "a"}], odd, name="x", out_dir=tmp_path / "e", **settings)
    with pytest.raises(DataSelectionError, match="samples=1"):
        reward_gradients(model, WORDS, PROMPTS, odd, name="x", out_dir=tmp_path / "f", samples=1)


def test_advantages_leave_one_out():
    rewards = np.array([1.0, 0.0, 4.0])
    np.testing.assert_allclose(advantages(rewards), [1 - 2.0, 0 - 2.5, 4 - 0.5])
