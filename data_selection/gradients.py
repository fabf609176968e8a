"""Exact gradients of every sample's loss with respect to an adapter's parameters, a batch at a time.

The loss of a sample is the mean NLL of its answer tokens. LoRA and MoKA are known, over any base that PEFT puts them
on: the base only has to pass gradients through. Nothing below the lowest layer asked for is run backward.

Source of the sample vectors: arXiv 2410.10636, after LESS (arXiv 2402.04333), which take them one sample at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.base import keep_trainable_layout
from ..adapters.layer import MokaLayer
from .per_sample import kron_gradient, linear_gradient, softmax_gradient
from .projections import CountSketch, FactorProjection, Shape
from .scores import answer_logits, answer_places, token_scores_and_gradient
from .texts import DataSelectionError

Layers = Literal["last", "all"] | Sequence[int]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which parameters gradients are taken of.

    Args:
        layers: the decoder layers, increasing.
        names: of the parameters, in the order of the model's `named_parameters`.
        shapes: (k, m, n) of each, k matrices; a gradient is the parameters' one after the other.
        modules: the adapted layers and the place of each of their parameters in `names`, by the name within the layer.
        adapter: the active adapter.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    modules: tuple[tuple[BaseTunerLayer, Mapping[str, int]], ...]
    adapter: str

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has."""
        return [prod(shape) for shape in self.shapes]

    @property
    def starts(self) -> list[int]:
        """Where each parameter begins in a gradient."""
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    @property
    def size(self) -> int:
        """Length of a gradient."""
        return sum(self.sizes)


def plan_gradients(model: Any, layers: Layers) -> Plan:
    """The parameters of the active adapter in some decoder layers.

    Args:
        model: a `peft.PeftModel` with one active adapter, LoRA or MoKA.
        layers: "last", "all", or the numbers of decoder layers.

    Raises:
        DataSelectionError: the adapter is of another kind, there is none in a layer asked for, it is merged, or a
            factor is zero, so that the gradients of its partner are zero for every sample.
    """
    adapter = _active_adapter(model)
    decoder = model.get_base_model().get_decoder()
    stack = next((child for child in decoder.children() if isinstance(child, nn.ModuleList)), None)
    if stack is None:
        raise DataSelectionError(f"a {type(decoder).__name__} holds no list of layers; gradients cannot be taken of it")
    held = {i: _adapted(block, adapter) for i, block in enumerate(stack)}
    numbers = _layer_numbers(layers, [i for i, modules in held.items() if modules], len(stack))
    modules = {id(module) for i in numbers for module in held[i]}
    names, shapes, chosen = list[str](), list[Shape](), list[tuple[BaseTunerLayer, dict[str, int]]]()
    for name, module in model.named_modules():
        if id(module) not in modules:
            continue
        places = {}
        for inner, parameter in module.named_parameters():
            if _is_of_adapter(inner, adapter):
                places[inner] = len(names)
                names.append(f"{name}.{inner}")
                shapes.append(_as_matrices(parameter))
        chosen.append((module, places))
    _check_factors(chosen, adapter, names)
    return Plan(tuple(numbers), tuple(names), tuple(shapes), tuple(chosen), adapter)


def _active_adapter(model: Any) -> str:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise DataSelectionError(
            f"gradients are taken of an adapter, and a {type(model).__name__} has none; wrap it with "
            "peft.get_peft_model and train it for some steps, or pass gradients=None"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise DataSelectionError(f"the active adapters are {list(active)}; set one active with model.set_adapter(name)")
    return active[0]


def _adapted(block: nn.Module, adapter: str) -> list[BaseTunerLayer]:
    found = []
    for name, module in block.named_modules():
        if not isinstance(module, BaseTunerLayer) or adapter not in _adapters_of(module):
            continue
        if module.merged or module.disable_adapters:
            raise DataSelectionError(f"the adapter is merged or disabled at {name}; unmerge or enable it first")
        if isinstance(module, LoraLayer):
            _check_lora(module, adapter, name)
        elif not isinstance(module, MokaLayer):
            raise DataSelectionError(
                f"{name} holds a {type(module).__name__}; per-sample gradients are known for LoRA and MoKA layers"
            )
        found.append(module)
    return found


def _adapters_of(module: BaseTunerLayer) -> set[str]:
    return {adapter for names in module.adapter_layer_names for adapter in getattr(module, names)}


def _check_lora(module: LoraLayer, adapter: str, name: str) -> None:
    parts = [module.lora_A[adapter], module.lora_B[adapter]] if adapter in module.lora_A else []
    if adapter in module.lora_variant or not parts or not all(isinstance(part, nn.Linear) for part in parts):
        raise DataSelectionError(
            f"{name}: per-sample gradients are known for plain LoRA over linear layers, not for embeddings, "
            "convolutions or variants such as DoRA; leave them out of the adapter"
        )
    if any(part.bias is not None for part in parts):
        raise DataSelectionError(f"{name}: LoRA with a bias of its own is not known; use lora_bias=False")


def _layer_numbers(layers: Layers, adapted: list[int], depth: int) -> list[int]:
    if not adapted:
        raise DataSelectionError("the active adapter holds nothing in the decoder layers; gradients cannot be taken")
    if layers == "last":
        return adapted[-1:]
    if layers == "all":
        return adapted
    numbers = [] if isinstance(layers, str) else sorted(set(layers))
    if not numbers or not set(numbers) <= set(adapted):
        raise DataSelectionError(
            f"gradients={layers!r}: must be 'last', 'all', None, or numbers of decoder layers that hold the adapter: "
            f"{adapted} of {depth}"
        )
    return numbers


def _is_of_adapter(parameter: str, adapter: str) -> bool:
    """Whether a parameter's name within its layer is of an adapter: `lora_A.NAME.weight`, `moka_gate.NAME.logits`."""
    kind, _, rest = parameter.partition(".")
    return kind.startswith(("lora_", "moka_")) and (rest == adapter or rest.startswith(f"{adapter}."))


def _as_matrices(parameter: torch.Tensor) -> Shape:
    """(k, m, n): one matrix for LoRA, a stack of them for MoKA, a column for the gates' logits."""
    *stack, m, n = (*parameter.shape, 1) if parameter.ndim == 1 else parameter.shape
    return prod(stack), m, n


def _check_factors(chosen: Sequence[tuple[BaseTunerLayer, Mapping[str, int]]], adapter: str, names: list[str]) -> None:
    """Refuse a factor of zeros: its partner's gradients are zero whatever the sample."""
    zero = []
    for module, places in chosen:
        parameters = dict(cast(nn.Module, module).named_parameters())
        if isinstance(module, MokaLayer) and module.moka_identity[adapter] is not None:
            continue  # the partner is an identity, which has no gradient
        factors = [inner for inner in places if not inner.startswith("moka_gate")]
        zero += [names[places[inner]] for inner in factors if not torch.count_nonzero(parameters[inner])]
    if zero:
        raise DataSelectionError(
            f"{len(zero)} factors of the adapter are zero, as in a fresh one ({zero[0]} is the first), so the "
            "gradients of the factors that they multiply are zero for every sample. Train the adapter for some steps "
            "first (a warm-up on a few per cent of the data is customary), then score"
        )


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter with gradients, and activation checkpointing kept where it is on; all is put back.

    Raises:
        DataSelectionError: checkpointing is reentrant, or bitsandbytes has repacked the weights.
    """
    _check_packing(model)
    keep_trainable_layout(model)
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                _check_checkpointing(module)
                module.training = True  # of this module alone: its dropouts stay off
        model.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)


def _check_checkpointing(module: nn.Module) -> None:
    function: Any = module._gradient_checkpointing_func
    keywords = getattr(function, "keywords", {})  # a functools.partial of torch's checkpoint
    if keywords.get("use_reentrant", True):
        raise DataSelectionError(
            "activation checkpointing is reentrant, which runs layers without the graph that per-sample gradients "
            "need; call model.gradient_checkpointing_enable({'use_reentrant': False}), or disable it"
        )


def _check_packing(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        weight: Any = module.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise DataSelectionError(
                f"bitsandbytes has repacked {name} for inference, after which gradients are lost without a word; load "
                "the model anew with krontune.adapters.load_base, which prevents it"
            )


class _Tap(torch.autograd.Function):
    """Hands a layer's output on unchanged; in the backward pass tells `record` the layer's input and the gradient.

    The input is kept as autograd keeps tensors, so that checkpointing drops and recomputes it. `anchor` only makes the
    graph begin here.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, record: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.record(ctx.saved_tensors[0], grad_outputs[0])
        return grad_outputs[0], None, None, None


class Sums:
    """What the gradients of a batch are gathered in, one parameter at a time.

    Args:
        plan: the parameters.
        projection: None to keep gradients whole.
        samples: B.
        device: of the sums.

    Raises:
        DataSelectionError: from the two methods, that a parameter comes twice.
    """

    def __init__(
        self, plan: Plan, projection: CountSketch | FactorProjection | None, samples: int, device: torch.device
    ) -> None:
        self.plan, self.projection, self.starts = plan, projection, plan.starts
        self.vectors = torch.zeros(samples, plan.size if projection is None else projection.size, device=device)
        self.squares = torch.zeros(samples, device=device)
        self.seen = set[int]()

    def take(self, place: int, grads: torch.Tensor) -> None:
        """The gradients (B, k, m, n) float32 of the parameter at a place of the plan."""
        self._first_time(place)
        self._add(place, grads.to(self.vectors.device))

    def take_products(self, place: int, x: torch.Tensor, g: torch.Tensor) -> None:
        """The gradients sum_t g_t x_t^T of a single matrix: x (B, T, n) and g (B, T, m), float32."""
        self._first_time(place)
        x, g = x.to(self.vectors.device), g.to(self.vectors.device)
        if isinstance(self.projection, FactorProjection):
            self.squares.add_(self.projection.put_products(self.vectors, place, x, g))
        else:
            self._add(place, linear_gradient(x, g)[:, None])

    def _add(self, place: int, grads: torch.Tensor) -> None:
        flat, start = grads.flatten(1), self.starts[place]
        self.squares.add_(flat.square().sum(1))
        if isinstance(self.projection, FactorProjection):
            self.projection.put(self.vectors, place, grads)
        elif self.projection is None:
            self.vectors[:, start : start + flat.shape[1]] = flat
        else:
            self.projection.add(self.vectors, flat, start)

    def _first_time(self, place: int) -> None:
        if place in self.seen:
            raise DataSelectionError(
                f"{self.plan.names[place]} is used twice in one forward pass; leave out shared layers"
            )
        self.seen.add(place)


@contextmanager
def tapped(sums: Sums) -> Iterator[None]:
    """Within the block, a backward pass gives `sums` the gradients of every parameter of the plan."""
    plan, samples = sums.plan, len(sums.squares)
    with ExitStack() as hooks:
        for module, places in plan.modules:
            if isinstance(module, MokaLayer):
                record = _moka_record(module, places, plan.adapter, sums)
                hooks.callback(_tap(cast(nn.Module, module), samples, record).remove)
                continue
            for part in ("lora_A", "lora_B"):
                inner = cast(nn.Linear, getattr(module, part)[plan.adapter])
                record = _linear_record(places[f"{part}.{plan.adapter}.weight"], sums)
                hooks.callback(_tap(inner, samples, record).remove)
        yield


def _tap(module: nn.Module, samples: int, record: Callable[[torch.Tensor, torch.Tensor], None]) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        if x.ndim != 3 or len(x) != samples:
            raise DataSelectionError(
                f"an adapted layer is given tokens {tuple(x.shape)} that are not apart by sample (an expert of a "
                "mixture?); leave such layers out of the adapter"
            )
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return cast(torch.Tensor, _Tap.apply(output, x, anchor, record))

    return module.register_forward_hook(hook)


def _linear_record(place: int, sums: Sums) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def record(x: torch.Tensor, g: torch.Tensor) -> None:
        sums.take_products(place, x.float(), g.float())

    return record


def _moka_record(
    module: MokaLayer, places: Mapping[str, int], adapter: str, sums: Sums
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Of y = sum_i gate_i (A_i (x) B_i) x: dgate_i is <dA_i, A_i> and <dB_i, B_i>, before gate_i scales them."""

    def record(x: torch.Tensor, g: torch.Tensor) -> None:
        a, b = module.stacks(adapter)
        gates = module.mixture_weights(adapter)
        of_gates, x, g = dict[int, torch.Tensor](), x.float(), g.float()
        for i, (a_k, b_k, gate) in enumerate(zip(a, b, gates.split(module.moka_counts[adapter]), strict=True)):
            inputs = x.unflatten(2, (a_k.shape[2], b_k.shape[2]))  # (B, T, n_a, n_b)
            outputs = g.unflatten(2, (a_k.shape[1], b_k.shape[1]))  # (B, T, m_a, m_b)
            for name, own, other, x_k, g_k in (
                (f"moka_A.{adapter}.{i}", a_k, b_k, inputs, outputs),
                (f"moka_B.{adapter}.{i}", b_k, a_k, inputs.mT, outputs.mT),
            ):
                if name in places:  # which one of the two is at least
                    grads = kron_gradient(x_k, g_k, other.float())  # (B, k, m, n)
                    of_gates[i] = (grads * own).sum((2, 3))
                    sums.take(places[name], grads * gate[:, None, None])
        logits = f"moka_gate.{adapter}.logits"
        if logits in places:
            weights = module.moka_gate[adapter](g.device)
            scale = module.moka_scale[adapter] * module.moka_alpha[adapter]
            of_logits = softmax_gradient(weights, torch.cat(list(of_gates.values()), dim=1) * scale)
            sums.take(places[logits], of_logits[:, None, :, None])

    return record


@dataclass(eq=False)
class Taken:
    """What one batch gave: `tokens`, its `token_scores` (A,); `vectors` (B, d or sketch size); `norms` (B,)."""

    tokens: dict[str, torch.Tensor]
    vectors: torch.Tensor
    norms: torch.Tensor


def take_gradients(
    model: Any,
    plan: Plan,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    projection: CountSketch | FactorProjection | None = None,
) -> Taken:
    """The gradient of each sample's mean answer NLL, within `scoring_mode`; zero for a sample without an answer.

    Args:
        model: as given to `plan_gradients`.
        plan: the parameters.
        inputs: the model's inputs for a batch.
        labels: (B, T), -100 outside the answers.
        projection: None for whole gradients. With one no whole gradient is ever held, only the gradients of one
            parameter at a time.

    Raises:
        DataSelectionError: a gradient is not finite, or a layer is used twice.
    """
    places, targets, owner = answer_places(labels)
    sums = Sums(plan, projection, len(labels), labels.device)
    with torch.enable_grad(), tapped(sums):
        logits = answer_logits(model, inputs, places)
        weights = 1.0 / torch.bincount(owner, minlength=len(labels))[owner]
        tokens, grad = token_scores_and_gradient(logits.detach(), targets, weights)
        logits.backward(grad)
    if not torch.isfinite(sums.squares).all():
        rows = (~torch.isfinite(sums.squares)).nonzero()[:, 0].tolist()
        raise DataSelectionError(
            f"gradients of the rows {rows} of a batch are not finite; score in bfloat16 or float32"
        )
    return Taken(tokens, sums.vectors, sums.squares.sqrt())
