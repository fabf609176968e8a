"""The adapted linear layer: a frozen base, quantised or not, plus the gated Kronecker mixture."""

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import nn

from .config import AdapterError, MokaConfig
from .layer import MokaLayer, at_least_float32


class MokaLinear(nn.Module, MokaLayer):
    """MoKA over a linear layer: plain, or of any quantisation that PEFT can read."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MokaConfig, r: int, alpha: float, **kwargs: Any
    ) -> None:
        super().__init__()
        MokaLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, r=r, alpha=alpha, **kwargs)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moka_A:
                result = result + self.update(name, x)
        return result.to(dtype)

    def _mixed_batch(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Each row of x through the adapter named for it; "__base__" stands for none. Errors begin as PEFT's do."""
        if len(x) != len(adapter_names):
            raise AdapterError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs).clone()
        for name in set(adapter_names) & set(self.moka_A):
            rows = torch.tensor([i for i, own in enumerate(adapter_names) if own == name], device=x.device)
            result[rows] += self.update(name, x[rows]).to(result.dtype)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters into the base weight.

        The base is kept aside, and `unmerge` puts it back bit by bit. Over a quantised base the sum is quantised again,
        which loses most of a small update; `lost_in_merge` then holds what was lost.

        Raises:
            AdapterError: the base cannot be de-quantised (GPTQ, AWQ and others that PEFT runs forward only), or
                `safe_merge` and the merged weight is not finite. This layer's weight is left as it was; layers merged
                before it stay merged, until `unmerge_adapter`.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.moka_A:
                continue
            if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
                raise AdapterError(
                    f"a {type(self.get_base_layer()).__name__} cannot be de-quantised, so that nothing can be merged "
                    "into it; use the adapter unmerged, or load it onto a base that is plain or of bitsandbytes"
                )
            weight = self.get_base_weight()
            delta = self.get_delta_weight(name).to(weight.device)
            merged = (at_least_float32(weight) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise AdapterError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken; it was not merged "
                    "into this layer. Call unmerge_adapter() to take it out of the layers before it."
                )
            self._keep_base()
            bias = self.get_base_layer().bias
            self.set_base_weight(merged)
            self.get_base_layer().bias = bias  # which a new layer of HQQ's comes without
            if self.quantization_backend is not None:
                error = self.get_base_weight().float() - weight.float() - delta
                self.lost_in_merge += [(float(error.square().sum()), float(delta.square().sum()))]
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self.lost_in_merge.clear()
        self._restore_base()

    def _keep_base(self) -> None:
        if self._kept_base is not None:
            return
        base = self.get_base_layer()
        if self.quantization_backend is None:
            self._kept_base = {"data": base.weight.data}
            return
        if self.quantization_backend.backend_name == "hqq":  # a merge puts another module in its place
            self._kept_base = {"layer": self.base_layer}
            return
        # The backend rewrites attributes of the old weight while it builds the new one, so they are copied too, and
        # bitsandbytes keeps parts of the packed weight on the module: `quant_state` (4-bit) and `state` (8-bit).
        module = {name: value for name, value in vars(base).items() if name in ("quant_state", "state")}
        if "state" in module:
            module["state"] = copy.copy(module["state"])  # it is emptied in place
        self._kept_base = {"weight": base.weight, "attributes": dict(vars(base.weight)), "module": module}

    def _restore_base(self) -> None:
        base, kept = self.get_base_layer(), self._kept_base
        self._kept_base = None
        if kept is None:
            return
        if "data" in kept:
            base.weight.data = kept["data"].to(base.weight)  # the model may have been moved since
        elif "layer" in kept:
            self.base_layer = kept["layer"]
        else:
            vars(kept["weight"]).update(kept["attributes"])
            base.weight = kept["weight"]
            vars(base).update(kept["module"])

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "moka." + super().__repr__()
