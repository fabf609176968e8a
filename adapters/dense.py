"""Generate faster from a quantised, adapted model: dense weights for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from .layer import MokaLayer, quantisation_of


@contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Run the model on dense, merged weights inside the block; parameters, gradients and saved files are untouched.

    Decoding passes a few tokens at a time, and then de-quantising each weight and applying each adapter cost several
    times the product itself. Inside the block every quantised or adapted linear layer multiplies by
    dequantise(W) + delta W, rounded to `dtype`: the same function up to that rounding, for 2 bytes a weight. (An int8
    base rounds its activations too, which dense weights do not.) No gradient flows to the adapter, so this is for
    generation and evaluation. Inside, adapters may be switched, disabled and scaled, which builds their layers' weights
    anew at the next call; a step of an optimizer is not seen.

    Layers that PEFT cannot de-quantise, merged ones, and batches with `adapter_names` run as they are.
    """
    swapped = [module for name, module in model.named_modules() if _is_swappable(name, module)]
    own = [vars(module).get("forward") for module in swapped]  # accelerate's hooks sit there
    try:
        for module in swapped:
            vars(module)["forward"] = _Dense(module, dtype)  # in front of the class's method
        yield
    finally:
        for module, forward in zip(swapped, own, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


class _Dense:
    """The forward of one layer on a dense weight, which is built anew when other adapters are active."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype, self.own = module, dtype, module.forward
        self.state: Any = None
        self.weight, self.bias = self._build()

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (
            args
            or kwargs.get("adapter_names") is not None
            or (isinstance(self.module, MokaLayer) and self.module.merged)
        ):
            return self.own(x, *args, **kwargs)
        if _state(self.module) != self.state:
            self.weight, self.bias = self._build()
        return nn.functional.linear(x.to(self.dtype), self.weight, self.bias).to(x.dtype)

    @torch.no_grad()
    def _build(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.state = _state(self.module)
        bias = cast(nn.Linear, _base(self.module)).bias
        return _dense_weight(self.module).to(self.dtype), bias.to(self.dtype) if bias is not None else None


def _state(module: nn.Module) -> Any:
    """What decides which adapters take part, and how strongly."""
    if not isinstance(module, MokaLayer):
        return None
    return module.disable_adapters, [(name, module.moka_scale.get(name)) for name in module.active_adapters]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, MokaLayer) else module


def _is_swappable(name: str, module: nn.Module) -> bool:
    if isinstance(module, MokaLayer):
        backend = module.quantization_backend
        return not module.merged and (backend is None or backend.supports_merge)
    if name.endswith(".base_layer"):
        return False
    backend = quantisation_of(module)
    return backend is not None and backend.supports_merge and backend.layer_type == "linear"


def _dense_weight(module: nn.Module) -> torch.Tensor:
    if isinstance(module, MokaLayer):
        return module.base_matrix() if module.disable_adapters else module.adapted_weight()
    backend = quantisation_of(module)
    assert backend is not None
    return backend.get_base_weight(module)
