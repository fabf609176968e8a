"""The direction in which training would raise a reward, as target vectors beside those of a pool.

A reward (a verifier of answers, say) has no gradient, but the expected reward of a model that samples has one:

    grad J(x) = E_{y ~ p(.|x)} [ (r(y) - b) grad log p(y|x) ]

It is estimated from some samples of each prompt, with the mean reward of the prompt's other samples as b, which leaves
it without bias. Stored is the gradient of -J, since a pool's vectors are gradients of losses too: a row whose cosine to
it is high raises the reward when it is trained on. `targeted.select_for_target` picks by it.

Source: NICE (ICML 2025), which puts the policy gradient of a metric in the place of LESS's validation gradient. Its
text was not readable when this was written; the baseline b is REINFORCE leave-one-out's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .encoding import IGNORED, Encoded, collate, prompt_tokens
from .gradients import Layers, Plan, plan_gradients, scoring_mode, take_gradients
from .identity import store_identity
from .pool_scoring import active_adapters, part_of_launch, pool_of
from .projections import CountSketch, FactorProjection, Projection, projected_size, projection_key, projector
from .selection import MAX_SEED, checked_int
from .store import NORM, Store
from .texts import DataSelectionError, TextSource

# Takes a row of the prompts and a sampled answer.
Reward = Callable[[Mapping[str, Any], str], float]


def reward_gradients(
    model: Any,
    tokenizer: Any,
    prompts: TextSource,
    reward: Reward,
    *,
    name: str,
    out_dir: str | os.PathLike[str],
    samples: int = 16,
    max_new_tokens: int = 64,
    gradients: Layers = "last",
    projection: Projection = 1024,
    batch_size: int = 8,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> Store:
    """The gradient of minus the expected reward of each prompt, into a store where an interrupted run goes on.

    Args:
        model: a `peft.PeftModel`, LoRA or MoKA, whose adapter is no fresh one.
        tokenizer: its tokenizer.
        prompts: rows with `prompt`, a string or a list of messages; what else they hold is the reward's business.
        reward: takes a row and the text of an answer, and gives a number; `of_trl` makes one of a reward function of
            TRL, such as a verifier of `krontune.rl`.
        name: of the reward, by which a store of another one is refused.
        out_dir: the folder of the store.
        samples: answers drawn for a prompt, at temperature 1 from the whole vocabulary, as the formula asks; 2 or more.
        max_new_tokens: of an answer.
        gradients, projection, seed: as given to `score_samples` for the pool, else the two cannot be compared. The seed
            also fixes the samples.
        batch_size: answers a backward pass.
        part: as of `score_samples`.

    Returns:
        The store. Scores: `reward` (mean over the samples) and `reward_spread` (standard deviation). A prompt whose
        samples are all paid alike has a vector of zeros, and does not count in a selection. `norms` of projected
        vectors are those of the projection.

    Raises:
        DataSelectionError: a value is not as above, a reward is not a finite number, or as of `score_samples`.
    """
    checked_int(samples, "samples", 2, 2**20, "one sample has no other to compare with")
    checked_int(max_new_tokens, "max_new_tokens", 1, 2**20, "64 does for short answers")
    checked_int(batch_size, "batch_size", 1, 2**20, "8 does on a CPU")
    checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
    rows, (part_i, parts) = pool_of(prompts), part_of_launch(part)
    plan = plan_gradients(model, gradients)
    key = {
        **store_identity(model, tokenizer, rows, active_adapters(model)),
        "layers": list(plan.layers),
        "projection": projection_key(projection),
        "reward": name,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    width = projected_size(projection, plan.shapes)
    store = Store.prepare(out_dir, key, len(rows), ["reward", "reward_spread", NORM], width)
    device = next(model.parameters()).device
    projected = projector(projection, plan.shapes, seed, device)
    done = store.done
    with scoring_mode(model):
        for place in range(part_i, len(rows), parts):
            if done[place]:
                continue
            answers = sample_answers(
                model, tokenizer, rows[place], f"row {place}", samples, max_new_tokens, seed + place
            )
            rewards = _rewards(reward, rows[place], answers, tokenizer, f"row {place}")
            vector = policy_gradient(model, plan, answers, advantages(rewards), batch_size, tokenizer, projected)
            norm = vector.norm()
            stored = vector if projected is None else nn.functional.normalize(vector, dim=0, eps=1e-30)
            scores = np.array([[rewards.mean(), rewards.std(), norm.item()]])
            store.write([place], scores, stored.cpu().numpy()[None])
    if part is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    store.finish()
    return store


def of_trl(function: Callable[..., Sequence[float | None]]) -> Reward:
    """A reward function of TRL, which takes lists of prompts, completions and columns, as one of a row and a text."""

    def reward(row: Mapping[str, Any], text: str) -> Any:
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        [paid] = function(prompts=[row["prompt"]], completions=[text], **columns)
        return paid

    return reward


def advantages(rewards: np.ndarray) -> np.ndarray:
    """Each reward (n,) minus the mean of the others."""
    return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)


def sample_answers(
    model: Any, tokenizer: Any, row: Any, where: str, samples: int, max_new_tokens: int, seed: int
) -> list[Encoded]:
    """Answers drawn from the model, each ending with the end-of-text token or after `max_new_tokens`.

    Raises:
        DataSelectionError: the row has no prompt.
    """
    from transformers import GenerationConfig

    prompt = prompt_tokens(tokenizer, row, where)
    end, device = tokenizer.eos_token_id, next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        num_return_sequences=samples,
        eos_token_id=end,
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)  # of the prompt, so that it is the same when a run goes on
        drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings).cpu()
    answers = []
    for one in drawn[:, len(prompt) :].tolist():
        said = one[: one.index(end) + 1] if end in one else one
        answers.append(Encoded(torch.tensor([*prompt, *said]), torch.tensor([IGNORED] * len(prompt) + said)))
    return answers


def _rewards(reward: Reward, row: Any, answers: Sequence[Encoded], tokenizer: Any, where: str) -> np.ndarray:
    found = []
    for answer in answers:
        text = tokenizer.decode(answer.input_ids[answer.labels != IGNORED], skip_special_tokens=True)
        said = reward(row, text)
        try:
            value = float(said)
        except (TypeError, ValueError):
            value = float("nan")
        if not np.isfinite(value):
            raise DataSelectionError(f"{where}: the reward of {text!r:.80} is {said!r:.40}; give a finite number")
        found.append(value)
    return np.array(found)


def policy_gradient(
    model: Any,
    plan: Plan,
    answers: Sequence[Encoded],
    weights: np.ndarray,
    batch_size: int,
    tokenizer: Any,
    projection: CountSketch | FactorProjection | None,
) -> torch.Tensor:
    """-(1 / n) sum_i weight_i grad log p(y_i | x), within `scoring_mode`: (d or size of the projection,)."""
    device = next(model.parameters()).device
    total = torch.zeros(plan.size if projection is None else projection.size, device=device)
    chosen = [i for i in range(len(answers)) if weights[i]]
    for first in range(0, len(chosen), batch_size):
        places = chosen[first : first + batch_size]
        inputs, labels = collate([answers[i] for i in places], tokenizer.pad_token_id or 0)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        vectors = take_gradients(model, plan, inputs, labels.to(device), projection).vectors
        # Of the mean NLL of an answer's tokens; its sum is as many times that as there are tokens.
        scales = torch.tensor([weights[i] * answers[i].answers for i in places], dtype=torch.float32, device=device)
        total += scales @ vectors
    return total / len(answers)
