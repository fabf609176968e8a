"""How much memory a training stage takes, in parts, from the model's configuration and the recipe alone.

Counted are the tensors that are alive at the peak: what autograd keeps for the backward pass of decoder layers of the
Llama kind (RMSNorm in float32, rotary attention, a gated MLP) over frozen weights, the output layer as TRL 1.16 runs
it, in tiles that are never the whole of the logits, and the cache of generation. `naive_saved` in the tests counts the
kept tensors of a real forward pass. Not counted: the libraries, the CUDA context, fragmentation, a reference model.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..adapters.kronecker import weight_is_cheaper
from ..rl.rollout_cache import BITS, group_size
from .schema import Rl, Sft
from .schema_model import BaseModelSection
from .targets import Size, Targets
from .trainer_args import value_of

HALF, SINGLE = 2, 4  # bytes of bfloat16 and float32
# A block of 64 weights has one absmax in 8 bits, 256 of which have a scale in float32 (arXiv 2305.14314).
FOUR_BITS = 0.5 + 1 / 64 + SINGLE / (64 * 256)

# TRL's output layer works on tiles of so many tokens and words. Triton folds a tile where it lies; without it,
# torch's operations hold so many float32 copies at their widest, the backward pass, and a mask.
TILE_TOKENS, TILE_WORDS = 4096, 32768
COPIES, COPIES_WITHOUT_TRITON = 0, 7

RESIDUAL = 128  # of the cache in int4 and int2, the newest tokens, which stay in 16 bits: transformers' default

# Bytes that an optimizer keeps for a trainable parameter. Paged states live here, too, and move to the host under
# pressure.
STATES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_apex_fused": 8,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw": 8,
    "paged_adamw_32bit": 8,
    "paged_adamw_8bit": 2,
    "ademamix": 12,
    "ademamix_8bit": 3,
    "lion": 4,
    "lion_8bit": 1,
    "lion_32bit": 4,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 4,
    "adafactor": 0,
    "sgd": 0,
    "adagrad": 4,
    "rmsprop": 4,
}
# Projections that read the same tensor, which is kept once.
SHARED_INPUTS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage. Training and generation take turns, so the larger one counts."""

    weights: int
    """Of the base: quantised linear layers with their scales, the rest in 16 bits, tied weights once."""
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of one micro-batch."""
    logits: int
    """Tiles of the output layer, and their float32 copies."""
    rollouts: int = 0
    """Generation: the cache, the logits of one step, and dense weights where they are asked for."""

    @property
    def peak(self) -> int:
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        return fixed + max(self.activations + self.logits, self.rollouts)

    @property
    def beyond_weights(self) -> int:
        return self.peak - self.weights

    def parts(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Widths:
    """Of a decoder layer."""

    hidden: int
    query: int  # heads times their size
    key: int  # key and value heads times their size
    inner: int
    heads: int
    layers: int
    words: int

    @classmethod
    def of(cls, config: Any) -> "Widths":
        text = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        return cls(text.hidden_size, heads * size, keys * size, inner, heads, text.num_hidden_layers, text.vocab_size)


def weight_bytes(model: Any, quantization: str | None, avg_bits: float | None = None) -> int:
    """Of a model without adapter; it may be on the meta device. The output layer stays in 16 bits, as transformers
    leaves it.

    avg_bits: of a weight, where layers have different precision.
    """
    output, total = model.get_output_embeddings(), 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output:
            weight = module.weight
            if avg_bits is not None:
                packed = avg_bits / 8 * weight.numel()
            elif quantization == "int8":
                packed = weight.numel() + SINGLE * weight.shape[0]
            else:
                packed = (FOUR_BITS if quantization else HALF) * weight.numel()
            total += packed - HALF * weight.numel()
    return ceil(total) + HALF * sum(p.numel() for p in model.parameters())


def base_bytes(model: Any, base: BaseModelSection) -> int:
    """`weight_bytes` of a recipe's base."""
    return weight_bytes(model, base.quantization, base.precision.avg_bits if base.precision else None)


def adapter_bytes(trainable: int, optim: str = "adamw_torch_fused") -> tuple[int, int, int]:
    """Weights, gradients and states of the optimizer; factors and gates are float32."""
    return SINGLE * trainable, SINGLE * trainable, STATES.get(optim, 8) * trainable


def layer_bytes(
    widths: Widths, targets: Targets, lines: int, length: int, attention: str, dropout: bool = False
) -> int:
    """What a decoder layer keeps for its backward pass over (lines, length) tokens.

    RMSNorms keep their input in float32. Frozen linear layers keep nothing, adapted ones their input and, where it is
    cheaper than the factors, the matrix. Eager attention keeps the scores twice, in float32 and 16 bits, and keys and
    values once a query head.
    """
    tokens = lines * length
    norms = 2 * SINGLE * widths.hidden
    if attention == "eager":
        attended = 3 * HALF * widths.query + (SINGLE + HALF) * widths.heads * length
    else:
        attended = 2 * HALF * widths.query + 2 * HALF * widths.key + SINGLE * widths.heads
    mlp = 3 * HALF * widths.inner
    inputs, matrices = _adapter_keeps(targets, tokens, attention, dropout)
    return tokens * (norms + attended + mlp + inputs // widths.layers) + matrices // widths.layers


def _adapter_keeps(targets: Targets, tokens: int, attention: str, dropout: bool) -> tuple[int, int]:
    """Of all adapted modules together: bytes a token for their inputs, and bytes for their matrices and factors."""
    inputs, matrices, seen = 0, 0, set()
    built = {size: _factors(targets, size) for size in targets.shapes}
    for name, (n_out, n_in) in targets.modules.items():
        parent, _, own = name.rpartition(".")
        group = next((min(names) for names in SHARED_INPUTS if own in names), own)
        if (parent, group) not in seen and not (own == "o_proj" and attention != "eager"):  # that one is kept anyway
            inputs += HALF * n_in
        inputs += (HALF + 1) * n_in if dropout else 0
        seen.add((parent, group))
        a, b = built[n_out, n_in]
        numbers = sum(factor.numel() for factor in (*a, *b))
        # Measured: on the way to a matrix three copies of the factors are kept, else between one and two.
        matrices += HALF * (n_out * n_in + 3 * numbers) if weight_is_cheaper(tokens, a, b) else 3 * numbers
    return inputs, matrices


def _factors(targets: Targets, size: Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The factors A and B of a layer of this size, without numbers."""
    shapes, (n_out, n_in) = targets.shapes[size], size
    counts = [targets.r // len(shapes) + (i < targets.r % len(shapes)) for i in range(len(shapes))]
    a = [torch.empty(k, o, i, device="meta") for k, (o, i) in zip(counts, shapes, strict=True)]
    b = [torch.empty(k, n_out // o, n_in // i, device="meta") for k, (o, i) in zip(counts, shapes, strict=True)]
    return a, b


def activation_bytes(
    widths: Widths,
    targets: Targets,
    lines: int,
    length: int,
    attention: str,
    checkpointing: bool,
    dropout: bool = False,
) -> int:
    """Kept at the beginning of the backward pass: of every layer all, or, with checkpointing, its input."""
    tokens, kept = lines * length, layer_bytes(widths, targets, lines, length, attention, dropout)
    end = (SINGLE + HALF + SINGLE) * widths.hidden * tokens  # the last norm, its result and the gradient of that
    return end + widths.layers * (HALF * widths.hidden * tokens if checkpointing else kept)


def backward_bytes(widths: Widths, targets: Targets, lines: int, length: int, attention: str, dropout: bool) -> int:
    """One layer computed again, with the gradients of its widest part."""
    gradients = 3 * HALF * widths.inner * lines * length
    if attention == "eager":
        gradients = max(gradients, 2 * SINGLE * widths.heads * lines * length * length)
    return layer_bytes(widths, targets, lines, length, attention, dropout) + gradients


def logit_bytes(tokens: int, words: int, triton: bool) -> int:
    """The tile of TRL's output layer in the backward pass."""
    rows, columns = min(tokens, TILE_TOKENS), min(words, TILE_WORDS)
    copies = COPIES if triton else COPIES_WITHOUT_TRITON
    return rows * (HALF * TILE_WORDS + copies * SINGLE * columns + (0 if triton else columns))


def training_bytes(
    config: Any,
    targets: Targets,
    lines: int,
    length: int,
    *,
    attention: str = "sdpa",
    checkpointing: bool = True,
    triton: bool = True,
    dropout: bool = False,
    scored: int | None = None,
) -> tuple[int, int]:
    """Activations and logits of one micro-batch of (lines, length) tokens.

    Args:
        attention: "eager", or anything else for a kernel that does not keep the scores.
        triton: the output layer runs in Triton, as on a GPU.
        scored: tokens whose log-probability is asked for, where it is not all.

    Returns:
        Bytes that add up to the peak: of the output layer and of a layer computed again, the larger one comes first in
        time and is given, the other one is gone by then.
    """
    widths = Widths.of(config)
    kept = activation_bytes(widths, targets, lines, length, attention, checkpointing, dropout)
    logits = logit_bytes(scored or lines * length, widths.words, triton)
    again = backward_bytes(widths, targets, lines, length, attention, dropout) if checkpointing else 0
    return kept + max(again - logits, 0), logits


def rollout_bytes(
    config: Any,
    completions: int,
    prompt: int,
    completion: int,
    *,
    dense: int = 0,
    shared_prompts: int | None = None,
    cache: str | None = None,
) -> int:
    """Generation of a batch: the cache at its fullest, one layer of it twice while it grows, the logits of a step in
    16 bits and three times in float32, or, where that is more, the prompts on their way through the MLP.

    dense: weights that are made dense for it. shared_prompts: how many prompts are read, where not one a completion.
    cache: of `krontune.rl.rollout_cache`.
    """
    widths, length = Widths.of(config), prompt + completion
    layer = 2 * HALF * widths.key * completions * length
    step = (HALF + 3 * SINGLE) * completions * widths.words
    reading = (4 * HALF * widths.inner + 4 * SINGLE * widths.hidden) * (shared_prompts or completions) * prompt
    kept = _kept_cache(config, cache, widths, layer, 2 * HALF * widths.key * completions * min(length, RESIDUAL))
    return HALF * dense + ceil(kept + layer) + max(step, reading)


def _kept_cache(config: Any, cache: str | None, widths: Widths, layer: int, newest: int) -> float:
    """Bytes of all keys and values. layer: of one layer in 16 bits; newest: of its RESIDUAL last tokens, which int4 and
    int2 leave in 16."""
    if cache is None:
        return widths.layers * layer
    if cache == "offloaded":  # the layer at work, and the next on its way
        return 2 * layer
    if cache == "fp8":
        return widths.layers * layer / 2
    bits = BITS[cache]
    share = (bits / 8 + 2 * HALF / group_size(config, bits)) / HALF
    return widths.layers * (layer * share + newest)


def readable(size: float) -> str:
    """In GB or MB of 1000^3 and 1000^2 bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sft_memory(model: Any, base: BaseModelSection, stage: Sft, targets: Targets, length: int, triton: bool) -> Memory:
    """model: of the base without adapter, on the meta device. length: tokens of the longest row after the cut. The
    stage's adapter and the targets are those that are trained on."""
    trainer = stage.trainer
    activations, logits = training_bytes(
        model.config,
        targets,
        value_of(trainer, "per_device_train_batch_size"),
        length,
        attention=base.attn_implementation or "sdpa",
        checkpointing=bool(value_of(trainer, "gradient_checkpointing")),
        triton=triton,
        dropout=bool(stage.adapter and stage.adapter.dropout > 0),
    )
    adapter = adapter_bytes(targets.trainable, value_of(trainer, "optim"))
    return Memory(base_bytes(model, base), *adapter, activations, logits)


def rl_memory(model: Any, base: BaseModelSection, stage: Rl, targets: Targets, prompt: int, triton: bool) -> Memory:
    """prompt: tokens of the longest prompt. The stage's adapter and the targets are those that are trained on."""
    trainer = stage.trainer
    batch, group = (value_of(trainer, key) for key in ("per_device_train_batch_size", "num_generations"))
    completion = value_of(trainer, "max_completion_length")
    lines, length = batch, prompt + completion
    if stage.share_prompts:  # the completions of a prompt lie on one line
        places = min(group, batch)
        lines, length = ceil(batch / places), prompt + places * completion
    activations, logits = training_bytes(
        model.config,
        targets,
        lines,
        length,
        attention=base.attn_implementation or "sdpa",
        checkpointing=bool(value_of(trainer, "gradient_checkpointing")),
        triton=triton,
        dropout=bool(stage.adapter and stage.adapter.dropout > 0),
        scored=batch * completion,
    )
    completions = generated_at_once(stage)
    rollouts = rollout_bytes(
        model.config,
        completions,
        prompt,
        completion,
        dense=dense_numbers(model, base, targets) if base.dense_generation else 0,
        shared_prompts=ceil(completions / group) if stage.share_prompts else None,
        cache=stage.cache,
    )
    adapter = adapter_bytes(targets.trainable, value_of(trainer, "optim"))
    return Memory(base_bytes(model, base), *adapter, activations, logits, rollouts)


def generated_at_once(stage: Rl) -> int:
    """Completions that are sampled together, of one process."""
    trainer = stage.trainer
    batch = value_of(trainer, "per_device_train_batch_size")
    if value_of(trainer, "generation_batch_size"):
        return value_of(trainer, "generation_batch_size")
    return batch * (value_of(trainer, "steps_per_generation") or value_of(trainer, "gradient_accumulation_steps"))


def dense_numbers(model: Any, base: BaseModelSection, targets: Targets) -> int:
    """Weights that are quantised or adapted."""
    if base.quantization is None and base.precision is None:
        return sum(n_out * n_in for n_out, n_in in targets.modules.values())
    output = model.get_output_embeddings()
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not output)
    return sum(module.weight.numel() for module in linear)
