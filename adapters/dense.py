"""Generate faster from a quantised, adapted model: dense weights for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from .layer import MokaLayer


@contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Run the model on dense, merged weights inside the block; parameters, gradients and saved files are untouched.

    Decoding passes a few tokens at a time, and then de-quantising each weight and applying each adapter cost several
    times the product itself. Inside the block every quantised or adapted linear layer multiplies by
    dequantise(W) + delta W, rounded to `dtype`: the same function up to that rounding, for 2 bytes a weight. (An int8
    base rounds its activations too, which dense weights do not.) No gradient flows to the adapter, so this is for
    generation and evaluation.

    Layers that PEFT cannot de-quantise, and merged ones, run as they are.
    """
    swapped = [module for name, module in model.named_modules() if _is_swappable(name, module)]
    own = [vars(module).get("forward") for module in swapped]  # accelerate's hooks sit there
    try:
        for module in swapped:
            weight = _dense_weight(module).to(dtype)
            bias = cast(nn.Linear, module.get_base_layer() if isinstance(module, MokaLayer) else module).bias
            vars(module)["forward"] = partial(_linear, weight, bias)  # in front of the class's method
        yield
    finally:
        for module, forward in zip(swapped, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def _is_swappable(name: str, module: nn.Module) -> bool:
    if isinstance(module, MokaLayer):
        backend = module.quantization_backend
        return not module.merged and not module.disable_adapters and (backend is None or backend.supports_merge)
    if name.endswith(".base_layer"):
        return False
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.supports_merge and backend.layer_type == "linear"


@torch.no_grad()
def _dense_weight(module: nn.Module) -> torch.Tensor:
    if isinstance(module, MokaLayer):
        return module.adapted_weight()
    backend = resolve_quantization_backend(module)
    assert backend is not None
    return backend.get_base_weight(module)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    bias = bias.to(weight.dtype) if bias is not None else None
    return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
