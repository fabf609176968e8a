"""What an adapted layer holds: the factors and gates of its adapters, and their update."""

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from .config import AdapterError, MokaConfig, Shape
from .identity import Fixed, identity_mix, identity_sizes
from .initial import kaiming_uniform, start_at_nearest
from .kronecker import balanced_shapes, divisors, kron_stacks, kron_weight, sum_all
from .ladder import ladder_shapes


def quantisation_of(module: nn.Module) -> QuantizationBackend | None:
    """How the weight of a layer without adapter is packed, for reading it; None where it is plain."""
    # torchao's asks for the way to quantise again, which reading never takes.
    return resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gate(nn.Module):
    """The mixture weights of one layer: softmax of the logits g (r,), or 1 / r where they are not learned."""

    def __init__(self, r: int, learned: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(r)) if learned else None
        self.r = r

    def forward(self, device: torch.device) -> torch.Tensor:
        if self.logits is None:
            return torch.full((self.r,), 1.0 / self.r, device=device)
        return torch.softmax(at_least_float32(self.logits), dim=0)  # (r,)


def keep_float32(model: nn.Module) -> None:
    """Give MoKA's parameters float32 again after a trainer has cast them.

    TRL casts every trainable parameter over a quantised base to bfloat16, whose neighbours of 0.1 are 0.0005 away, so
    that steps of a usual learning rate round to nothing. One process undoes that by itself at the next forward pass;
    several need this call between the making of the trainer and `train()`, when DDP has not yet taken the parameters.
    Adapters made with `autocast_adapter_dtype=False` are left in the dtype of the base.
    """
    for module in model.modules():
        if isinstance(module, MokaLayer):
            for name in module.moka_gate:
                if module.moka_fp32[name]:
                    module.keep_float32(name)


class MokaLayer(BaseTunerLayer):
    """What PEFT needs to know of an adapted layer, and its update of one adapter."""

    adapter_layer_names = ("moka_A", "moka_B", "moka_gate")
    other_param_names = ("moka_dropout", "moka_alpha", "moka_scale", "moka_counts", "moka_identity", "moka_fp32")

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
        self.moka_identity: dict[str, Fixed | None] = {}  # the factor that is not held, being the identity
        self.moka_fp32: dict[str, bool] = {}  # whether the adapter's parameters are to be float32
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept_base: dict[str, Any] | None = None  # the base weight while adapters are merged into it
        self.lost_in_merge: list[tuple[float, float]] = []  # squared norms of what was lost and of the update
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
        pattern: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the factors and the gate of one adapter to this layer; `pattern` is its key in `shapes_pattern`."""
        shapes = resolve_shapes(config, self.out_features, self.in_features, pattern)
        if not isinstance(config.shapes_of(pattern), str) and len(shapes) > r:
            raise AdapterError(
                f"{_asked_by(pattern)}{len(shapes)} shapes for r = {r} products; give at most {r} shapes, or a larger r"
            )
        shapes = shapes[:r]
        counts = [r // len(shapes) + (i < r % len(shapes)) for i in range(len(shapes))]
        first, second = [], []
        for k, (a_out, a_in) in zip(counts, shapes, strict=True):
            first += [torch.empty(k, a_out, a_in)]
            second += [torch.empty(k, self.out_features // a_out, self.in_features // a_in)]
        self.moka_A[adapter_name] = nn.ParameterList([] if config.identity == "A" else first)
        self.moka_B[adapter_name] = nn.ParameterList([] if config.identity == "B" else second)
        self.moka_gate[adapter_name] = Gate(r, learned=config.gate == "softmax")
        self.moka_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity()
        self.moka_alpha[adapter_name] = alpha
        self.moka_scale[adapter_name] = 1.0
        self.moka_counts[adapter_name] = counts
        self.moka_identity[adapter_name] = config.identity
        self.moka_fp32[adapter_name] = True
        self._initialise(adapter_name, config, pattern)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _initialise(self, adapter_name: str, config: MokaConfig, pattern: str | None) -> None:
        a, b = self.held(adapter_name)
        # On a ladder every A starts with the numbers of a LoRA's, so that a step of one size means the same to each.
        whole = self.in_features if config.is_ladder(pattern) else None
        for stack in (*a, *b):
            kaiming_uniform(stack, whole)
        if config.init_weights is False:
            return
        for stack in b or a:  # the only factor, where the other one is the identity
            nn.init.zeros_(stack)
        if config.init_weights == "nearest" and not config.inference_mode and a[0].device.type != "meta":
            if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
                name = type(self.get_base_layer()).__name__
                raise AdapterError(f"a {name} cannot be de-quantised, which init_weights='nearest' needs; use True")
            weight = self.base_matrix()
            if weight.device.type != "meta":
                start_at_nearest([stack.data for stack in a], weight.to(a[0].device), whole)

    def held(self, adapter_name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The trained factors of one adapter, as `stacks` gives them; an empty list for the identity."""
        a, b = (cast(nn.ParameterList, layers[adapter_name]) for layers in (self.moka_A, self.moka_B))
        return list(a), list(b)

    def stacks(self, adapter_name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The factors A_i and B_i of one adapter: one tensor (k, m, n) a shape, in the order of `moka_counts`."""
        a, b = self.held(adapter_name)
        if self.moka_identity[adapter_name] == "A":
            a = [self._identities(b_k, self.in_features // b_k.shape[2]) for b_k in b]
        elif self.moka_identity[adapter_name] == "B":
            b = [self._identities(a_k, self.in_features // a_k.shape[2]) for a_k in a]
        return a, b

    @staticmethod
    def _identities(other: torch.Tensor, size: int) -> torch.Tensor:
        return torch.eye(size, device=other.device, dtype=other.dtype).expand(len(other), size, size)

    def mixture_weights(self, adapter_name: str) -> torch.Tensor:
        """scale * alpha * softmax(g), (r,), float32 or above."""
        a, b = self.held(adapter_name)
        device = (a or b)[0].device
        scale = self.moka_scale[adapter_name] * self.moka_alpha[adapter_name]
        return scale * self.moka_gate[adapter_name](device)

    def update(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """delta W x for one adapter, computed in the dtype of x: x (..., in_features) -> (..., out_features)."""
        self._undo_cast(adapter_name)
        a, b = ([stack.to(x.dtype) for stack in held] for held in self.held(adapter_name))
        x = self.moka_dropout[adapter_name](x)
        gates = self.mixture_weights(adapter_name).split(self.moka_counts[adapter_name])
        fixed = self.moka_identity[adapter_name]
        return kron_stacks(x, a, b, gates) if fixed is None else identity_mix(x, a or b, gates, fixed)

    def _undo_cast(self, adapter_name: str) -> None:
        """Give an adapter that a trainer cast to 16 bits float32 again, see `keep_float32`.

        Not where a wrapper has taken the parameters: FSDP and DeepSpeed cast them for the forward pass and keep float32
        themselves, and would never see what is put in their place; DDP would no longer add up the gradients.
        """
        if not self.moka_fp32[adapter_name] or not self._cast_parameters(adapter_name):
            return
        if getattr(self, "_is_fsdp_managed_module", False):  # set by FSDP, and by nothing here
            return
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not together or torch.distributed.get_world_size() == 1:
            self.keep_float32(adapter_name)
        elif DistributedDataParallel._get_active_ddp_module() is not None:
            raise AdapterError(
                "the MoKA parameters were cast to 16 bits before DDP took them, as TRL does over a quantised base; so "
                "cast, small steps round to nothing. Call krontune.adapters.keep_float32(trainer.model) when the "
                "trainer is made, before train()"
            )

    def _cast_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        held = [layers[adapter_name] for layers in (self.moka_A, self.moka_B, self.moka_gate)]
        return [p for module in held for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)]

    def keep_float32(self, adapter_name: str) -> None:
        """Give the parameters of an adapter float32; they stay the objects that an optimizer holds."""
        for parameter in self._cast_parameters(adapter_name):
            with torch.inference_mode(False):  # a tensor made in inference mode would never get a gradient again
                parameter.data = parameter.data.float()

    def delta_matrix(self, adapter_name: str) -> torch.Tensor:
        """delta W (out_features, in_features) in float32 or above."""
        a, b = self.stacks(adapter_name)
        gates = self.mixture_weights(adapter_name).split(self.moka_counts[adapter_name])
        wide = ([at_least_float32(stack) for stack in stacks] for stacks in (a, b))
        return sum_all(kron_weight(a_k, b_k, g) for a_k, b_k, g in zip(*wide, gates, strict=True))

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`delta_matrix` as the base lays out its weight: (in_features, out_features) for the Conv1D of GPT-2."""
        delta = self.delta_matrix(adapter_name)
        return delta.T if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive, so `peft.convert_to_lora` works; what exceeds the rank asked for is lost."""
        return True

    @property
    def transposed(self) -> bool:
        """Whether the base holds its weight as (in_features, out_features), as the Conv1D of GPT-2 does."""
        return isinstance(self.get_base_layer(), Conv1D)

    @torch.no_grad()
    def base_matrix(self) -> torch.Tensor:
        """W (out_features, in_features) in float32 or above, de-quantised."""
        weight = at_least_float32(self.get_base_weight())
        return weight.T if self.transposed else weight

    @torch.no_grad()
    def adapted_weight(self) -> torch.Tensor:
        """W + delta W of the active adapters, (out_features, in_features) in float32 or above, W de-quantised."""
        weight = self.base_matrix()
        for name in self.active_adapters:
            if name in self.moka_A:
                weight = weight + self.delta_matrix(name).to(weight.device)
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


def shapes_key(config: MokaConfig, pattern: str | None = None) -> str:
    """What stands behind a layer's sizes in the keys of `resolved_shapes`: all that the choice of shapes depends on."""
    choice = "-ladder" if config.is_ladder(pattern) else f"-{config.identity}" if config.identity else ""
    return f"{config.n_shapes}{choice}" + ("" if pattern is None else f":{pattern}")


def resolve_shapes(config: MokaConfig, n_out: int, n_in: int, pattern: str | None = None) -> list[Shape]:
    """The shapes in use for a layer of this size under a key of `shapes_pattern`; written to `config.resolved_shapes`.

    Raises:
        AdapterError: a shape asked for does not divide the layer.
    """
    key, wanted = f"{n_out}x{n_in}:{shapes_key(config, pattern)}", config.shapes_of(pattern)
    if not isinstance(wanted, str):
        config.resolved_shapes[key] = [(int(o), int(i)) for o, i in wanted]
    elif key not in config.resolved_shapes:
        config.resolved_shapes[key] = _own_shapes(config, n_out, n_in, pattern)
    shapes = [(o, i) for o, i in config.resolved_shapes[key]]
    for a_out, a_in in shapes:
        shape = f"{_asked_by(pattern)}shape ({a_out}, {a_in})"
        if a_out < 1 or a_in < 1 or n_out % a_out or n_in % a_in:
            raise AdapterError(
                f"{shape} does not fit a layer of {n_out} outputs and {n_in} inputs: a_out must divide {n_out} "
                f"({_listed(divisors(n_out))}) and a_in must divide {n_in} ({_listed(divisors(n_in))}). Use "
                "shapes='balanced', or name target_modules that it fits."
            )
        size = {"A": (a_out, a_in), "B": (n_out // a_out, n_in // a_in)}.get(config.identity or "")
        if size is not None and size[0] != size[1]:
            raise AdapterError(
                f"{shape} on a layer of {n_out} outputs and {n_in} inputs makes {config.identity} "
                f"{size[0]} x {size[1]}, and an identity is square; use shapes='balanced' or other shapes"
            )
    return shapes


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _asked_by(pattern: str | None) -> str:
    return "" if pattern is None else f"shapes_pattern[{pattern!r}]: "


def _own_shapes(config: MokaConfig, n_out: int, n_in: int, pattern: str | None) -> list[Shape]:
    if config.identity is None:
        choose = ladder_shapes if config.is_ladder(pattern) else balanced_shapes
        return choose(n_out, n_in, config.n_shapes)
    sizes = identity_sizes(n_out, n_in, config.n_shapes)
    if sizes == [1]:
        raise AdapterError(
            f"identity={config.identity!r} needs a common divisor of the layer's sizes above 1, and {n_out} outputs "
            f"and {n_in} inputs have none; use identity=None, or leave the layer out"
        )
    return [(size, size) if config.identity == "A" else (n_out // size, n_in // size) for size in sizes]
