"""The adapted linear layer: a frozen base, quantised or not, plus the gated Kronecker mixture."""

import copy
import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from .config import AdapterError, MokaConfig, Shape
from .kronecker import balanced_shapes, kron_stacks, kron_weight, sum_all


class Gate(nn.Module):
    """The mixture weights of one layer: softmax of the logits g (r,), or 1 / r where they are not learned."""

    def __init__(self, r: int, learned: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(r), requires_grad=learned) if learned else None
        self.r = r

    def forward(self, device: torch.device) -> torch.Tensor:
        if self.logits is None:
            return torch.full((self.r,), 1.0 / self.r, device=device)
        return torch.softmax(self.logits.float(), dim=0)  # (r,)


class MokaLayer(BaseTunerLayer):
    """What PEFT needs to know of an adapted layer, and its update of one adapter."""

    adapter_layer_names = ("moka_A", "moka_B", "moka_gate")
    other_param_names = ("moka_dropout", "moka_alpha", "moka_scale", "moka_counts", "moka_fp32")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.moka_A = nn.ModuleDict()  # adapter -> one stack (k, a_out, a_in) a shape
        self.moka_B = nn.ModuleDict()  # adapter -> one stack (k, b_out, b_in) a shape
        self.moka_gate = nn.ModuleDict()
        self.moka_dropout = nn.ModuleDict()
        self.moka_alpha: dict[str, float] = {}
        self.moka_scale: dict[str, float] = {}  # 1, and what set_scale and scale_layer make of it
        self.moka_counts: dict[str, list[int]] = {}  # products of each shape
        self.moka_fp32: dict[str, bool] = {}  # whether the adapter's parameters are to be float32
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._packed_base: dict[str, Any] | None = None
        self.cast_input_dtype_enabled = True
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise AdapterError(f"the size of a {type(self.get_base_layer()).__name__} is not known; leave it out")
        self.in_features, self.out_features = in_features, out_features

    def update_layer(
        self,
        adapter_name: str,
        config: MokaConfig,
        r: int,
        alpha: float,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add the factors and the gate of one adapter to this layer."""
        shapes = resolve_shapes(config, self.out_features, self.in_features)
        if config.shapes != "balanced" and len(shapes) > r:
            raise AdapterError(f"{len(shapes)} shapes for r = {r} products; give at most {r} shapes, or a larger r")
        shapes = shapes[:r]
        counts = [r // len(shapes) + (i < r % len(shapes)) for i in range(len(shapes))]
        self.moka_A[adapter_name] = nn.ParameterList(
            torch.empty(k, a_out, a_in) for k, (a_out, a_in) in zip(counts, shapes, strict=True)
        )
        self.moka_B[adapter_name] = nn.ParameterList(
            torch.empty(k, self.out_features // a_out, self.in_features // a_in)
            for k, (a_out, a_in) in zip(counts, shapes, strict=True)
        )
        self.moka_gate[adapter_name] = Gate(r, learned=config.gate == "softmax")
        self.moka_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity()
        self.moka_alpha[adapter_name] = alpha
        self.moka_scale[adapter_name] = 1.0
        self.moka_counts[adapter_name] = counts
        self.moka_fp32[adapter_name] = True
        self._initialise(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _initialise(self, adapter_name: str, zero_b: bool) -> None:
        for a, b in zip(*self.stacks(adapter_name), strict=True):
            _kaiming_uniform(a)
            if zero_b:
                nn.init.zeros_(b)
            else:
                _kaiming_uniform(b)

    def stacks(self, adapter_name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The factors A_i and B_i of one adapter: one tensor (k, m, n) a shape, in the order of `moka_counts`."""
        a, b = (cast(nn.ParameterList, layers[adapter_name]) for layers in (self.moka_A, self.moka_B))
        return list(a), list(b)

    def mixture_weights(self, adapter_name: str) -> torch.Tensor:
        """scale * alpha * softmax(g), (r,) float32."""
        device = self.stacks(adapter_name)[0][0].device
        scale = self.moka_scale[adapter_name] * self.moka_alpha[adapter_name]
        return scale * self.moka_gate[adapter_name](device)

    def update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """delta W x for one adapter, computed in the dtype of x: x (..., in_features) -> (..., out_features)."""
        self._restore_fp32(adapter_name)
        a, b = self.stacks(adapter_name)
        x = self.moka_dropout[adapter_name](x)
        gates = self.mixture_weights(adapter_name).split(self.moka_counts[adapter_name])
        return kron_stacks(x, [a_k.to(x.dtype) for a_k in a], [b_k.to(x.dtype) for b_k in b], gates)

    def _restore_fp32(self, adapter_name: str) -> None:
        """Undo a trainer's cast of the parameters, in which steps of a usual learning rate round to nothing.

        TRL casts every trainable parameter over a quantised base to bfloat16, whose neighbours of 0.1 are 0.0005
        away. The parameter objects stay those that the optimizer holds.
        """
        if not self.moka_fp32[adapter_name]:
            return
        for layers in (self.moka_A, self.moka_B, self.moka_gate):
            for parameter in layers[adapter_name].parameters():
                if parameter.dtype != torch.float32:
                    # A tensor made in inference mode would never get a gradient again.
                    with torch.inference_mode(False):
                        parameter.data = parameter.data.float()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """delta W (out_features, in_features) in float32."""
        a, b = self.stacks(adapter_name)
        gates = self.mixture_weights(adapter_name).split(self.moka_counts[adapter_name])
        return sum_all(kron_weight(a_k.float(), b_k.float(), g) for a_k, b_k, g in zip(a, b, gates, strict=True))

    @torch.no_grad()
    def adapted_weight(self) -> torch.Tensor:
        """W + delta W of the active adapters, (out_features, in_features) in float32, W de-quantised."""
        weight = self.get_base_weight().float()
        for name in self.active_adapters:
            if name in self.moka_A:
                weight = weight + self.get_delta_weight(name).to(weight.device)
        return weight

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the update `scale` times the trained one; 1 is the trained one."""
        if adapter in self.moka_scale:
            self.moka_scale[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the updates of the active adapters by `scale`, on top of earlier calls."""
        for name in self.active_adapters:
            if name in self.moka_scale:
                self.moka_scale[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the updates of the active adapters by `scale`; None goes back to the trained ones."""
        for name in self.active_adapters:
            if name in self.moka_scale:
                self.moka_scale[name] = 1.0 if scale is None else self.moka_scale[name] / scale


class MokaLinear(nn.Module, MokaLayer):
    """MoKA over a linear layer: plain, or of any quantisation that PEFT can read."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MokaConfig, r: int, alpha: float, **kwargs: Any
    ) -> None:
        super().__init__()
        MokaLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, r=r, alpha=alpha, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
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

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters into the base weight.

        Over a quantised base the sum is quantised again, which loses most of a small update: `export_merged` merges
        without that loss. The packed base is kept aside, and `unmerge` puts it back bit by bit.

        Raises:
            AdapterError: `safe_merge` and the merged weight is not finite. This layer's weight is left as it was;
                layers merged before it stay merged, until `unmerge_adapter`.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.moka_A:
                continue
            weight = self.get_base_weight()
            merged = (weight.float() + self.get_delta_weight(name).to(weight.device)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise AdapterError(
                    f"merging adapter {name!r} gives weights that are not finite, so it was not merged into this "
                    "layer; call unmerge_adapter() to take it out of the layers before it"
                )
            self._keep_packed_base()
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self._packed_base is None:
                weight = self.get_base_weight()
                delta = self.get_delta_weight(name).to(weight.device)
                self.set_base_weight((weight.float() - delta).to(weight.dtype))
        self._restore_packed_base()

    def _keep_packed_base(self) -> None:
        if self.quantization_backend is None or self._packed_base is not None:
            return
        warnings.warn(
            "Merging into a quantised weight rounds the update to the base's few levels, which can lose most of it; "
            "krontune.adapters.export_merged merges into de-quantised weights instead.",
            stacklevel=3,
        )
        base = self.get_base_layer()
        # The backend rewrites attributes of the old weight while it builds the new one, so they are copied too, and
        # bitsandbytes keeps parts of the packed weight on the module: `quant_state` (4-bit) and `state` (8-bit).
        module = {name: value for name, value in vars(base).items() if name in ("quant_state", "state")}
        if "state" in module:
            module["state"] = copy.copy(module["state"])  # it is emptied in place
        self._packed_base = {"weight": base.weight, "attributes": dict(vars(base.weight)), "module": module}

    def _restore_packed_base(self) -> None:
        if self._packed_base is None:
            return
        base, packed = self.get_base_layer(), self._packed_base
        vars(packed["weight"]).update(packed["attributes"])
        base.weight = packed["weight"]
        vars(base).update(packed["module"])
        self._packed_base = None

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "moka." + super().__repr__()


def resolve_shapes(config: MokaConfig, n_out: int, n_in: int) -> list[Shape]:
    """The shapes in use for a layer of this size; written to `config.resolved_shapes`.

    Raises:
        AdapterError: a shape asked for does not divide the layer.
    """
    key = f"{n_out}x{n_in}:{config.n_shapes}"
    if config.shapes != "balanced":
        config.resolved_shapes[key] = [(int(o), int(i)) for o, i in config.shapes]
    elif key not in config.resolved_shapes:
        config.resolved_shapes[key] = balanced_shapes(n_out, n_in, config.n_shapes)
    shapes = [(o, i) for o, i in config.resolved_shapes[key]]
    for a_out, a_in in shapes:
        if a_out < 1 or a_in < 1 or n_out % a_out or n_in % a_in:
            raise AdapterError(
                f"shape ({a_out}, {a_in}) does not fit a layer of {n_out} outputs and {n_in} inputs: a_out must divide "
                f"{n_out} and a_in must divide {n_in}. Use shapes='balanced', or name target_modules that it fits."
            )
    return shapes


def _kaiming_uniform(stack: torch.Tensor) -> None:
    """`nn.init.kaiming_uniform_(a=sqrt(5))` for every (m, n) matrix of the stack: uniform in +-1 / sqrt(n)."""
    bound = 1.0 / math.sqrt(stack.shape[-1])
    nn.init.uniform_(stack, -bound, bound)
