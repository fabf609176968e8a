"""From log weights to picks: k, a share or a token budget, for several targets jointly, with caps on sources.

Nothing here holds the whole pool: of each shard only the rows that can still be picked are kept, about k a target.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .importance import Floats
from .selection import gumbel_noise
from .texts import DataSelectionError

Ints = NDArray[np.int64]
# Rows that are kept beyond twice the budget before the worst are thrown out.
SLACK = 1_000_000


@dataclass(frozen=True, eq=False)
class ShardScores:
    """What is known of the rows of one shard."""

    log_weights: Floats  # (N, targets)
    tokens: Ints  # (N,)
    copies: NDArray[np.bool_]  # (N,) whether the row has the tokens of a target text
    sources: list[str] | None  # (N,) or None; "" for a row without one
    file: str = ""  # short name of the file; "" in memory
    path: str = ""  # of the file, as the caller gave it; "" in memory


@dataclass(frozen=True)
class Rules:
    """How to pick. `budget` is shared out by `shares`; it counts tokens where `by_tokens`, else rows."""

    budget: int
    by_tokens: bool
    shares: tuple[float, ...]  # (targets,), they add up to 1
    gumbel: bool
    noise_scale: float
    temperature: float
    seed: int
    caps: Mapping[str, int]  # most rows a source
    min_tokens: int = 0
    max_tokens: int | None = None
    exclude_copies: bool = True
    names: tuple[str, ...] = ()  # of the targets, for messages


class Candidates(NamedTuple):
    """Rows that may be picked for one target."""

    rows: Ints  # (C,) in the pool
    scores: Floats  # (C,)
    log_weights: Floats  # (C,)
    tokens: Ints  # (C,)
    capped: Ints  # (C,) the number of the capped source, -1 for any other


class Picks(NamedTuple):
    """The picked rows, in order, and why rows were left out."""

    rows: Ints  # (k,)
    targets: Ints  # (k,)
    log_weights: Floats  # (k,)
    tokens: Ints  # (k,)
    left_out: dict[str, int]


def pick(shards: Iterable[ShardScores], rules: Rules) -> Picks:
    """The picks of a pool given shard by shard, in order.

    A row serves one target, the one for which its score is higher: all pairs of row and target are gone through
    from the highest score down, and a pair is taken where the row is free and the target has not yet its share. So
    the order of the targets does not matter. Of equal scores the earlier row is taken.

    A share of tokens ends with the first text that does not fit into what is left of it, lest short ones fill the
    rest. A text longer than the whole share is passed over.

    Raises:
        DataSelectionError: fewer rows than asked for are left by the length limits, copies and caps, or no text fits
            into the tokens of a target.
    """
    targets, parts = len(rules.shares), shared_out(rules.budget, rules.shares)
    kept: list[list[Candidates]] = [[] for _ in range(targets)]
    left_out = {"target_copies": 0, "too_short": 0, "too_long": 0}
    eligible = 0
    for shard, first, noise in _with_noise(shards, rules, targets):
        allowed = _allowed(shard, rules, left_out)
        eligible += len(allowed)
        for target in range(targets):
            weights = shard.log_weights[allowed, target]
            scores = weights
            if noise is not None:
                scores = weights * rules.noise_scale + rules.temperature * noise[target][allowed]
            tokens, capped = shard.tokens[allowed], _capped(shard, allowed, rules.caps)
            kept[target].append(Candidates(allowed + first, scores, weights, tokens, capped))
            if sum(len(part.rows) for part in kept[target]) > 2 * rules.budget + SLACK:
                kept[target] = [_best(kept[target], rules, parts[target])]
    best = [_best(found, rules, part) for found, part in zip(kept, parts, strict=True)]
    left_out = {reason: count for reason, count in left_out.items() if count}
    picks = _take(best, rules, left_out)
    if not rules.by_tokens and len(picks.rows) < rules.budget:
        raise DataSelectionError(
            f"k={rules.budget}: only {len(picks.rows) if rules.caps else eligible} texts of the pool may be picked "
            f"(left out: {left_out or 'none'}; caps on sources: {dict(rules.caps) or 'none'}); lower k or lift a limit"
        )
    if not len(picks.rows):
        raise DataSelectionError(
            f"tokens={rules.budget}: not one text fits ({eligible} may be picked; left out: {left_out or 'none'}); "
            "raise the budget or lift a limit"
        )
    if rules.by_tokens:
        _check_targets(picks, parts, rules)
    return picks


def _check_targets(picks: Picks, parts: Sequence[int], rules: Rules) -> None:
    """Refuse picks that leave a target that has a share without a text."""
    got = np.bincount(picks.targets, minlength=len(parts))
    for target, (part, share) in enumerate(zip(parts, rules.shares, strict=True)):
        if share > 0 and not got[target]:
            name = rules.names[target] if rules.names else f"number {target + 1}"
            raise DataSelectionError(
                f"tokens={rules.budget}: the target {name!r} has a share of {part} and no text fits into it; raise "
                "the budget or the target's proportion, or lift a limit"
            )


def file_stream(file: str) -> int:
    """The stream of random numbers of a file; 0 for a pool of one file or in memory."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:7]) << 8 if file else 0


def _with_noise(
    shards: Iterable[ShardScores], rules: Rules, targets: int
) -> Iterator[tuple[ShardScores, int, list[Floats] | None]]:
    """Each shard, its first row in the pool, and Gumbel noise that depends on seed, file, row in the file and target
    alone; stream 1 is that of the random control."""
    first, rows_of_file = 0, dict[str, int]()
    for shard in shards:
        rows, at = len(shard.tokens), rows_of_file.get(shard.file, 0)
        noise = None
        if rules.gumbel:
            base = file_stream(shard.file)
            streams = [base + (target + 1 if target else 0) for target in range(targets)]
            noise = [gumbel_noise(rules.seed, rows, stream, at) for stream in streams]
        yield shard, first, noise
        first += rows
        rows_of_file[shard.file] = at + rows


def _allowed(shard: ShardScores, rules: Rules, left_out: dict[str, int]) -> Ints:
    """The rows that no rule leaves out; those that one does are counted, each once."""
    copies = shard.copies if rules.exclude_copies else np.zeros(len(shard.tokens), bool)
    short = ~copies & (shard.tokens < rules.min_tokens)
    long = np.zeros(len(copies), bool) if rules.max_tokens is None else ~copies & (shard.tokens > rules.max_tokens)
    for reason, rows in (("target_copies", copies), ("too_short", short), ("too_long", long)):
        left_out[reason] += int(rows.sum())
    return np.flatnonzero(~(copies | short | long))


def _capped(shard: ShardScores, allowed: Ints, caps: Mapping[str, int]) -> Ints:
    if not caps:
        return np.full(len(allowed), -1)
    numbers = {source: number for number, source in enumerate(caps)}
    if shard.sources is None:
        return np.full(len(allowed), numbers.get(cap_name(shard.path, caps), -1))
    file = cap_name(shard.path, caps)
    return np.array([numbers.get(shard.sources[row] or file, -1) for row in allowed.tolist()], np.int64)


def cap_name(path: str, caps: Mapping[str, Any]) -> str:
    """What a file goes by among the caps: its path as it was given, or another spelling of it, "a.jsonl" of
    "./a.jsonl" and the other way round."""
    if path in caps or not path:
        return path
    return next((name for name in caps if Path(name) == Path(path)), path)


def _best(parts: list[Candidates], rules: Rules, part: int) -> Candidates:
    """The candidates that can be picked whatever other targets take, from the highest score down: for each capped
    source, and for all others together, as many as the whole budget and one. part: what the target may have of the
    budget; a text of more tokens is no candidate."""
    if not parts:
        empty = np.empty(0, np.int64)
        return Candidates(empty, np.empty(0), np.empty(0), empty, empty)
    every = _joined(parts)
    if rules.by_tokens:
        every = _at(every, np.flatnonzero(np.maximum(every.tokens, 1) <= part))
    order = np.lexsort((every.rows, -every.scores))
    keep = np.zeros(len(order), bool)
    for source in np.unique(every.capped):
        own = np.flatnonzero(every.capped[order] == source)
        if rules.by_tokens:
            spent = np.cumsum(np.maximum(every.tokens[order[own]], 1))
            keep[own[: int(np.searchsorted(spent, rules.budget, side="right")) + 1]] = True
        else:
            keep[own[: rules.budget]] = True
    return _at(every, order[keep])


def _joined(parts: Sequence[Candidates]) -> Candidates:
    columns: Any = zip(*parts, strict=True)
    return Candidates(*(np.concatenate(column) for column in columns))


def _at(every: Candidates, places: Ints) -> Candidates:
    columns: Any = every
    return Candidates(*(column[places] for column in columns))


def _take(best: list[Candidates], rules: Rules, left_out: dict[str, int]) -> Picks:
    target = np.concatenate([np.full(len(found.rows), number) for number, found in enumerate(best)])
    every = _joined(best)
    order = np.lexsort((target, every.rows, -every.scores))
    cost = np.maximum(every.tokens, 1) if rules.by_tokens else np.ones(len(order), np.int64)
    if len(best) == 1 and not rules.caps:
        chosen = order[: int(np.searchsorted(np.cumsum(cost[order]), rules.budget, side="right"))]
    else:
        chosen = _greedy(every, target, cost, order, rules)
    chosen = chosen[np.argsort(every.rows[chosen])]
    return Picks(every.rows[chosen], target[chosen], every.log_weights[chosen], every.tokens[chosen], left_out)


def _greedy(every: Candidates, target: Ints, cost: Ints, order: Ints, rules: Rules) -> Ints:
    left, caps, taken, chosen = shared_out(rules.budget, rules.shares), list(rules.caps.values()), set[int](), []
    for at in order.tolist():
        row, owner, source, price = int(every.rows[at]), int(target[at]), int(every.capped[at]), int(cost[at])
        if row in taken or left[owner] <= 0 or (source >= 0 and not caps[source]):
            continue
        if price > left[owner]:
            left[owner] = 0  # the budget ends with the first text that does not fit, lest short ones fill the rest
            continue
        left[owner] -= price
        if source >= 0:
            caps[source] -= 1
        taken.add(row)
        chosen.append(at)
    return np.array(chosen, np.int64)


def shared_out(budget: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `shares` that add up to `budget`; what rounding leaves goes to the largest
    remainders, of equal ones to the first."""
    exact = [budget * share for share in shares]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for at in by_remainder[: budget - sum(parts)]:
        parts[at] += 1
    return parts
