"""What callers of `Dsir` may give as targets, sizes, proportions and caps: turned into plain values, or refused."""

from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeGuard

from .sampling import Rules, ShardScores, cap_name
from .selection import MAX_SEED, checked_int
from .texts import DataSelectionError, TextSource, is_dataset_dict


def is_mapping(target: Any) -> TypeGuard[Mapping[str, TextSource]]:
    """Whether the target is several, by name; a `DatasetDict` is one."""
    return isinstance(target, Mapping) and not is_dataset_dict(target)


def named_targets(target: Any) -> dict[str, Any]:
    """Each target by its name for error messages; what can be read once only becomes a list.

    Raises:
        DataSelectionError: a mapping without targets, or with a name that is no text.
    """
    found = dict(target) if is_mapping(target) else {"target": target}
    if not found or not all(isinstance(name, str) and name for name in found):
        raise DataSelectionError(f"target={list(found)!r}: give at least one target, each under a name")
    return {name: list(source) if isinstance(source, Iterator) else source for name, source in found.items()}


def shares_of(targets: tuple[str, ...], proportions: Mapping[str, float] | None) -> tuple[float, ...]:
    """(targets,) the share of each target in the picks.

    Raises:
        DataSelectionError: a target is missing or unknown, or a proportion is negative or no number.
    """
    if proportions is None:
        return tuple(1 / len(targets) for _ in targets)
    if set(proportions) != set(targets):
        raise DataSelectionError(f"proportions={dict(proportions)!r}: give one for each of {', '.join(targets)}")
    values = [proportions[name] for name in targets]
    if not all(isinstance(value, Real) and 0 <= value < float("inf") for value in values) or not sum(values) > 0:
        raise DataSelectionError(f"proportions={dict(proportions)!r}: must be numbers >= 0, not all of them 0")
    return tuple(value / sum(values) for value in values)


def budget_of(k: Any, tokens: Any, size: int) -> int:
    """How many rows or tokens to pick from a pool of `size` rows.

    Raises:
        DataSelectionError: neither or both are given, or one is out of range.
    """
    if (k is None) == (tokens is None):
        raise DataSelectionError(f"k={k!r}, tokens={tokens!r}: give one of the two")
    if tokens is not None:
        return checked_int(tokens, "tokens", 1, 2**62, "the most tokens to pick")
    if isinstance(k, float) and 0 < k < 1:
        return max(1, round(k * size))
    return checked_int(k, "k", 1, size, f"the pool has {size} texts; a share is a number between 0 and 1")


def caps_of(caps: Mapping[str, Any] | None, budget: int, by_tokens: bool) -> dict[str, int]:
    """The most rows of each capped source.

    Raises:
        DataSelectionError: a cap is negative or no number, or a share where the budget is in tokens.
    """
    found = {}
    for source, cap in (caps or {}).items():
        if isinstance(cap, float) and 0 <= cap <= 1:
            if by_tokens:
                raise DataSelectionError(f"source_caps[{source!r}]={cap}: with tokens, give a number of rows")
            cap = round(cap * budget)
        found[str(source)] = checked_int(cap, f"source_caps[{source!r}]", 0, 2**62, "or a share between 0 and 1")
    return found


def check_sources(shards: Iterable[ShardScores], caps: Mapping[str, int]) -> None:
    """Refuse a cap on a source that no row has: it would be a typing error that changes nothing.

    Raises:
        DataSelectionError: as said.
    """
    seen = set[str]()
    for shard in shards:
        seen.update(shard.sources or [""])
        if "" in seen:
            seen = seen - {""} | ({cap_name(shard.path, caps)} if shard.path else set())
    unknown = sorted(set(caps) - seen)
    if unknown:
        raise DataSelectionError(f"source_caps: no row has the source {unknown}; there are {sorted(seen)[:20]}")


def rules_of(
    size: int,
    shares: tuple[float, ...],
    noise_scale: float,
    *,
    k: Any,
    tokens: Any,
    method: Any,
    temperature: Any,
    seed: Any,
    source_caps: Mapping[str, Any] | None,
    min_tokens: Any,
    max_tokens: Any,
    exclude_copies: bool,
) -> Rules:
    """The arguments of `Dsir.select`, checked against a pool of `size` rows.

    Raises:
        DataSelectionError: the pool is empty, or an argument is out of range.
    """
    if method not in ("gumbel", "topk"):
        raise DataSelectionError(f"method={method!r}: must be 'gumbel' or 'topk'")
    if not isinstance(temperature, Real) or not 0 < float(temperature) <= 1e9:
        raise DataSelectionError(f"temperature={temperature!r}: must be above 0 and at most 1e9")
    seed = checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
    if not size:
        raise DataSelectionError("the pool is empty; there is nothing to select from")
    budget = budget_of(k, tokens, size)
    low = checked_int(min_tokens, "min_tokens", 0, 2**62, "0 leaves nothing out")
    high = max_tokens
    if high is not None:
        high = checked_int(high, "max_tokens", 1, 2**62, "None leaves nothing out")
        if high < low:
            raise DataSelectionError(f"min_tokens={low}, max_tokens={high}: no text is left; turn them round")
    caps = caps_of(source_caps, budget, tokens is not None)
    by_tokens, gumbel = tokens is not None, method == "gumbel"
    return Rules(
        budget, by_tokens, shares, gumbel, noise_scale, float(temperature), seed, caps, low, high, exclude_copies
    )
