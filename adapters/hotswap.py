"""Exchange the weights of an adapter in place, in a compiled model too."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights

from .config import AdapterError, MokaConfig
from .layer import MokaLayer

# All that decides what the saved weights mean.
_SAME = (
    *("r", "n_shapes", "shapes", "alpha", "gate", "identity", "bias"),
    *("rank_pattern", "alpha_pattern", "shapes_pattern", "modules_to_save"),
)


@torch.no_grad()
def hotswap_adapter(model: PeftModel, folder: str | Path, adapter_name: str = "default", **options: Any) -> None:
    """Write a saved MoKA adapter into the tensors of one that the model has, which keeps its name.

    `peft.utils.hotswap.hotswap_adapter` takes LoRA alone. As the tensors stay, nothing is compiled again.

    Args:
        model: the PEFT model itself; a compiled one holds the same tensors.
        folder: what `save_pretrained` wrote, or a Hub id.
        adapter_name: of the adapter that is overwritten.
        options: of `PeftConfig.from_pretrained` and `load_peft_weights`, e.g. revision.

    Raises:
        AdapterError: there is no such adapter or it is merged, or the saved one has other modules, shapes or scales.
            The model is left as it was.
    """
    own = model.peft_config.get(adapter_name)
    if not isinstance(own, MokaConfig):
        raise AdapterError(f"there is no MoKA adapter {adapter_name!r}; there are {sorted(model.peft_config)}")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, MokaLayer)):
        raise AdapterError(f"the adapter {adapter_name!r} is merged; call unmerge_adapter() first")
    new = PeftConfig.from_pretrained(str(folder), **options)
    if not isinstance(new, MokaConfig):
        raise AdapterError(f"{str(folder)!r} holds an adapter of type {new.peft_type}, and {adapter_name!r} is MoKA's")
    for name in _SAME:
        if _plain(getattr(own, name)) != _plain(getattr(new, name)):
            raise AdapterError(
                f"{str(folder)!r} has {name}={getattr(new, name)!r}, and {adapter_name!r} has {getattr(own, name)!r}; "
                "only adapters of equal shapes and scales are swapped, others are loaded under another name"
            )
    held = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    weights = load_peft_weights(str(folder), device="cpu", **options)
    other = {name for name in held.keys() | weights.keys() if name not in held or name not in weights}
    other |= {name for name in held.keys() & weights.keys() if held[name].shape != weights[name].shape}
    if other:
        raise AdapterError(
            f"{str(folder)!r} has not the tensors of {adapter_name!r}: {len(other)} differ, {min(other)!r} among them; "
            "load it under another name"
        )
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)


def _plain(value: Any) -> Any:
    """Pairs read from JSON are lists."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
