"""The PEFT tuner model: which modules become MoKA layers."""

import re
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn

from .config import AdapterError, MokaConfig
from .layer import MokaLayer, MokaLinear


class MokaModel(BaseTuner):
    """MoKA adapters on a model; made by `peft.get_peft_model(model, MokaConfig(...))`."""

    prefix = "moka_"
    tuner_layer_cls = MokaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: MokaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = _pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = _pattern_value(peft_config.alpha_pattern, current_key, peft_config.alpha)
        alpha = float(r) if alpha is None else alpha
        kwargs: dict[str, Any] = {"config": peft_config, "r": r, "alpha": alpha, **get_quantization_kwargs(self)}
        if isinstance(target, MokaLayer):
            target.update_layer(adapter_name, **kwargs)
            return
        _check_linear(target, current_key)
        layer = MokaLinear(target, adapter_name, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            if isinstance(module, MokaLayer) and adapter_name in module.moka_gate:
                module.moka_fp32[adapter_name] = autocast_adapter_dtype

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "MoKA does not run one batch through several adapters: call the model once an adapter, with set_adapter"
            )
        yield


def _pattern_value(pattern: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's dotted name, as in PEFT's rank_pattern."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


def _check_linear(target: nn.Module, key: str) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, torch.nn.Linear):
        return
    backend = resolve_quantization_backend(base)
    if backend is None or backend.layer_type != "linear":
        raise AdapterError(
            f"MoKA adapts linear layers, and {key!r} is of type {type(base).__name__}; name other target_modules, or "
            "leave it out with exclude_modules"
        )
