"""Answers of a model to prompts, in batches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..adapters.dense import dense_weights


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    dense: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers, each to one user message, rendered with the model's chat template.

    Args:
        max_new_tokens: where an answer is cut.
        batch_size: prompts at a time. The order of prompts is kept.
        dense: see `krontune.adapters.dense_weights`.
        on_batch: called with the number of prompts answered so far.

    Returns:
        One text a prompt, without special tokens.
    """
    device = next(model.parameters()).device
    was_training, side = model.training, tokenizer.padding_side
    tokenizer.padding_side = "left"
    model.eval()
    answers: list[str] = []
    try:
        with dense_weights(model) if dense else nullcontext():
            for start in range(0, len(prompts), batch_size):
                chats = [[{"role": "user", "content": p}] for p in prompts[start : start + batch_size]]
                batch = tokenizer.apply_chat_template(
                    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
                ).to(device)
                ids = model.generate(
                    **batch, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
                )  # (batch, prompt + new)
                new = ids[:, batch["input_ids"].shape[1] :]
                answers += tokenizer.batch_decode(new, skip_special_tokens=True)
                if on_batch:
                    on_batch(len(answers))
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return answers
