"""Which transformer layers of a base keep more bits: importance scores, the budget, and the plan as a file.

After Layer-Wise Quantization (arXiv 2406.17415): score every transformer layer once, give the most important ones more
bits and the others fewer. How a layer is then quantised is a choice of its own, see `mixed`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import torch

from .base import BaseModelError

Scorer = Literal["lim", "zd", "nll"]
SCORERS = ("lim", "zd", "nll")
LEVELS = (16, 8, 4)
PLAN = "bit_plan.json"

# Of bitsandbytes: weights that share a scale in 4 bits, and scales that share one in the second quantisation.
BLOCK, NESTED_BLOCK = 64, 256


def lim(before: torch.Tensor, after: torch.Tensor) -> float:
    """Layer input modification of one layer: minus the mean cosine similarity of its input and output.

    Larger is more important: the layer changes more. Between -1, the identity, and 1.

    Args:
        before, after: hidden states before and after the layer (..., H), all of one text sample.

    Source: arXiv 2406.17415, section 3.1, from its abstract and what other papers quote of it; the paper's own text was
    not at hand, so no equation number is given. Here each token's similarity counts alike.
    """
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)  # (...,)
    return -float(cosine.mean())


def zd(weights: Sequence[torch.Tensor]) -> float:
    """z-score distribution of one layer: the share of its weights more than one standard deviation above their mean.

    Smaller is more important. About 0.1587 for weights from a Gaussian. Scale and shift of the weights do not matter.

    Args:
        weights: the layer's matrices, of any shapes; they are pooled.

    Source: arXiv 2406.17415, section 3, from its abstract ("weights that are much larger than average") with the
    threshold z > 1 that others quote; some of them count |z| > 1. The paper's own text was not at hand.
    """
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.sum(dtype=torch.float64)) for w in weights) / count
    variance = sum(float((w.float() - mean).square().sum(dtype=torch.float64)) for w in weights) / count
    return sum(int((w.float() - mean > variance**0.5).sum()) for w in weights) / count


def importance(scorer: str, scores: Sequence[float]) -> list[float]:
    """The scores with their sign turned where a smaller one means more important, as in zd."""
    return [-score for score in scores] if scorer == "zd" else list(scores)


def levels_fault(levels: Sequence[int]) -> str | None:
    """What is wrong with these levels, in words."""
    unknown = [level for level in levels if level not in LEVELS]
    if unknown:
        return f"level {unknown[0]} is not possible; allowed: 16 (as loaded), 8 (int8) and 4 (nf4)"
    if len(set(levels)) < len(levels) or len(levels) < 2:
        return f"levels {list(levels)}: give two or three different ones of 16, 8 and 4; for one alone use quantization"
    return None


def budget_fault(levels: Sequence[int], avg_bits: float) -> str | None:
    """What is wrong with these levels and this average, in words; None where a plan exists."""
    if fault := levels_fault(levels):
        return fault
    if not min(levels) <= avg_bits <= max(levels):
        below, above = avg_bits < min(levels), avg_bits > max(levels)  # neither for NaN
        side = "below the smallest of" if below else "above the largest of" if above else "not within"
        return f"avg_bits {avg_bits} is {side} the levels {list(levels)}; give {min(levels)} to {max(levels)}"
    return None


def assign_bits(importance: Sequence[float], sizes: Sequence[int], levels: Sequence[int], avg_bits: float) -> list[int]:
    """Bits for each layer (L,), on average over the weights at most `avg_bits`.

    Greedy from the least important layer: all layers begin at the highest level and go down to the next one, one by one
    and the least important first; when all have gone and the average is still too high, they go one level further. The
    first plan within the budget is taken. So at most two neighbouring levels stand in a plan, and no layer has fewer
    bits than a less important one; of all plans like that it has the most bits. Of equally important layers the last
    goes down first. Layers of different size are ordered by importance alone, as in the paper, so a large last layer
    can leave a part of the budget unused.

    Two levels are the paper's case. With three, the neighbouring pair is our choice: the step from 16 to 8 bits costs
    little, so it is taken everywhere before any layer is taken to 4; levels [16, 4] gives the other choice.

    Args:
        importance: larger is more important, (L,).
        sizes: weights of each layer, (L,).
        levels: bits a layer may have, in any order.
        avg_bits: sum(bits * sizes) / sum(sizes) is at most this, compared exactly.

    Raises:
        BaseModelError: no plan keeps to the budget; see `budget_fault`.
    """
    if fault := budget_fault(levels, avg_bits):
        raise BaseModelError(fault)
    order = sorted(range(len(sizes)), key=lambda layer: (importance[layer], -layer))  # the least important first
    steps = sorted(levels, reverse=True)
    budget = Fraction(str(avg_bits)) * sum(sizes)
    bits = [steps[0]] * len(sizes)
    used = sum(b * size for b, size in zip(bits, sizes, strict=True))
    for level in steps[1:]:
        for layer in order:
            if used <= budget:
                return bits
            used -= (bits[layer] - level) * sizes[layer]
            bits[layer] = level
    return bits


def stored_bytes(n_out: int, n_in: int, bits: int) -> int:
    """Bytes that a matrix (n_out, n_in) takes at this level, with its scales: 16 bits plain, int8 with one float32 a
    row, or nf4 with double quantisation. The lookup tables, of the same size for every matrix, are left out."""
    if bits == 16:
        return 2 * n_out * n_in
    if bits == 8:
        return n_out * n_in + 4 * n_out
    blocks = -(-n_out * n_in // BLOCK)
    return -(-n_out * n_in // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4  # and the mean of the scales


@dataclass(frozen=True)
class BitPlan:
    """Bits for every transformer layer of one model, and where they come from.

    The weights that count are those of the linear modules in the transformer layers. Embeddings, norms, biases and the
    output layer stay as loaded and are in no average.
    """

    model: str
    """As it was named when the plan was made."""
    scorer: str
    levels: tuple[int, ...]
    avg_bits: float
    """As asked for."""
    bits: tuple[int, ...]
    """Of each layer, the first layer first."""
    scores: tuple[float, ...]
    """Of each layer, as the scorer gives them."""
    weights: tuple[int, ...]
    """How many each layer has."""
    bytes: int
    """Of all these weights as stored, with the scales that quantisation adds."""
    sample: dict[str, Any] | None = None
    """Of the text that lim and nll read: tokens, and a fingerprint."""
    revision: str | None = None
    """Of the model."""

    @property
    def average_bits(self) -> float:
        """Of the levels, over the weights."""
        return sum(b * n for b, n in zip(self.bits, self.weights, strict=True)) / sum(self.weights)

    @property
    def stored_bits(self) -> float:
        """A weight, with the scales."""
        return 8 * self.bytes / sum(self.weights)

    def counts(self) -> dict[int, int]:
        """How many layers have each level."""
        return {level: self.bits.count(level) for level in sorted(self.levels, reverse=True)}

    def save(self, path: str | Path) -> Path:
        """Write the plan to this file, or, for a folder, to bit_plan.json in it; whole or not at all."""
        path = Path(path) / PLAN if Path(path).is_dir() else Path(path)
        averages = {"average_bits": self.average_bits, "stored_bits": self.stored_bits}
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(asdict(self) | averages, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a file, or from bit_plan.json in a folder.

        Raises:
            BaseModelError: there is none, or it is damaged.
        """
        path = Path(path) / PLAN if Path(path).is_dir() else Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            plan = cls(**{name: _tuple(found[name]) for name in cls.__dataclass_fields__})
            lengths = {len(plan.bits), len(plan.scores), len(plan.weights)}
            if len(lengths) != 1 or not plan.bits or not set(plan.bits) <= set(LEVELS):
                raise ValueError("its lists differ in length, or it has bits other than 16, 8 and 4")
        except OSError as error:
            raise BaseModelError(f"there is no bit plan {str(path)!r}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise BaseModelError(
                f"{str(path)!r} is no bit plan: {reason}. Delete it, or make it anew with bit_plan()."
            ) from error
        return plan


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
