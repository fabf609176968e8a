"""Which attention heads read locally and which globally, and what the two groups say together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any

import torch

from .errors import RlError
from .rhythm import Rhythm

# By layer, the indices of its local and of its global heads.
Heads = dict[int, tuple[list[int], list[int]]]

SCHEDULES = ("averaged", "fixed", "per_batch")


def split_heads(span: Mapping[int, torch.Tensor], quantile: float = 0.3) -> Heads:
    """The heads of all layers with the shortest mean look-back (local) and with the longest (global).

    span: by layer (H,), tokens. quantile: the share of heads, of all layers together, in each group, rounded half
    up and at least one head; 1 puts every head in both, which is the paper's control without a split.

    A layer may end with no head in a group. Equal spans are taken in the order of layers and heads.
    Source: arXiv 2510.13554 v2, section 4, "e.g." 30 %.
    """
    if not 0 < quantile <= 1:
        raise RlError(f"quantile must be in (0, 1], got {quantile}")
    ranked = sorted((float(value), layer, head) for layer in span for head, value in enumerate(span[layer].tolist()))
    size = max(1, floor(quantile * len(ranked) + 0.5))
    heads: Heads = {layer: ([], []) for layer in span}
    for group, chosen in enumerate((ranked[:size], ranked[-size:])):
        for _, layer, head in sorted(chosen, key=lambda item: item[1:]):
            heads[layer][group].append(head)
    return heads


def pool(rhythms: Mapping[int, Rhythm], heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """WAAD averaged over the local heads of all layers and FAI over the global ones: (B, T) each.

    rhythms: as `probe` returns them, of all heads or of these heads alone.
    Source: arXiv 2510.13554 v2, eq. 8: a plain mean over the group. It commutes with eq. 9 and 10, which are linear.
    """
    waad, fai = [], []  # of (B, h, T)
    for layer, rhythm in rhythms.items():
        local, remote = heads[layer]
        whole = rhythm.span is not None
        waad.append(rhythm.waad[:, local] if whole else rhythm.waad)
        fai.append(rhythm.fai[:, remote] if whole else rhythm.fai)
    device = waad[0].device  # layers may lie on several
    mean_waad, mean_fai = (torch.cat([part.to(device) for part in parts], 1).mean(1) for parts in (waad, fai))
    return mean_waad, mean_fai


def turnover(before: Heads, after: Heads) -> float:
    """How much of the two groups is new: 1 - |both| / |either|, the mean of local and global; in [0, 1]."""
    changes = []
    for group in (0, 1):
        old, new = ({(layer, head) for layer in heads for head in heads[layer][group]} for heads in (before, after))
        changes.append(1 - len(old & new) / len(old | new))
    return sum(changes) / 2


@dataclass
class HeadSplit:
    """The split through training: from spans pooled over rows, batches and processes.

        with probe(model, ..., heads=split.settled) as rhythms: ...
        heads = split.update(rhythms, response_mask)
        waad, fai = pool(rhythms, heads)

    Long look-backs are also those of heads parked on the first token, and grow with the prompt; pooling keeps the
    split from following single prompts.

    schedule: "averaged" weighs each measured batch `decay` times less than the next, and measures every `refresh`-th;
        "fixed" pools the first `warmup` batches and stays there; "per_batch" splits each batch by itself.
    quantile: see `split_heads`.
    turnover: of the last measured batch against the one before it, see `turnover`; 0 at the first.

    The paper (arXiv 2510.13554) says neither how nor how often it splits: schedule, decay, refresh and warmup are
    this library's. Every response token weighs the same; the paper's eq. 7 is of one sequence.

    Raises RlError for an unknown schedule or numbers out of range.
    """

    schedule: str = "averaged"
    quantile: float = 0.3
    decay: float = 0.9
    refresh: int = 8
    warmup: int = 4
    turnover: float = field(default=0.0, init=False)
    _heads: Heads | None = field(default=None, init=False)
    _total: dict[int, torch.Tensor] = field(default_factory=dict, init=False)  # by layer (H,): token-weighted spans
    _tokens: float = field(default=0.0, init=False)
    _batches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise RlError(f"unknown schedule {self.schedule!r} of the head split; schedules: {', '.join(SCHEDULES)}")
        if not 0 < self.quantile <= 1 or not 0 <= self.decay < 1:
            raise RlError(f"quantile must be in (0, 1] and decay in [0, 1), got {self.quantile} and {self.decay}")
        if self.refresh < 1 or self.warmup < 1:
            raise RlError(f"refresh and warmup count batches from 1, got {self.refresh} and {self.warmup}")

    @property
    def settled(self) -> Heads | None:
        """The heads to read of the next batch; None where all must be, because their spans are wanted."""
        wanted = {
            "averaged": self._batches % self.refresh == 0,
            "fixed": self._batches < self.warmup,
            "per_batch": True,
        }
        return None if wanted[self.schedule] else self._heads

    def update(self, rhythms: Mapping[int, Rhythm], response_mask: torch.Tensor) -> Heads:
        """Takes one batch, and returns the split to read it with.

        Where spans were measured, every process must call it, since they are summed over all of them; the response
        mask (B, T) is that of the probe. A batch without any response changes nothing.
        """
        self._batches += 1
        measured = {layer: rhythm.span for layer, rhythm in rhythms.items() if rhythm.span is not None}
        if not measured:
            assert self._heads is not None
            return self._heads
        total, tokens = _sum_of_processes(measured, response_mask)
        if tokens == 0:
            return self._heads or split_heads(total, self.quantile)
        keep = {"averaged": self.decay, "fixed": 1.0, "per_batch": 0.0}[self.schedule]
        self._total = {layer: total[layer] + keep * self._total.get(layer, 0) for layer in total}
        self._tokens = tokens + keep * self._tokens
        heads = split_heads({layer: some / self._tokens for layer, some in self._total.items()}, self.quantile)
        self.turnover = 0.0 if self._heads is None else turnover(self._heads, heads)
        self._heads = heads
        return heads

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as the unbroken one."""
        return {name: getattr(self, name) for name in ("turnover", "_heads", "_total", "_tokens", "_batches")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def _sum_of_processes(
    span: Mapping[int, torch.Tensor], response_mask: torch.Tensor
) -> tuple[dict[int, torch.Tensor], float]:
    """Spans (B, H) by layer, weighted by response tokens, summed over rows and processes: (H,) by layer, and tokens."""
    device = next(iter(span.values())).device
    tokens = response_mask.to(device).bool().sum(1).float()  # (B,)
    sums = [tokens @ rows.to(device, torch.float32) for rows in span.values()]
    flat = torch.cat([*sums, tokens.sum()[None]])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat)
    *parts, total = flat.cpu().split([*(len(some) for some in sums), 1])
    return dict(zip(span, parts, strict=True)), total.item()
