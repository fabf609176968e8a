"""How long a step takes here, by trying a few tokens on the loaded base."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapters.base import resolve_model
from ..adapters.dense import dense_weights
from .pictures import reads_pictures
from .schema import Recipe
from .trainer_args import value_of
from .training import new_adapter

PROBED_TOKENS = 512  # of a micro-batch; longer ones are taken to cost as many times more
PROBED_COMPLETIONS, PROBED_STEPS = 32, 8


@dataclass(frozen=True)
class Probe:
    """Seconds, on this machine."""

    train_token: float
    """Forward and backward of one token, of a micro-batch of the stage's length."""
    prefill: float = 0.0
    """Before the first token of a batch of completions."""
    decode_step: float = 0.0
    """One token more for each completion of the batch."""


def at_hand(recipe: Recipe) -> bool:
    """Whether the model's weights are on this machine, to be probed. A base of mixed precision is not: a run makes its
    bit plan. Nor is one that reads pictures: rows of text would not tell its time."""
    if recipe.base.precision is not None or reads_pictures(recipe.base):
        return False
    return any(Path(resolve_model(recipe.base.model, recipe.base.revision)).glob("*.safetensors"))


class Prober:
    """The recipe's base with one adapter, loaded when it is first asked."""

    def __init__(self, recipe: Recipe, adapter: Any) -> None:
        self.recipe, self.adapter, self.model = recipe, adapter, None

    def load(self) -> Any:
        if self.model is None:
            with TemporaryDirectory() as run:  # for a bit plan, which is the run's to keep
                self.model, _ = new_adapter(self.recipe, self.adapter, Path(run))
        return self.model

    def training(self, trainer: Any, lines: int, length: int) -> float:
        """Seconds a token of one micro-batch of (lines, length), cut to PROBED_TOKENS."""
        model = self.load().train()
        if value_of(trainer, "gradient_checkpointing"):
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        lines = max(1, min(lines, PROBED_TOKENS // length)) if length < PROBED_TOKENS else 1
        length = min(length, PROBED_TOKENS)
        ids = self._ids(lines, length)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        seconds = _seconds(step, warm=True) / (lines * length)
        model.gradient_checkpointing_disable()
        return seconds

    def generating(self, completions: int, prompt: int) -> tuple[float, float]:
        """Seconds before the first token of a batch of completions, and for each token after it."""
        model, few = self.load().eval(), min(completions, PROBED_COMPLETIONS)
        ids = self._ids(few, prompt)

        def answer(tokens: int) -> Callable[[], Any]:
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "pad_token_id": 0}
            return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

        with torch.no_grad(), dense_weights(model) if self.recipe.base.dense_generation else nullcontext():
            first = _seconds(answer(1), warm=True)
            more = _seconds(answer(1 + PROBED_STEPS))
        scale = completions / few
        return first * scale, max(more - first, 0.0) / PROBED_STEPS * scale

    def _ids(self, lines: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        model = self.load()
        words = min(model.config.get_text_config().vocab_size, 30_000)
        return torch.randint(words // 4, words, (lines, length), generator=generator).to(model.device)


def _seconds(step: Callable[[], Any], warm: bool = False) -> float:
    if warm:
        step()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
