"""Which tokens of a completion earn or lose more: the preplan, anchor and coupled rules, and their controls.

A rule turns WAAD and FAI (`rhythm.py`) into factors gamma_t >= 1 that multiply a completion's advantage token by
token (arXiv 2510.13554 v2, eq. 12-19). With Delta_t = |WAAD_t - WAAD_{t+1}|:

    preplan (local chunk)   gamma on the top q of Delta
    anchor (global)         gamma on the top q of FAI
    coupled                 as anchor; an anchor inside a chunk gives the share alpha to the token that opens the chunk

The controls take the same number of tokens by chance (random), by the policy's entropy (entropy), from the wrong end
of FAI (bottom), or spread the same sum over all tokens (uniform). In the paper's own tables random tokens earn up to
5 points over plain GRPO, so a gain of a rule is its gain over these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor, isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from .errors import RlError
from .heads import SCHEDULES
from .rhythm import BACKENDS

SIGNS = ("both", "positive", "negative")
NORMALIZATIONS = ("none", "mean")


@dataclass(frozen=True)
class TokenCredit:
    """Settings of token credit. The defaults are those of arXiv 2510.13554 v2 where it states any.

    strategy: "coupled", "anchor", "preplan", or a control: "random", "entropy", "uniform", "bottom", "off".
    window: W of WAAD, in tokens.
    horizon: (low, high) of FAI, in tokens: a token is judged by the attention it gets that many tokens later.
    top_q: share of a response's tokens that is chosen, rounded half up.
    gamma: the factor on a chosen token.
    alpha: share of its bonus that an anchor inside a chunk hands back to the chunk's opening. The paper prints none.
    lookback: how many tokens before an anchor the opening may lie. The paper allows 1 to 3 and does not say which.
    tau_waad: an anchor is inside a chunk only if its WAAD is at most this quantile of its response's. Not printed.
    tau_delta: ... and only if the largest Delta of the lookback is at least this quantile. Not printed.
    sign: of the advantages that are credited: "both", "positive" or "negative". The others keep gamma 1.
    normalize: "mean" divides gamma by its mean over the response, so that only the direction of the gradient changes
        and not its size; "none" is the paper's.
    layers: that are read; None for five of the middle third.
    head_quantile: share of the heads that are local, and that are global. 1 is the control without a split.
    head_split: "averaged" over batches, "fixed" after the first ones, or "per_batch". Not said in the paper.
    head_refresh: with "averaged", the heads are measured in every so-manyth batch. Not said in the paper.
    credit_truncated: credit responses that were cut at the length limit, too. Off, because the FAI of their end is
        that of a text that was going on. The paper does not say.
    exclude_ids: token ids that are never chosen. The paper notes that punctuation and newlines attract FAI.
    backend: of `attention_rhythm`.
    cosine_every: measure the cosine between the credited and the plain gradient every so many generation batches;
        0 for never. One more forward and two more backward passes.
    seed: of the random control.

    Raises RlError for values out of range.
    """

    strategy: str = "coupled"
    window: int = 10
    horizon: tuple[int, int] = (10, 100)
    top_q: float = 0.4
    gamma: float = 1.5
    alpha: float = 0.5
    lookback: int = 3
    tau_waad: float = 0.5
    tau_delta: float = 0.5
    sign: str = "both"
    normalize: str = "none"
    layers: tuple[int, ...] | None = None
    head_quantile: float = 0.3
    head_split: str = "averaged"
    head_refresh: int = 8
    credit_truncated: bool = False
    exclude_ids: tuple[int, ...] = ()
    backend: str = "auto"
    cosine_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RlError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, kind in _NUMBERS.items():
            _refuse_other_than(kind, name, getattr(self, name))
        for name in ("horizon", "layers", "exclude_ids"):  # lists, as recipes give them, would not hash
            value = getattr(self, name)
            if value is None and name == "layers":
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise RlError(f"{name} must be a list of whole numbers, got {value!r}")
            for item in value:
                _refuse_other_than(int, name, item)
            object.__setattr__(self, name, tuple(value))
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise RlError(
                f"layers must be indices from 0, at least one, or None for five of the middle third, got {self.layers}"
            )
        if any(token < 0 for token in self.exclude_ids):
            raise RlError(f"exclude_ids must be token ids, from 0, got {self.exclude_ids}")
        for name in ("top_q", "head_quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise RlError(f"{name} is a share in (0, 1], got {getattr(self, name)}")
        for name in ("alpha", "tau_waad", "tau_delta"):
            if not 0 <= getattr(self, name) <= 1:
                raise RlError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("window", "lookback", "head_refresh"):
            if getattr(self, name) < 1:
                raise RlError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.gamma < 1:
            raise RlError(f"gamma must be 1 or more, got {self.gamma}: below 1 the chosen tokens would learn less")
        if len(self.horizon) != 2 or not 0 <= self.horizon[0] <= self.horizon[1]:
            raise RlError(f"horizon must be (low, high) with 0 <= low <= high, got {self.horizon}")
        if self.cosine_every < 0:
            raise RlError(f"cosine_every must be 0 (never) or more, got {self.cosine_every}")

    @classmethod
    def preset(cls, name: str, **changes: object) -> "TokenCredit":
        """The settings of one version of the paper: "v2" (June 2026, the defaults) or "v1" (October 2025).

        v1 looks 50 tokens ahead and credits positive advantages only. Both print the same results.
        """
        presets = {"v1": {"horizon": (10, 50), "sign": "positive"}, "v2": {}}
        if not isinstance(name, str) or name not in presets:
            raise RlError(f"unknown preset {name!r}; presets: {', '.join(presets)}")
        return replace(cls(**presets[name]), **changes)

    @property
    def reads_attention(self) -> bool:
        return self.strategy in ("coupled", "anchor", "preplan", "bottom")


class Scores(NamedTuple):
    """What the rules choose by, each (B, T): see `token_credit`; `chance` is uniform."""

    waad: torch.Tensor
    fai: torch.Tensor
    chance: torch.Tensor
    entropy: torch.Tensor | None
    excluded: torch.Tensor | None


def token_credit(
    waad: torch.Tensor,
    fai: torch.Tensor,
    response_mask: torch.Tensor,
    credit: TokenCredit,
    *,
    entropy: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The factor of every token, gamma (B, T), by the rule that `credit.strategy` names; 1 outside the response.

    Args:
        waad, fai: (B, T), means over the local and the global heads (`heads.pool`). FAI is 0 where undefined.
        response_mask: (B, T), non-zero on the model's own tokens. A gap ends a turn: Delta is not formed across it,
            and no anchor looks back over it.
        entropy: (B, T) of the policy where it chose the token; for the strategy "entropy".
        excluded: (B, T), true where a token may not be chosen.
        generator: of the strategy "random", on the CPU; None seeds one with `credit.seed`, and so chooses alike at
            every call.

    Ties go to the earlier token, and the number chosen is exact. Tokens without FAI are no anchors. Where they are
    more than half of a response (shorter than about twice `horizon[0]`), the rules that read FAI leave it at 1.

    Raises:
        RlError: tensors of different shapes; no entropy where it is needed.
    """
    mask = response_mask.bool()
    _check_shapes(mask, waad=waad, fai=fai, entropy=entropy, excluded=excluded)
    real = torch.promote_types(waad.dtype, torch.float32)
    waad, fai = (values.to(mask.device, real).nan_to_num() for values in (waad, fai))
    generator = generator or torch.Generator().manual_seed(credit.seed)
    chance = torch.rand(mask.shape, generator=generator).to(mask.device)
    bonus = RULES[credit.strategy](Scores(waad, fai, chance, entropy, excluded), mask, credit)
    gamma = 1 + (credit.gamma - 1) * bonus.to(real)  # (B, T)
    if credit.normalize == "mean":
        gamma = gamma / (gamma.where(mask, 0).sum(1) / mask.sum(1).clamp(min=1)).clamp(min=1)[:, None]
    return gamma.where(mask, 1)


def credited(advantages: torch.Tensor, sign: str = "both") -> torch.Tensor:
    """Which advantages gamma changes: those that are not 0 and have the sign; a bool tensor of the same shape."""
    if sign not in SIGNS:
        raise RlError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
    return {"both": advantages != 0, "positive": advantages > 0, "negative": advantages < 0}[sign]


def credited_advantages(advantages: torch.Tensor, gamma: torch.Tensor, sign: str = "both") -> torch.Tensor:
    """advantages (B,) times gamma (B, T), where the advantage has the sign; (B, T). Eq. 12, v1 with "positive"."""
    gamma = gamma.where(credited(advantages, sign)[:, None], 1)
    return advantages[:, None] * gamma.to(advantages.dtype)


def chunk_steps(waad: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Delta_t = |WAAD_t - WAAD_{t+1}| (B, T) of neighbours in one turn; nan where a turn or the row ends."""
    mask = response_mask.bool()
    delta = torch.full_like(waad, torch.nan)
    delta[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs().where(mask[:, :-1] & mask[:, 1:], torch.nan)
    return delta


def preplan_tokens(
    waad: torch.Tensor, response_mask: torch.Tensor, top_q: float = 0.4, excluded: torch.Tensor | None = None
) -> torch.Tensor:
    """The top q of Delta in each response, (B, T) bool. Eq. 12; a rise counts like a fall, hence also what precedes."""
    mask = response_mask.bool()
    delta = chunk_steps(waad, mask)
    return choose(delta, _may(mask, excluded) & ~delta.isnan(), quota(mask, top_q))


def anchor_tokens(
    fai: torch.Tensor,
    response_mask: torch.Tensor,
    horizon: tuple[int, int] = (10, 100),
    top_q: float = 0.4,
    excluded: torch.Tensor | None = None,
    *,
    lowest: bool = False,
) -> torch.Tensor:
    """The top q of FAI (eq. 13) in each response, or the lowest q, (B, T) bool; none in one that is too short."""
    mask = response_mask.bool()
    allowed = _may(mask, excluded) & (fai > 0) & _long_enough(mask, horizon)
    return choose(-fai if lowest else fai, allowed, quota(mask, top_q))


def quota(mask: torch.Tensor, top_q: float) -> torch.Tensor:
    """(B,) how many tokens top_q of each response are: rounded half up, at least one where there is any."""
    lengths = mask.sum(1).tolist()
    return torch.tensor([min(n, max(1, floor(top_q * n + 0.5))) for n in lengths], device=mask.device)


def choose(scores: torch.Tensor, among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` (B,) highest scores of each row among the allowed, (B, T) bool; fewer where fewer are allowed."""
    order = scores.where(among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return among & (rank < count[:, None])


def _preplan(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return preplan_tokens(scores.waad, mask, credit.top_q, scores.excluded)


def _anchor(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return anchor_tokens(scores.fai, mask, credit.horizon, credit.top_q, scores.excluded)


def _coupled(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    """Eq. 18 and 19: 1 on a free anchor, 1 - alpha on one inside a chunk, alpha on each opening, once; they add up.

    So a free anchor that also opens a chunk has 1 + alpha. The opening is the largest Delta of the lookback, the
    earliest of equals; the paper does not say which token it is.
    """
    anchors = _anchor(scores, mask, credit)
    delta = chunk_steps(scores.waad, mask)
    opening, step = _largest_before(delta.where(_may(mask, scores.excluded), torch.nan), mask, credit.lookback)
    low = scores.waad <= _row_quantile(scores.waad.where(mask, torch.nan), credit.tau_waad)
    steep = step >= _row_quantile(delta, credit.tau_delta)
    inside = anchors & low & steep & (opening >= 0)
    opens = torch.zeros_like(scores.waad).scatter_reduce_(1, opening.clamp(min=0), inside.to(scores.waad), "amax")
    return anchors.to(scores.waad) - credit.alpha * inside + credit.alpha * opens


def _random(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return choose(scores.chance, _may(mask, scores.excluded), quota(mask, credit.top_q))


def _entropy(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    if scores.entropy is None:
        raise RlError("the strategy 'entropy' needs `entropy`, (B, T), of the policy at each token")
    return choose(scores.entropy.nan_to_num(), _may(mask, scores.excluded), quota(mask, credit.top_q))


def _bottom(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return anchor_tokens(scores.fai, mask, credit.horizon, credit.top_q, scores.excluded, lowest=True)


def _uniform(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return (quota(mask, credit.top_q) / mask.sum(1).clamp(min=1))[:, None].expand_as(scores.waad)


def _off(scores: Scores, mask: torch.Tensor, credit: TokenCredit) -> torch.Tensor:
    return torch.zeros_like(scores.waad)


# A rule returns the bonus of each token (B, T), in units of gamma - 1.
RULES: dict[str, Callable[[Scores, torch.Tensor, TokenCredit], torch.Tensor]] = {
    "coupled": _coupled,
    "anchor": _anchor,
    "preplan": _preplan,
    "random": _random,
    "entropy": _entropy,
    "uniform": _uniform,
    "bottom": _bottom,
    "off": _off,
}

_CHOICES = {
    "strategy": tuple(RULES),
    "sign": SIGNS,
    "normalize": NORMALIZATIONS,
    "head_split": SCHEDULES,
    "backend": BACKENDS,
}
_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("window", "lookback", "head_refresh", "cosine_every", "seed"), int),
    **dict.fromkeys(("top_q", "gamma", "alpha", "tau_waad", "tau_delta", "head_quantile"), float),
}


def _refuse_other_than(kind: type, name: str, value: Any) -> None:
    """Raises RlError unless the value is a whole number, or, for float, a finite one."""
    fits = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not (fits and isfinite(value)):
        raise RlError(f"{name} must be a {'whole' if kind is int else 'finite'} number, got {value!r}")


def _long_enough(mask: torch.Tensor, horizon: tuple[int, int]) -> torch.Tensor:
    """(B, 1) bool: whether at least half of the response has an FAI, that is, response rows within the horizon."""
    low, high = horizon
    seen = torch.nn.functional.pad(mask.long().cumsum(1), (1, high + 1), mode="constant")
    seen[:, mask.shape[1] + 1 :] = seen[:, mask.shape[1], None]
    at = torch.arange(mask.shape[1], device=mask.device)
    rows = seen[:, at + high + 1] - seen[:, at + low]  # (B, T), |T(s)|
    return ((mask & (rows > 0)).sum(1) * 2 >= mask.sum(1))[:, None]


def _may(mask: torch.Tensor, excluded: torch.Tensor | None) -> torch.Tensor:
    return mask if excluded is None else mask & ~excluded.to(mask.device).bool()


def _largest_before(delta: torch.Tensor, mask: torch.Tensor, lookback: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the largest Delta of the `lookback` tokens before each token of its turn lies (B, T), and its value.

    -1 and -inf where there is none. Delta is nan at the end of a turn, which is what ends the view back.
    """
    at, best = torch.full_like(mask, -1, dtype=torch.long), torch.full_like(delta, -torch.inf)
    place = torch.arange(mask.shape[1], device=mask.device)
    connected = mask.clone()
    for back in range(1, min(lookback, mask.shape[1] - 1) + 1):
        # `connected` says that tokens t - back .. t are one turn.
        connected = connected & torch.nn.functional.pad(mask[:, :-back], (back, 0))
        value = torch.nn.functional.pad(delta[:, :-back], (back, 0), value=torch.nan)
        better = connected & (value >= best)  # false for nan; >= since the earlier of equals wins
        best = value.where(better, best)
        at = (place - back).where(better, at)
    return at, best


def _row_quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """(B, 1) quantile of each row's numbers that are not nan; nan where there are none."""
    return values.nanquantile(share, dim=1, keepdim=True)


def _check_shapes(mask: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    if mask.dim() != 2:
        raise RlError(f"response_mask must be (B, T), got {tuple(mask.shape)}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise RlError(f"{name} is {tuple(tensor.shape)}, the response mask {tuple(mask.shape)}: they must agree")
