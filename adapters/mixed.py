"""A base of mixed precision: plain, int8 and nf4 linear layers in one model, by a bit plan.

transformers quantises a whole model one way at load. Here the model is loaded plain into the main memory and its linear
modules are replaced one by one, so that the accelerator never holds more than the plan's weights.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from .base import BaseModelError, load_base
from .precision import SCORERS, BitPlan, Scorer, assign_bits, budget_fault, importance, lim, stored_bytes, zd

WINDOW = 256  # tokens that are read together
OUTLIER = 6.0  # inputs above it are multiplied in 16 bits, as in arXiv 2208.07339 and in load_base(..., "int8")


def bit_plan(
    model: str,
    scorer: Scorer = "nll",
    *,
    levels: Sequence[int] = (16, 8, 4),
    avg_bits: float = 5.0,
    texts: Iterable[str] = (),
    tokens: int = 1024,
    **options: Any,
) -> BitPlan:
    """Load a model unquantised, score its transformer layers, and give each its bits.

    Args:
        model: as in `load_base`.
        scorer: "lim" (how much a layer changes its input), "zd" (how its weights are distributed; needs no text and no
            accelerator), or "nll" (the measured rise of the loss with this layer alone at the lowest level: one forward
            pass over the sample for every layer).
        levels: bits a layer may have, of 16, 8 and 4.
        avg_bits: the most bits a weight on average, without the scales.
        texts: what lim and nll read, in this order, until there are enough tokens.
        tokens: how many of them.
        options: of `load_base`: revision, dtype, device...

    Raises:
        BaseModelError: no such model, scorer or budget, a model without linear modules, or too little text.
    """
    if scorer not in SCORERS:
        raise BaseModelError(f"scorer {scorer!r} is unknown; allowed: 'lim', 'zd' or 'nll'")
    if fault := budget_fault(levels, avg_bits):
        raise BaseModelError(fault)
    if scorer == "zd":
        options = {"device": "cpu"} | options
    base, tokenizer = load_base(model, None, **options)
    windows = None if scorer == "zd" else sample_windows(texts, tokenizer, tokens)
    scores = score_layers(base, scorer, windows, min(levels))
    plan = make_plan(base, scorer, scores, levels, avg_bits, model=str(model), windows=windows)
    return dataclasses.replace(plan, revision=options.get("revision"))


def make_plan(
    base: nn.Module,
    scorer: str,
    scores: Sequence[float],
    levels: Sequence[int],
    avg_bits: float,
    model: str = "",
    windows: torch.Tensor | None = None,
) -> BitPlan:
    """The plan for a loaded, unquantised model whose layers have these scores (L,)."""
    shapes = [[tuple(m.weight.shape) for m in linears(layer).values()] for layer in transformer_layers(base)]
    sizes = [sum(n_out * n_in for n_out, n_in in layer) for layer in shapes]
    bits = assign_bits(importance(scorer, scores), sizes, levels, avg_bits)
    return BitPlan(
        model=model,
        scorer=scorer,
        levels=tuple(levels),
        avg_bits=float(avg_bits),
        bits=tuple(bits),
        scores=tuple(scores),
        weights=tuple(sizes),
        bytes=sum(stored_bytes(m, n, b) for layer, b in zip(shapes, bits, strict=True) for m, n in layer),
        sample=None if windows is None else {"tokens": windows.numel(), "sha256": _fingerprint(windows)},
    )


def _fingerprint(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


# ---------------------------------------------------------------- the model's parts


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that the model's hidden states pass one after the other.

    Raises:
        BaseModelError: they cannot be told from other lists of modules, or hold no linear module.
    """
    config = cast(Any, model).config
    number = config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not lists or getattr(config, "quantization_config", None) is not None:
        why = "its weights are quantised already" if lists else f"it has no list of {number} layers"
        raise BaseModelError(f"mixed precision does not fit a {type(model).__name__}: {why}; use quantization instead")
    layers = list(lists[0])  # the outermost: `modules` comes from the outside in
    if bare := [i for i, layer in enumerate(layers) if not linears(layer)]:
        raise BaseModelError(
            f"layer {bare[0]} of this {type(model).__name__} has no linear module that bitsandbytes could quantise; "
            "use quantization instead of precision"
        )
    return layers


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of one layer by name: quantised ones are subclasses, too."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def quantised(linear: nn.Linear, bits: int, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A linear module with this weight at 16, 8 or 4 bits on the device, as `load_base` quantises whole models."""
    if bits == 16:
        return linear.to(device)
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    packed: dict[int, Any] = {8: Int8Params, 4: Params4bit}  # whose constructors are not typed
    n_in, n_out, weight = linear.in_features, linear.out_features, linear.weight.data.cpu()
    if bits == 8:
        new = cast(Any, Linear8bitLt(n_in, n_out, has_fp16_weights=False, threshold=OUTLIER, device="meta"))
        new.weight = packed[8](weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        new = cast(Any, Linear4bit(n_in, n_out, compute_dtype=dtype, quant_type="nf4", device="meta"))
        new.weight = packed[4](weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new).to(
            device
        )
        if torch.device(device).type == "cpu":
            new.support_avx512bf16_for_cpu = False  # see keep_trainable_layout
    new.bias = None if linear.bias is None else nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return new.train(linear.training)


def set_bits(layer: nn.Module, bits: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, nn.Linear]:
    """Put all linear modules of one layer at this level; what stood there before is returned, for `put_back`."""
    before = linears(layer)
    put_back(layer, {name: quantised(module, bits, dtype, device) for name, module in before.items()})
    return before


def put_back(layer: nn.Module, modules: dict[str, Any]) -> None:
    for name, module in modules.items():
        layer.set_submodule(name, module)


def apply_plan(model: nn.Module, plan: BitPlan, dtype: torch.dtype, device: torch.device | str) -> None:
    """Replace the linear modules of a plain model in the main memory by those of the plan, and move it to the device.

    Raises:
        BaseModelError: the plan was made for a model of other sizes.
    """
    layers = transformer_layers(model)
    sizes = tuple(sum(m.weight.numel() for m in linears(layer).values()) for layer in layers)
    if sizes != plan.weights:
        different = [i for i, (a, b) in enumerate(zip(sizes, plan.weights, strict=False)) if a != b]
        what = (
            f"{len(plan.weights)} layers, and this model has {len(sizes)}"
            if len(sizes) != len(plan.weights)
            else f"{plan.weights[different[0]]} weights in layer {different[0]}, and this model has "
            f"{sizes[different[0]]}"
        )
        raise BaseModelError(f"the bit plan was made for {plan.model!r} with {what}; make one for this model")
    for layer, bits in zip(layers, plan.bits, strict=True):
        set_bits(layer, bits, dtype, device)
    model.to(device)


# ---------------------------------------------------------------- scores


def sample_windows(texts: Iterable[str], tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of the texts, one after the other, in rows of 256 (n, T); a last, shorter row is left
    out.

    Raises:
        BaseModelError: the texts are shorter than two tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            break
    found = min(tokens, len(ids))
    if found < 2:
        raise BaseModelError(f"the sample has {found} tokens; the scores lim and nll need text, of 2 tokens or more")
    return torch.tensor(ids[: whole_rows(found)]).view(-1, min(WINDOW, found))  # (n, T)


def whole_rows(tokens: int) -> int:
    """How many of these tokens are read: whole rows of 256, or one shorter row."""
    return tokens - tokens % min(WINDOW, tokens)


def score_layers(model: nn.Module, scorer: str, windows: torch.Tensor | None, low: int) -> list[float]:
    """The score of each layer (L,) of a loaded, unquantised model. `low` is the level that nll tries."""
    layers = transformer_layers(model)
    if scorer == "zd":
        return [zd([m.weight.data for m in linears(layer).values()]) for layer in layers]
    if windows is None:
        raise BaseModelError(f"the score {scorer!r} needs a text sample")
    return lim_scores(model, layers, windows) if scorer == "lim" else nll_scores(model, layers, windows, low)


@torch.no_grad()
def lim_scores(model: nn.Module, layers: Sequence[nn.Module], windows: torch.Tensor) -> list[float]:
    """`lim` of each layer over all rows of `windows` (n, T), each row read by itself."""
    found: list[list[float]] = [[] for _ in layers]

    def after(scores: list[float]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # (1, T, H)
            scores.append(lim(before, output if isinstance(output, torch.Tensor) else output[0]))

        return hook

    handles = [
        layer.register_forward_hook(after(scores), with_kwargs=True)
        for layer, scores in zip(layers, found, strict=True)
    ]
    try:
        for row in windows:
            model(row[None].to(_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [sum(scores) / len(scores) for scores in found]  # rows are of one length, so this is the mean over tokens


def nll_scores(model: nn.Module, layers: Sequence[nn.Module], windows: torch.Tensor, low: int) -> list[float]:
    """By how much the mean loss over `windows` (n, T) rises, in nats a token, with one layer alone at the level `low`.

    The honest reference: what lim and zd are guesses of. What happens with several layers at once it does not see.
    """
    plain = float(token_nll(model, windows).mean())
    scores = []
    for layer in layers:
        with layer_at(layer, low, cast(Any, model).dtype, _device(model)):
            scores.append(float(token_nll(model, windows).mean()) - plain)
    return scores


@contextmanager
def layer_at(layer: nn.Module, bits: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """One layer at this level inside the block, and as it was after it."""
    before = set_bits(layer, bits, dtype, device)
    try:
        yield
    finally:
        put_back(layer, before)


@torch.no_grad()
def token_nll(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token but the first of its row, in nats: windows (n, T) -> (n, T - 1)."""
    found = []
    for row in windows.to(_device(model)):
        logits = model(row[None], use_cache=False).logits[0, :-1].float()  # (T - 1, V)
        found.append(nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(found).cpu()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
