"""Write a plain checkpoint with the adapter merged in."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .base import Quantization, bitsandbytes_config, load_base
from .config import AdapterError
from .layer import MokaLayer, quantisation_of
from .precision import BitPlan


def export_merged(
    model_or_folder: PeftModel | str | Path,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization | None = None,
    requantize: Quantization | None = None,
    precision: BitPlan | str | Path | None = None,
) -> Path:
    """Write W + delta W, W the de-quantised base, as a plain transformers checkpoint.

    Merging into the 4-bit weight itself would round most of a small update away. Beside the model, this takes the
    memory of one copy of it in `dtype`.

    Args:
        model_or_folder: a model with active MoKA adapters, which is left as it is, or the folder of a saved adapter.
        out_dir: where to write; made if it is not there.
        dtype: of the written weights.
        quantization: for a folder: load the base so quantised before it is de-quantised, which gives the very base
            that the adapter was trained on. None merges into the base as published.
        requantize: write the checkpoint quantised so, by bitsandbytes, in place of the plain one. It loads without a
            quantisation config. This rounds W + delta W, and with it the update, as merging in place does.

    Weights that the model ties and the adapter does not, such as an adapted output layer over a shared embedding, are
    written apart, and the checkpoint's config says so. Modules trained in full (`modules_to_save`) are written as
    trained. For a folder the tokenizer is written too.

    Raises:
        AdapterError: the model has no active MoKA adapter, other adapters stand beside it, it is merged already, or its
            base cannot be de-quantised (GPTQ, AWQ and others that PEFT runs forward only).
        BaseModelError: the base model of a folder cannot be loaded.
    """
    model, tokenizer = model_or_folder, None
    if not isinstance(model, PeftModel):
        model, tokenizer = _load_adapter(Path(model), quantization, dtype, precision)
    base = model.get_base_model()
    _check_layers(base)
    state = _merged_state(base, dtype)
    plain = _plain_twin(base)
    if any(not torch.equal(state[a], state[b]) for a, b in plain.all_tied_weights_keys.items()):
        plain = _plain_twin(base, tie_word_embeddings=False)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.config.dtype = dtype
    plain.generation_config = base.generation_config
    if requantize is None:
        plain.save_pretrained(out_dir)
    else:
        _save_quantised(plain, out_dir, requantize, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(out_dir)
    return Path(out_dir)


def _load_adapter(
    folder: Path,
    quantization: Quantization | None,
    dtype: torch.dtype,
    precision: BitPlan | str | Path | None,
) -> tuple[PeftModel, Any]:
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{str(folder)!r} holds no adapter_config.json; give the folder that save_pretrained wrote")
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise AdapterError(f"{str(folder)!r} does not say which base model it belongs to; pass the loaded model")
    base, tokenizer = load_base(name, quantization, dtype=dtype, precision=precision)
    return PeftModel.from_pretrained(base, str(folder)), tokenizer


def _check_layers(base: nn.Module) -> None:
    adapted = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    layers = [layer for layer in adapted if isinstance(layer, MokaLayer)]
    if others := {type(layer).__name__ for layer in adapted if not isinstance(layer, MokaLayer)}:
        raise AdapterError(f"adapters that are not MoKA's stand in the model, merge them first: {sorted(others)}")
    if not any(not layer.disable_adapters and set(layer.active_adapters) & set(layer.moka_A) for layer in layers):
        raise AdapterError("the model has no active MoKA adapter to merge; load one with PeftModel.from_pretrained")
    for name, module in base.named_modules():
        backend = quantisation_of(module)
        if backend is not None and not backend.supports_merge:
            raise AdapterError(
                f"{name!r}, a {type(module).__name__}, cannot be de-quantised, so there is no plain checkpoint of this "
                "model; load the base unquantised, or by bitsandbytes, and the adapter onto it"
            )
    if any(layer.merged for layer in layers):
        raise AdapterError("the adapter is merged into the model already; call unmerge_adapter() first")


def _plain_twin(base: Any, **changes: Any) -> Any:
    """A model of the same class without quantisation, its weights still without memory."""
    config = {k: v for k, v in base.config.to_dict().items() if k != "quantization_config"} | changes
    with torch.device("meta"):
        return base.__class__(base.config.__class__(**config))


def _save_quantised(plain: Any, out_dir: str | Path, quantization: Quantization, dtype: torch.dtype) -> None:
    """By way of a plain copy on disk, as transformers quantises only what it loads."""
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        config = bitsandbytes_config(quantization, dtype)
        packed = plain.__class__.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
        )
        packed.save_pretrained(out_dir)


@torch.no_grad()
def _merged_state(base: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of the plain model: every linear weight de-quantised, with its adapters added."""
    state: dict[str, torch.Tensor] = {}
    for name, module in _plain_modules(base):
        if isinstance(module, MokaLayer):
            weight = module.adapted_weight()
            state[f"{name}.weight"] = (weight.T.contiguous() if module.transposed else weight).to(dtype)
            continue
        backend = quantisation_of(module)
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if backend is not None:
            held = [("weight", backend.get_base_weight(module)), ("bias", cast(torch.Tensor | None, module.bias))]
        for key, value in held:
            full = f"{name}.{key}".removeprefix(".")
            if value is None or full in state or key in module._non_persistent_buffers_set:
                continue
            state[full] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    return state


def _plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that make up the model without adapters, by their names there; an adapted layer before its base."""
    if isinstance(module, ModulesToSaveWrapper):
        trained = not module.disable_adapters and module.active_adapters
        inner = module.modules_to_save[module.active_adapters[0]] if trained else module.original_module
        yield from _plain_modules(inner, name)
        return
    yield name, module
    if isinstance(module, MokaLayer):
        yield from _plain_modules(module.get_base_layer(), name)
        return
    for child, below in module.named_children():
        yield from _plain_modules(below, f"{name}.{child}".removeprefix("."))
