"""The PEFT tuner model: which modules become MoKA layers."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .combine import combined_config, fill_combined
from .config import AdapterError, MokaConfig, pattern_of
from .layer import MokaLayer, quantisation_of
from .linear import MokaLinear


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
        by_r = pattern_of(peft_config.rank_pattern, "rank_pattern", current_key)
        by_alpha = pattern_of(peft_config.alpha_pattern, "alpha_pattern", current_key)
        by_shapes = pattern_of(peft_config.shapes_pattern, "shapes_pattern", current_key)
        r = peft_config.r if by_r is None else peft_config.rank_pattern[by_r]
        alpha = peft_config.alpha_of(r, by_shapes) if by_alpha is None else peft_config.alpha_pattern[by_alpha]
        kwargs: dict[str, Any] = {"config": peft_config, "r": r, "alpha": alpha, "pattern": by_shapes}
        kwargs |= get_quantization_kwargs(self)
        kwargs["inference_mode"] = peft_config.inference_mode
        if isinstance(target, MokaLayer):
            target.update_layer(adapter_name, **kwargs)
            return
        _check_linear(target, current_key)
        _check_not_output(self.model, target, current_key)
        layer = MokaLinear(target, adapter_name, **kwargs)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the model. Where a module cannot be adapted as asked, the model is left as it was."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            names = [name for name, module in model.named_modules() if _holds(module, adapter_name)]
            _check_patterns_match(cast(MokaConfig, self.peft_config[adapter_name]), names)
        except AdapterError:
            for name, module in list(model.named_modules()):
                if _holds(module, adapter_name):
                    self._take_out(model, name, cast(MokaLayer, module), adapter_name)
            raise

    def _take_out(self, model: nn.Module, name: str, layer: MokaLayer, adapter_name: str) -> None:
        layer.delete_adapter(adapter_name)
        if not layer.moka_A:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MokaLayer) and new_module is child.get_base_layer():
            setattr(parent, child_name, new_module)  # PEFT would copy a `weight` over, which HQQ's layers do not have
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            if adapter_name in layer.moka_gate:
                layer.moka_fp32[adapter_name] = autocast_adapter_dtype

    def _layers(self) -> Iterator[MokaLinear]:
        return (module for module in self.model.modules() if isinstance(module, MokaLinear))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base weights; over a quantised base, warn with the share of the update that is lost."""
        super().merge_adapter(adapter_names, safe_merge)
        _warn_of_loss(list(self._layers()))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = list(self._layers())
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            _warn_of_loss(layers)
        return model

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose update is the weighted sum of those of other adapters, exactly.

        A sum of gated Kronecker sums is one over all their products, so the new adapter has as many products as the
        given ones have together. A module that one of them does not adapt counts as adapted with a zero update.

        Args:
            adapters: names of the adapters, of equal r, shapes and identity in every layer.
            weights: one number each; negative ones subtract.
            adapter_name: of the new adapter, which is not made active.

        Raises:
            AdapterError: an adapter is unknown, or two of them differ in a way that cannot be combined.
        """
        if adapter_name in self.peft_config:
            raise AdapterError(f"there is an adapter {adapter_name!r} already; choose another name, or delete it")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise AdapterError(f"there is no adapter {unknown[0]!r}; there are {sorted(self.peft_config)}")
        config = combined_config([self.peft_config[name] for name in adapters], adapters, weights)  # pyright: ignore[reportArgumentType]
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)  # before a base in bfloat16 rounds what is written
            for layer in self._layers():
                if adapter_name in layer.moka_A:
                    fill_combined(layer, adapter_name, adapters, weights)
        except AdapterError:
            self.delete_adapter(adapter_name)
            raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """Hand `adapter_names`, one name a row of the batch, to every adapted layer and to the modules to save."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if isinstance(self.model, PreTrainedModel) else None
        # An encoder runs before the rows are repeated for the beams. A decoder's get_encoder() gives the model itself.
        once = set(encoder.modules()) if encoder is not None and encoder is not self.model else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_hand_over, names if module in once else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (MokaLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode; call eval() first.")
        known = {name for layer in self._layers() for name in layer.moka_A} | {"__base__"}
        if unknown := sorted(set(names) - known):
            words = ", ".join(unknown)
            raise AdapterError(f"Trying to infer with non-existing adapter(s): {words}; there are {sorted(known)}")


def _holds(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, MokaLayer) and adapter_name in module.moka_A


def _check_patterns_match(config: MokaConfig, names: Sequence[str]) -> None:
    for pattern in config.shapes_pattern:
        if not any(pattern_of({pattern: 0}, "shapes_pattern", name) for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise AdapterError(
                f"shapes_pattern: {pattern!r} matches the end of no adapted module's name; the adapted ones end in "
                f"{', '.join(ends)}"
            )


def _hand_over(names: Sequence[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"adapter_names": names}


def _check_linear(target: nn.Module, key: str) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, (torch.nn.Linear, Conv1D)):
        return
    backend = quantisation_of(base)
    if backend is None or backend.layer_type != "linear":
        raise AdapterError(
            f"MoKA adapts linear layers, and {key!r} is of type {type(base).__name__}; name other target_modules, "
            "leave it out with exclude_modules, or train it in full with modules_to_save"
        )


def _check_not_output(model: nn.Module, target: nn.Module, key: str) -> None:
    """Refuse the output layer of a language model, and any layer that shares its weight with the input embedding."""
    if not isinstance(model, PreTrainedModel):
        return
    try:
        own = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # models of sound and of images
        own = None
    tied = own is not None and getattr(target, "weight", None) is own
    if not tied and target is not model.get_output_embeddings():
        return
    shared = " It also shares its weight with the input embedding, which a merge would change too." if tied else ""
    raise AdapterError(
        f"{key!r} is the output layer: trainers multiply by its weight themselves and pass an adapter on it by, which "
        f"would never be trained.{shared} Take it out of target_modules ('all-linear' leaves it out), name it in "
        f"exclude_modules, or train a copy of it in full with modules_to_save=[{key.rpartition('.')[2]!r}]"
    )


def _warn_of_loss(layers: list[MokaLinear]) -> None:
    pairs = [pair for layer in layers for pair in layer.lost_in_merge]
    if not pairs:
        return
    lost, update = (sum(column) for column in zip(*pairs, strict=True))
    share = (lost / update) ** 0.5 if update else 0.0
    warnings.warn(
        f"Merging into quantised weights rounded the update: the error is {share:.0%} of the update (Frobenius norms "
        f"over {len(layers)} layers). unmerge_adapter() puts the base back; krontune.adapters.export_merged merges "
        "without this loss.",
        stacklevel=3,
    )
