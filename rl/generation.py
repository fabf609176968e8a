"""Answers of a model to prompts, in batches."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..adapters.dense import dense_weights
from .errors import RlError


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    dense: bool = False,
    on_batch: Callable[[int], None] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    starts: Sequence[str] | None = None,
    chat: bool = True,
) -> list[str]:
    """Answers to prompts, each a user message or a list of messages, rendered with the model's chat template.

    Args:
        max_new_tokens: where an answer is cut.
        batch_size: prompts at a time. The order of prompts is kept.
        dense: see `krontune.adapters.dense_weights`.
        on_batch: called with the number of prompts answered so far.
        temperature: 0 answers greedily; above it, samples are drawn from the whole distribution.
        seed: of the samples; the caller's random state is left as it was.
        starts: the beginning of each answer, to be continued. What is returned is the rest.
        chat: False takes prompts as plain text to be continued, without the template.

    Returns:
        One text a prompt, without special tokens.
    """
    if temperature < 0:
        raise RlError(f"temperature must be 0 (greedy) or more, got {temperature}")
    starts = [""] * len(prompts) if starts is None else starts
    if len(starts) != len(prompts):
        raise RlError(f"one start a prompt is needed, got {len(starts)} for {len(prompts)} prompts")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    device = next(model.parameters()).device
    was_training, side = model.training, tokenizer.padding_side
    tokenizer.padding_side = "left"
    model.eval()
    answers: list[str] = []
    try:
        with dense_weights(model) if dense else nullcontext(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                asked: Any = rendered(tokenizer, prompts[part]) if chat else prompts[part]
                texts = [text + begun for text, begun in zip(asked, starts[part], strict=True)]
                batch = tokenizer(texts, add_special_tokens=not chat, padding=True, return_tensors="pt").to(device)
                ids = model.generate(
                    **batch, max_new_tokens=max_new_tokens, **(drawn if temperature else greedy)
                )  # (batch, prompt + new)
                new = ids[:, batch["input_ids"].shape[1] :]
                answers += tokenizer.batch_decode(new, skip_special_tokens=True)
                if on_batch:
                    on_batch(len(answers))
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return answers


def rendered(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[str]:
    """The text of each conversation, up to where the assistant begins."""
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
