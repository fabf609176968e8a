"""Write a plain checkpoint with the adapter merged in."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import resolve_quantization_backend
from torch import nn

from .base import Quantization, load_base
from .config import AdapterError
from .layer import MokaLayer


def export_merged(
    model_or_folder: PeftModel | str | Path,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization | None = None,
) -> Path:
    """Write W + delta W, W the de-quantised base, as a plain transformers checkpoint.

    Merging into the 4-bit weight itself would round most of a small update away.

    Args:
        model_or_folder: a model with active MoKA adapters, which is left as it is, or the folder of a saved adapter.
        out_dir: where to write; made if it is not there.
        dtype: of the written weights.
        quantization: for a folder: load the base so quantised before it is de-quantised, which gives the very base
            that the adapter was trained on. None merges into the base as published.

    Raises:
        AdapterError: the model has no active MoKA adapter, or other adapters stand beside it.
    """
    model, tokenizer = model_or_folder, None
    if not isinstance(model, PeftModel):
        model, tokenizer = _load_adapter(Path(model), quantization, dtype)
    base = model.get_base_model()
    if not any(isinstance(m, MokaLayer) for m in base.modules()):
        raise AdapterError("the model has no MoKA adapter to merge; load one with PeftModel.from_pretrained")
    plain = _plain_twin(base, dtype)
    plain.load_state_dict(_merged_state(base, dtype), strict=True)
    plain.generation_config = base.generation_config
    plain.save_pretrained(out_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(out_dir)
    return Path(out_dir)


def _load_adapter(folder: Path, quantization: Quantization | None, dtype: torch.dtype) -> tuple[PeftModel, Any]:
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{str(folder)!r} holds no adapter_config.json; give the folder that save_pretrained wrote")
    name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise AdapterError(f"{str(folder)!r} does not say which base model it belongs to; pass the loaded model instead")
    base, tokenizer = load_base(name, quantization, dtype=dtype)
    return PeftModel.from_pretrained(base, str(folder)), tokenizer


def _plain_twin(base: Any, dtype: torch.dtype) -> Any:
    config = {k: v for k, v in base.config.to_dict().items() if k != "quantization_config"}
    return base.__class__(base.config.__class__(**config)).to(dtype)


@torch.no_grad()
def _merged_state(base: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of the plain model: every linear weight de-quantised, with its adapters added."""
    state: dict[str, torch.Tensor] = {}
    for name, module in base.named_modules():
        name = name.replace(".base_layer", "")
        if isinstance(module, MokaLayer):
            if module.merged:
                raise AdapterError("the adapter is merged into the model already; call unmerge_adapter() first")
            weight = module.get_base_weight().float()
            for adapter in module.active_adapters:
                if adapter in module.moka_A:
                    weight = weight + module.get_delta_weight(adapter).to(weight.device)
            state[f"{name}.weight"] = weight.to(dtype)
            continue
        backend = resolve_quantization_backend(module)
        for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{name}.{key}"
            if full in state or key in module._non_persistent_buffers_set or _is_adapter_part(name):
                continue
            if key == "weight" and backend is not None:
                value = backend.get_base_weight(module)
            state[full] = value.detach().to(dtype) if value.is_floating_point() else value.detach()
    return state


def _is_adapter_part(name: str) -> bool:
    return any(part.startswith("moka_") for part in name.split("."))
