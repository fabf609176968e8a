"""Reading queries and keys as attention gets them, without touching what the model computes.

Transformers' models look up their attention function by name at every call. For the length of a `with` block the
probe puts a function in its place that calls the same function with the same arguments, and hands the queries and
keys, after rotary embedding and norms, to `attention_rhythm`. The configuration, and so the mask, stay as they are.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import floor
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import RlError

if TYPE_CHECKING:
    from .rhythm import Rhythm

# Kinds of layer, as transformers' configurations name them, whose attention is one softmax over all keys or a window.
READABLE = ("full_attention", "sliding_attention")

# Arguments of an attention function that change scores or shares in ways that q and k do not show.
_UNREADABLE = {
    "softcap": "caps its scores (softcap)",
    "s_aux": "has attention sinks (s_aux)",
    "sinks": "has attention sinks (sinks)",
    "position_bias": "adds a bias to its scores (position_bias)",
}


class _Enough(Exception):
    """Leaves the forward once the last layer has been read."""


@contextmanager
def probe(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    response_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    heads: Mapping[int, tuple[Sequence[int], Sequence[int]]] | None = None,
    backend: str = "auto",
    stop_early: bool = False,
) -> "Iterator[dict[int, Rhythm]]":
    """Collects each layer's `Rhythm` during one forward in the `with` block; gradients are off in it.

        with probe(model, response_mask=mask, attention_mask=attended) as rhythms:
            model(input_ids=ids, attention_mask=attended)
        rhythms[12].waad                                                                      # (B, H, T)

    Outputs are bit-identical to those without the probe. The model is not switched to evaluation: do so where it has
    dropout (`read_rhythm` does). Read the policy's own adapters: a probe of disabled ones is refused.

    Args:
        model: a transformers model with a decoder, plain or under PEFT; unwrapped from DDP, FSDP or the like.
        layers: indices; None for five of the middle third, see `middle_third`.
        response_mask, attention_mask, segment_ids, window, horizon, backend: see `attention_rhythm`. The attention
            mask must be the one that the model is called with.
        heads: (local, global) of each layer read, once settled: no others are computed, see `attention_rhythm`.
        stop_early: leave the forward, and the `with` block, when the last of the layers has been read. What follows
            the model's call inside the block is not run. Not for FSDP or ZeRO-3, which expect a forward to end.

    Raises:
        RlError: unknown layers, or heads of others; adapters that are off; attention that cannot be read (a softcap,
            sinks, linear, chunked or latent attention, a cache, a bias on scores); and, at the end of the block,
            layers that were not read once.
    """
    decoder, functions, name = _attention_of(model)
    chosen = middle_third(len(decoder.layers)) if layers is None else sorted(set(layers))
    places = _attention_modules(decoder, chosen)
    if heads is not None and set(heads) != set(chosen):
        raise RlError(f"heads are of the layers {sorted(heads)}, read are {chosen}: give heads of the layers read")
    options = {"window": window, "horizon": horizon, "backend": backend, "segment_ids": segment_ids}
    found: dict[int, Rhythm] = {}

    def read(layer: int, q: torch.Tensor, k: torch.Tensor, arguments: dict, lse: torch.Tensor | None) -> None:
        from .rhythm import attention_rhythm

        found[layer] = attention_rhythm(
            q.detach(),
            k.detach(),
            response_mask,
            attention_mask,
            scale=arguments.get("scaling"),
            sliding_window=arguments.get("sliding_window"),
            heads=None if heads is None else heads[layer],
            lse=lse,
            **options,
        )

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, *rest: Any, **arguments):
        inner = before or _eager(module)
        layer = places.get(module)
        if layer is None:
            return inner(module, q, k, v, mask, *rest, **arguments)
        if layer in found:
            raise RlError(f"layer {layer} ran twice under one probe: open a probe for each forward")
        _refuse(layer, module, arguments)
        last = stop_early and len(found) == len(chosen) - 1
        if last:
            read(layer, q, k, arguments, None)
            raise _Enough
        # Flex attention cannot run under a dispatch mode; the kernels of a GPU keep their log-sum-exp to themselves.
        keep = heads is not None and segment_ids is None and name == "sdpa" and q.device.type == "cpu"
        with _LogSumExp() if keep else nullcontext() as kept:
            output = inner(module, q, k, v, mask, *rest, **arguments)
        read(layer, q, k, arguments, kept.lse if kept and kept.lse is not None else None)
        return output

    before: Callable | None = functions.get(name)
    functions[name] = attention
    try:
        with torch.no_grad():
            yield found
    except _Enough:
        pass
    finally:
        del functions[name]
        if functions.get(name) is not before:  # it had been replaced before us, in the same place
            functions[name] = before
    missed = [layer for layer in chosen if layer not in found]
    if missed:
        raise RlError(
            f"layers {missed} did not call transformers' attention interface under the probe: run one forward of the "
            "model inside the block; a layer without such attention cannot be read"
        )


def read_rhythm(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> "dict[int, Rhythm]":
    """One forward under a `probe` that stops after the last layer read: no dropout, no gradients, no cache.

    Masks and ids are (B, T); options are those of `probe`. Every module is left in the mode it was in.
    """
    masks = {"attention_mask": attention_mask, "response_mask": response_mask}
    with evaluating(model), probe(model, layers, stop_early=True, **masks, **options) as rhythms:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return rhythms


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and without gradient checkpointing, each module put back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def middle_third(n_layers: int) -> list[int]:
    """Five evenly spaced layers from floor(L / 3) to floor(2 L / 3), fewer where there are not five.

    Source: arXiv 2510.13554 v2, section 4. Its rounding is not printed; halves go up here.

    >>> middle_third(36), middle_third(28), middle_third(2)
    ([12, 15, 18, 21, 24], [9, 11, 14, 16, 18], [0, 1])
    """
    low, high = n_layers // 3, 2 * n_layers // 3
    return sorted({floor(low + (high - low) * step / 4 + 0.5) for step in range(5)})


class _LogSumExp(TorchDispatchMode):
    """Keeps the log-sum-exp (B, H, T) that the CPU's fused attention computes and its callers drop."""

    def __init__(self) -> None:
        super().__init__()
        self.lse: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.lse = output[1]
        return output


def _attention_of(model: Any) -> tuple[Any, Any, str]:
    """The decoder, the table in which its layers look up attention functions, and the name they look up."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    off = any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules())
    if off:
        raise RlError("the model's adapters are disabled: the probe reads the policy, so enable them first")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise RlError(
            f"cannot probe a {type(base).__name__}: give the transformers model itself, or the PEFT model around it "
            "(accelerator.unwrap_model returns it)"
        )
    decoder = base.get_decoder()
    if getattr(decoder, "layers", None) is None:
        raise RlError(f"cannot probe {type(base).__name__}: its decoder, {type(decoder).__name__}, has no `layers`")
    return decoder, ALL_ATTENTION_FUNCTIONS, str(decoder.config._attn_implementation)


def refuse_unreadable(model: Any, layers: Sequence[int] | None = None) -> None:
    """What can be told of a model without running it, one without weights too.

    Raises:
        RlError: as of `probe`, for unknown layers and for attention whose kind is known to be unreadable.
    """
    decoder, _, _ = _attention_of(model)
    _attention_modules(decoder, middle_third(len(decoder.layers)) if layers is None else sorted(set(layers)))


def _attention_modules(decoder: Any, layers: Sequence[int]) -> dict[Any, int]:
    """Which modules may call attention for which of the layers; refuses layers whose kind is known to be unreadable."""
    n_layers, config = len(decoder.layers), decoder.config
    if not layers or not 0 <= layers[0] <= layers[-1] < n_layers:
        raise RlError(f"layers must be indices from 0 to {n_layers - 1}, at least one, got {list(layers)}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _unreadable(layers[0], decoder.layers[layers[0]], _UNREADABLE["softcap"])
    kinds = getattr(config, "layer_types", None)
    places = {}
    for layer in layers:
        if kinds is not None and kinds[layer] not in READABLE:
            raise _unreadable(layer, decoder.layers[layer], f"is of the kind {kinds[layer]!r}")
        for module in decoder.layers[layer].modules():
            if getattr(module, "kv_lora_rank", None) is not None:
                raise _unreadable(layer, module, "is multi-head latent attention (kv_lora_rank)")
            if getattr(module, "sinks", None) is not None:
                raise _unreadable(layer, module, _UNREADABLE["sinks"])
            if getattr(module, "layer_idx", None) == layer:
                places[module] = layer
    return places


def _refuse(layer: int, module: Any, arguments: Mapping[str, Any]) -> None:
    for name, why in _UNREADABLE.items():
        if arguments.get(name) is not None:
            raise _unreadable(layer, module, why)
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise _unreadable(layer, module, "is not causal")


def _unreadable(layer: int, module: Any, why: str) -> RlError:
    return RlError(
        f"layer {layer} ({type(module).__name__}) cannot be probed: it {why}. Readable are causal softmax attention "
        "in full or in a sliding window; choose other `layers`, another model, or no token credit"
    )


def _eager(module: Any) -> Callable:
    """The function that a model file falls back to where its attention is eager, which is in no table."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise RlError(f"found no eager attention for {type(module).__name__}: load the model with attn_implementation sdpa")
