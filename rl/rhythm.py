"""How far back a token looks and how much later tokens look at it: WAAD, FAI and head span, without a (T, T) matrix.

With A = softmax(scale q k^T) of one head, R the response positions, W the window (arXiv 2510.13554 v2, eq. 7-10):

    span  = mean over t in R of sum_s A[t, s] (t - s)                       the head's mean look-back
    WAAD_t = sum_s A[t, s] min(t - s, W)                                    high where a chunk of text begins
    FAI_s  = mean of A[t, s] over T(s) = {t in R : s + low <= t <= s + high}  high where later text leans

Rows of A sum to one, so WAAD_t = W - sum_{j < W} (W - j) A[t, t-j]: both vectors need no more than the diagonals
0..high, and A[t, s] = exp(scale q_t k_s - L_t) on them needs one number a row, the log-sum-exp L_t. So there are two
steps: L_t (with the mean look-back, where it is asked for) by fused attention or in tiles, then the band of diagonals.

Each head has its own vectors, so that heads can be split into local and global ones after the pass (`heads.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .errors import RlError
from .probe import middle_third, probe, read_rhythm

__all__ = ["Rhythm", "attention_rhythm", "middle_third", "probe", "read_rhythm"]

BACKENDS = ("auto", "banded", "tiled")

# Query rows at a time: b of the largest tensors, (H, b, T) in tiles and (H, b, b + high) in the band. On a CPU 64 is
# the fastest of 32..192; elsewhere fewer, larger calls are worth their memory.
_CPU_BLOCK, _BLOCK = 64, 256


@dataclass(frozen=True)
class Rhythm:
    """What one layer's attention says about each token of a batch.

    waad: (B, H, T), tokens, in [0, window]; 0 outside the response. H counts the local heads where these were given.
    fai: (B, H, T), in [0, 1], for every position that may be looked at, prompt and response; 0 where `rows` is 0.
        H counts the global heads where these were given.
    span: (B, H), tokens; 0 for a row without response. None where heads were given: they are settled then.
    rows: (B, T) int64, |T(s)|: from how many response rows FAI_s is a mean. 0 where FAI is undefined, as it is for
        the last `low` tokens.
    """

    waad: torch.Tensor
    fai: torch.Tensor
    span: torch.Tensor | None
    rows: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Positions start..stop of one batch row that see each other, up to its last response token; n = stop - start.

    `first` is where the response begins in it. `keys` tells which positions belong, where not all do.
    """

    row: int
    start: int
    stop: int
    first: int
    response: torch.Tensor  # (n,) bool
    keys: torch.Tensor | None  # (n,) bool

    @property
    def length(self) -> int:
        return self.stop - self.start


def attention_rhythm(
    q: torch.Tensor,
    k: torch.Tensor,
    response_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    window: int = 10,
    horizon: tuple[int, int] = (10, 100),
    scale: float | None = None,
    sliding_window: int | None = None,
    segment_ids: torch.Tensor | None = None,
    heads: tuple[Sequence[int], Sequence[int]] | None = None,
    lse: torch.Tensor | None = None,
    backend: str = "auto",
) -> Rhythm:
    """WAAD, FAI and span of every head of one causal attention layer. Exact; memory grows linearly with T.

    Args:
        q: (B, H, T, D) after rotary embedding and norms. Computed in float32, or float64 where q is float64.
        k: (B, H_kv, T, D), H a multiple of H_kv.
        response_mask: (B, T), non-zero on tokens of the model; prompt, padding and tool output are zero. They are
            still looked at, and still count as distance.
        attention_mask: (B, T), zero on positions that nobody looks at. None: all are seen.
        window: W of WAAD, in tokens.
        horizon: (low, high) of FAI, in tokens.
        scale: of the scores; None for D ** -0.5.
        sliding_window: w, where row t sees only s > t - w.
        segment_ids: (B, T) integers for rows packed from several sequences: only equal ids see each other.
        heads: (local, global) indices. WAAD is then read for the local heads alone, FAI for the global ones alone, in
            the order given, and span not at all.
        lse: (B, H, T) natural log-sum-exp of the scaled and masked scores, if the attention kernel left it. Used
            where `heads` are given: the span needs a pass of its own, which finds it again.
        backend: "auto" takes the fastest. "tiled" finds the log-sum-exp in tiles of plain matrix products.
            "banded" refuses to: it needs `lse` with `heads`, or a CPU with neither sliding window nor holes.

    Raises:
        RlError: shapes, window, horizon, heads or backend that do not fit.

    Source: arXiv 2510.13554 v2, eq. 7-10. The paper leaves FAI undefined where T(s) is empty; it is 0 here.
    """
    _check(q, k, response_mask, attention_mask, segment_ids, lse)
    _check_options(window, horizon, sliding_window, heads, q.shape[1], backend)
    batch, n_heads, length, width = q.shape
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = width**-0.5 if scale is None else scale
    attended = torch.ones_like(response_mask) if attention_mask is None else attention_mask
    attended = attended.to(q.device, torch.bool)
    response = response_mask.to(q.device, torch.bool) & attended
    local, remote = [list(range(n_heads))] * 2 if heads is None else [list(some) for some in heads]

    waad = q.new_zeros(batch, len(local), length, dtype=real)
    fai = q.new_zeros(batch, len(remote), length, dtype=real)
    span = q.new_zeros(batch, n_heads, dtype=real)
    rows = torch.zeros(batch, length, dtype=torch.int64, device=q.device)
    # Autocast would send the float32 products through bfloat16.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for part in parts(response, attended, segment_ids):
            row, at = part.row, slice(part.start, part.stop)
            q_part, k_part = q[row, :, at], k[row, :, at]
            near = _chosen(q_part, k_part, local, factor, real)
            far = near if heads is None else _chosen(q_part, k_part, remote, factor, real)
            if heads is None:
                near_lse, back = log_sum_exp(*near, part, sliding_window, backend)
                far_lse = near_lse
                span[row] += back.sum(-1)
            elif lse is None:
                near_lse, far_lse = (log_sum_exp(*qk, part, sliding_window, backend)[0] for qk in (near, far))
            else:
                near_lse, far_lse = (lse[row, some, at].to(real) for some in (local, remote))
            counts = rows_in_horizon(part, horizon)
            # Added, not written: the sequences of a packed row may be interleaved.
            waad[row, :, at] += look_back(*near, near_lse, part, window, sliding_window)
            fai[row, :, at] += influence(*far, far_lse, part, horizon, sliding_window) / counts.clamp(min=1)
            rows[row, at] += counts
    if heads is not None:
        return Rhythm(waad, fai, None, rows)
    return Rhythm(waad, fai, span / response.sum(1).clamp(min=1)[:, None], rows)


def parts(response: torch.Tensor, attended: torch.Tensor, segment_ids: torch.Tensor | None = None) -> Iterator[Part]:
    """The sequences of a batch that have a response: one a row, or one a segment of a row. Masks (B, T) bool."""
    device, response, attended = response.device, response.cpu(), attended.cpu()
    segments = torch.zeros_like(response, dtype=torch.int64) if segment_ids is None else segment_ids.cpu()
    for row, (said, seen, ids) in enumerate(zip(response, attended, segments, strict=True)):
        for segment in ids[said].unique():
            inside = seen & (ids == segment)  # (T,)
            answer = (said & inside).nonzero().flatten()
            start, first, stop = int(inside.nonzero()[0]), int(answer[0]), int(answer[-1]) + 1
            at = slice(start, stop)
            keys = None if inside[at].all() else inside[at].to(device)
            yield Part(row, start, stop, first - start, (said & inside)[at].to(device), keys)


def log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, part: Part, sliding_window: int | None = None, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-sum-exp of each response row's scores, and its mean look-back sum_s A[t, s] (t - s); both (H, n).

    q, k: (H, n, D), the scale already in q. Rows that are not response are 0.
    """
    lse, back = q.new_zeros(q.shape[:2]), q.new_zeros(q.shape[:2])
    if not len(q):  # a layer without heads in a group; the fused kernel divides by their number
        return lse, back
    fusable = q.device.type == "cpu" and part.keys is None and sliding_window is None
    if fusable and backend != "tiled":
        lse[:, part.first :], back[:, part.first :] = _fused(q, k, part.first)
        return lse * part.response, back * part.response
    if backend == "banded":
        raise RlError(
            'backend "banded" takes the log-sum-exp from fused attention: pass lse and heads, or use a CPU and neither '
            'a sliding window nor holes in the attention mask; else use "auto" or "tiled"'
        )
    reach = part.length if sliding_window is None else sliding_window - 1
    for rows, columns, scores, distance in _blocks(q, k, part, 0, reach):
        scores.masked_fill_(~_visible(distance, columns, part, sliding_window), -torch.inf)
        norm = scores.logsumexp(-1).nan_to_num(neginf=0)  # (H, b); a row that sees nothing is not response
        share = scores.sub_(norm[..., None]).exp_()  # (H, b, c)
        # Distances from the block's first row, since t - sum_s A s would cancel. (b,), (c,)
        down, left = distance[:, 0] - distance[0, 0], distance[0]
        lse[:, rows] = norm * part.response[rows]
        back[:, rows] = (share @ left.to(share) + down) * part.response[rows]
    return lse, back


def look_back(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, part: Part, window: int, sliding_window: int | None = None
) -> torch.Tensor:
    """WAAD (H, n) from q, k (H, n, D), the scale already in q, and lse (H, n)."""
    waad = q.new_zeros(q.shape[:2])
    for rows, columns, scores, distance in _blocks(q, k, part, 0, window - 1):
        weight = (window - distance).clamp_(min=0) * _visible(distance, columns, part, sliding_window)  # (b, c)
        near = _probabilities(scores, lse[:, rows]).mul_(weight).sum(-1)  # (H, b)
        waad[:, rows] = (window - near) * part.response[rows]
    return waad


def influence(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    part: Part,
    horizon: tuple[int, int],
    sliding_window: int | None = None,
) -> torch.Tensor:
    """The sum behind FAI, sum over T(s) of A[t, s]: (H, n), from q, k (H, n, D), the scale already in q, lse (H, n)."""
    low, high = horizon
    total = q.new_zeros(q.shape[:2])
    for rows, columns, scores, distance in _blocks(q, k, part, low, high):
        weight = (distance >= low) & (distance <= high) & part.response[rows, None]  # (b, c)
        weight &= _visible(distance, columns, part, sliding_window)
        total[:, columns] += _probabilities(scores, lse[:, rows]).mul_(weight).sum(1)
    return total


def rows_in_horizon(part: Part, horizon: tuple[int, int]) -> torch.Tensor:
    """|T(s)| for each position s of the part: (n,) int64, 0 for positions that are not part of it."""
    low, high = horizon
    before = torch.nn.functional.pad(part.response.cumsum(0), (1, 0))  # (n + 1,): response rows before a position
    at = torch.arange(part.length, device=before.device)
    counts = before[(at + high + 1).clamp(max=part.length)] - before[(at + low).clamp(max=part.length)]
    return counts if part.keys is None else counts * part.keys


def _fused(q: torch.Tensor, k: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and mean look-back of rows first.. as by-products of attention to values that are positions.

    The rows see two blocks of keys, all of those before `first` and the triangle from there, merged by their
    log-sum-exps.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    places = torch.zeros_like(k)  # (H, n, D): the kernel wants values as wide as keys
    places[..., 0] = torch.arange(-first, k.shape[1] - first)
    q, k, places = q[None], k[None], places[None]
    rows = q[:, :, first:].contiguous()
    out, lse = attend(rows, k[:, :, first:], places[:, :, first:], 0.0, True, scale=1.0)
    place = out[0, ..., 0]  # (H, n - first)
    if first:
        out, before = attend(rows, k[:, :, :first], places[:, :, :first], 0.0, False, scale=1.0)
        both = torch.logaddexp(lse, before)
        place = place * (lse - both)[0].exp() + out[0, ..., 0] * (before - both)[0].exp()
        lse = both
    return lse[0], torch.arange(place.shape[-1], device=q.device) - place


def _blocks(
    q: torch.Tensor, k: torch.Tensor, part: Part, nearest: int, furthest: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Blocks of b query rows with the c keys nearest..furthest behind them: rows, columns, scores (H, b, c), t - s."""
    size = _CPU_BLOCK if q.device.type == "cpu" else _BLOCK
    for i in range(part.first, part.length, size):
        j = min(i + size, part.length)
        low, high = max(0, i - furthest), j - nearest
        if low < high:
            distance = torch.arange(i, j, device=q.device)[:, None] - torch.arange(low, high, device=q.device)  # (b, c)
            yield slice(i, j), slice(low, high), q[:, i:j] @ k[:, low:high].mT, distance


def _visible(distance: torch.Tensor, columns: slice, part: Part, sliding_window: int | None) -> torch.Tensor:
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible if part.keys is None else visible & part.keys[columns]


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), in place. What a row does not see, and its weight removes, may not overflow before that."""
    return scores.sub_(lse[..., None]).clamp_(max=0).exp_()


def _chosen(
    q: torch.Tensor, k: torch.Tensor, heads: list[int], scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """These heads of q (H, n, D), scaled, and for each the keys it reads of k (H_kv, n, D)."""
    group = q.shape[0] // k.shape[0]
    return q[heads].to(dtype) * scale, k[[head // group for head in heads]].to(dtype)


def _check(q: torch.Tensor, k: torch.Tensor, response_mask: torch.Tensor, *others: torch.Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise RlError(
            f"q must be (B, H, T, D) and k (B, H_kv, T, D), got {tuple(q.shape)} and {tuple(k.shape)}; "
            "keys of a cache, which are longer than the queries, cannot be read"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise RlError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    attention_mask, segment_ids, lse = others
    masks = {"response_mask": response_mask, "attention_mask": attention_mask, "segment_ids": segment_ids}
    for name, mask in masks.items():
        if mask is not None and mask.shape != (q.shape[0], q.shape[2]):
            raise RlError(f"{name} must be (B, T) = {(q.shape[0], q.shape[2])}, got {tuple(mask.shape)}")
    if lse is not None and lse.shape != q.shape[:3]:
        raise RlError(f"lse must be (B, H, T) = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")


def _check_options(
    window: int,
    horizon: tuple[int, int],
    sliding_window: int | None,
    heads: tuple[Sequence[int], Sequence[int]] | None,
    n_heads: int,
    backend: str,
) -> None:
    if window < 1:
        raise RlError(f"window must be at least 1 token, got {window}")
    if len(horizon) != 2 or not 0 <= horizon[0] <= horizon[1]:
        raise RlError(f"horizon must be (low, high) with 0 <= low <= high, got {tuple(horizon)}")
    if sliding_window is not None and sliding_window < 1:
        raise RlError(f"sliding_window must be at least 1 token, or None, got {sliding_window}")
    if heads is not None and not all(0 <= head < n_heads for some in heads for head in some):
        raise RlError(f"heads must be (local, global) indices below {n_heads}, got {heads}")
    if backend not in BACKENDS:
        raise RlError(f"unknown backend {backend!r}; backends: {', '.join(BACKENDS)}")
