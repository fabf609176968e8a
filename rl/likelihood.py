"""How sure a model is of given answers: what sampling would write how often, without sampling."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..adapters.dense import dense_weights
from .errors import RlError
from .generation import rendered


@torch.no_grad()
def answer_probabilities(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    answers: Sequence[str],
    *,
    batch_size: int = 64,
    dense: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[float]:
    """The probability that sampling at temperature 1 writes exactly this answer, and then ends.

    p(answer | prompt) = prod_t p(token_t | prompt, tokens before t), the end-of-turn token included. Of a right answer
    that is a lower bound of the expected certificate reward, and its mean over instances has far less noise than the
    mean reward of samples.

    Args:
        prompts: user messages or lists of messages, rendered with the model's chat template.
        answers: one a prompt, tokenized by themselves, as the trainers see them after a template that ends in a token
            of its own or a line break.
        batch_size, dense, on_batch: as of `krontune.rl.generation.generate`.

    Returns:
        One probability a prompt.

    Raises:
        RlError: the numbers of prompts and answers differ.
    """
    if len(prompts) != len(answers):
        raise RlError(f"one answer a prompt is needed, got {len(answers)} answers for {len(prompts)} prompts")
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    found: list[float] = []
    try:
        with dense_weights(model) if dense else nullcontext():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                asked = [
                    tokenizer(text, add_special_tokens=False)["input_ids"]
                    for text in rendered(tokenizer, prompts[part])
                ]
                said = [
                    [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                    for text in answers[part]
                ]
                ids, mask, labels = (t.to(device) for t in _batch(asked, said))  # (B, P + C), (B, P + C), (B, C)
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                    logits_to_keep=labels.shape[1] + 1,
                ).logits[:, :-1]  # (B, C, V)
                loss = torch.nn.functional.cross_entropy(
                    logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
                )
                found += (-loss.double().sum(1)).exp().tolist()
                if on_batch:
                    on_batch(len(found))
    finally:
        model.train(was_training)
    return found


def _batch(
    asked: Sequence[Sequence[int]], said: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, answers on the right: ids and mask (B, P + C), labels (B, C), -100 at padding."""
    before, after = max(map(len, asked)), max(map(len, said))
    ids, mask, labels = [], [], []
    for prompt, answer in zip(asked, said, strict=True):
        left, right = before - len(prompt), after - len(answer)
        ids.append([0] * left + [*prompt, *answer] + [0] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
        labels.append([*answer] + [-100] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)
