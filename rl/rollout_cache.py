"""Rollouts with a smaller cache of keys and values, and how far they then are from the policy that learns.

The caches are those of transformers. `offloaded` keeps all but two layers in main memory and changes no number; the
others store keys and values in fewer bits, and give the sampled tokens other probabilities than the model that is
updated on them. TRL corrects for such a difference with vLLM alone. Small ones are harmless and larger ones end
training (Sparse-RL, arXiv 2601.10079, of dropped cache entries), so it is measured: see `MismatchGuard`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .errors import RlError

BITS = {"int4": 4, "int2": 2}  # by HQQ, in groups of numbers with a scale and a zero point each
CACHES = ("offloaded", "fp8", *BITS)
GROUPS = (64, 32, 16, 8)


def cache_settings(cache: str, config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of transformers' `GenerationConfig`.

    Args:
        cache: one of CACHES: "offloaded", "fp8" (one scale a layer), "int4" or "int2" (HQQ).
        config: of the model.
        device: where it generates.

    Raises:
        RlError: there is no such cache, a package is missing, or model or device cannot have it.
    """
    if cache not in CACHES:
        raise RlError(f"cache {cache!r} is unknown; allowed: {', '.join(CACHES)}, or none")
    if cache == "offloaded":
        if device.type == "cpu":
            raise RlError("cache 'offloaded' moves what a GPU holds to main memory, and the model is on the CPU")
        return {"cache_implementation": "offloaded"}
    options: dict[str, Any] = {"backend": "fp8"}
    if cache in BITS:
        options = {"backend": "hqq", "nbits": BITS[cache], "axis_key": 1, "axis_value": 1}
        options["q_group_size"] = group_size(config, BITS[cache])
    _try(cache, config, options)
    return {"cache_implementation": "quantized", "cache_config": options}


def group_size(config: Any, bits: int) -> int:
    """Numbers that share a scale: as many as divide a head, and leave HQQ whole bytes whatever the length.

    Raises:
        RlError: no size does.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for group in GROUPS:
        if size % group == 0 and heads * size // group % (8 // bits) == 0:
            return group
    raise RlError(
        f"{heads} heads of {size} numbers cannot be cut into groups of {', '.join(map(str, GROUPS))} that fill bytes "
        f"of {bits}-bit numbers; use the cache 'fp8'"
    )


def _try(cache: str, config: Any, options: dict[str, Any]) -> None:
    from transformers.cache_utils import QuantizedCache

    try:
        QuantizedCache(config=config.get_text_config(decoder=True), **options)
    except ImportError as error:
        raise RlError(f"cache {cache!r} needs the package hqq: pip install hqq; 'fp8' needs none") from error
    except ValueError as error:  # a layer of the model is no full attention
        raise RlError(f"cache {cache!r} cannot hold this model: {' '.join(str(error).split())}") from error


class SampledLogps(LogitsProcessor):
    """Keeps how probable each sampled token was to the sampler, (B, C) in nats, at its temperature.

    It stands before the warpers, so that top_p and top_k are not in it, as they are not in the learner's.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.found: list[torch.Tensor] = []
        self._every: torch.Tensor | None = None  # (B, V), of the step whose token is not known yet

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self._every = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def finish(self, sequences: torch.Tensor) -> torch.Tensor:
        """sequences: (B, prompt + C) as they were generated."""
        self._take(sequences)
        self._every = None
        return torch.stack(self.found, 1)

    def _take(self, ids: torch.Tensor) -> None:
        if self._every is not None:
            self.found.append(self._every.gather(1, ids[:, -1:])[:, 0])


@contextmanager
def recorded(model: Any, temperature: float) -> Iterator[list[torch.Tensor]]:
    """Inside the block each `model.generate` adds the log-probabilities (B, C) of what it samples to the list."""
    own, held = model.generate, vars(model).get("generate")
    found: list[torch.Tensor] = []

    def generate(**inputs: Any) -> Any:
        keeper = SampledLogps(temperature)
        sequences = own(**inputs, logits_processor=LogitsProcessorList([keeper]))
        found.append(keeper.finish(sequences))
        return sequences

    vars(model)["generate"] = generate
    try:
        yield found
    finally:
        del vars(model)["generate"]
        if held is not None:
            vars(model)["generate"] = held
