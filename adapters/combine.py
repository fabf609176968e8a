"""Weighted sums of adapters, exact: the products of all of them side by side in one adapter."""

import copy
from collections.abc import Sequence
from typing import cast

import torch

from .config import AdapterError, MokaConfig, Shape
from .layer import Gate, MokaLayer, shapes_key


def combined_config(configs: Sequence[MokaConfig], names: Sequence[str], weights: Sequence[float]) -> MokaConfig:
    """The config of the combined adapter: every count times the number of adapters.

    Each resolved shape stands as often in a row as there are adapters. Products are spread over shapes evenly, the
    first shapes getting one more, so that each of the repeated shapes gets as many as the one shape had.

    Raises:
        AdapterError: the configs differ in r, rank_pattern, shapes or identity, or train biases or whole modules.
    """
    if not configs or len(weights) != len(configs):
        raise AdapterError(f"give one weight an adapter, and at least one: got {len(configs)} and {len(weights)}")
    first, n = configs[0], len(configs)
    for name, config in zip(names, configs, strict=True):
        if config.bias != "none" or config.modules_to_save:
            raise AdapterError(f"adapter {name!r} trains biases or whole modules, which have no weighted sum here")
        for key in ("r", "rank_pattern", "shapes_pattern", "identity", "n_shapes"):
            if getattr(config, key) != getattr(first, key):
                raise AdapterError(
                    f"adapters {names[0]!r} and {name!r} differ in {key}: {getattr(first, key)!r} and "
                    f"{getattr(config, key)!r}; only adapters of equal shapes are combined"
                )
        own, wanted = _shapes_in_use(config), _shapes_in_use(first)
        for size, pattern in own.keys() & wanted.keys():
            if own[size, pattern] != wanted[size, pattern]:
                raise AdapterError(f"adapters {names[0]!r} and {name!r} differ in their shapes for {size}")
    combined = copy.deepcopy(first)
    combined.r, combined.n_shapes, combined.alpha, combined.alpha_pattern = first.r * n, first.n_shapes * n, None, {}
    combined.rank_pattern = {key: r * n for key, r in first.rank_pattern.items()}
    combined.gate = "none" if all(config.gate == "none" for config in configs) else "softmax"
    combined.shapes, combined.dropout, combined.init_weights = "balanced", 0.0, True
    combined.shapes_pattern = dict.fromkeys(first.shapes_pattern, "balanced")
    combined.resolved_shapes = {}
    for config in configs:
        for (size, pattern), pairs in _shapes_in_use(config).items():
            combined.resolved_shapes[f"{size}:{shapes_key(combined, pattern)}"] = [p for p in pairs for _ in range(n)]
    targets = _union([config.target_modules for config in configs], names)
    combined.target_modules = cast("list[str] | str | None", set(targets) if isinstance(targets, list) else targets)
    return combined


def _shapes_in_use(config: MokaConfig) -> dict[tuple[str, str | None], list[Shape]]:
    """(size, pattern) -> shapes; those that an earlier use of the config left behind are passed over."""
    found = {}
    for key, pairs in config.resolved_shapes.items():
        size, _, *rest = key.split(":", 2)
        pattern = rest[0] if rest else None
        if pattern in (None, *config.shapes_pattern) and key == f"{size}:{shapes_key(config, pattern)}":
            found[size, pattern] = [(o, i) for o, i in pairs]
    return found


def _union(targets: Sequence[list[str] | set[str] | str | None], names: Sequence[str]) -> list[str] | str | None:
    if all(target == targets[0] for target in targets):
        return cast("list[str] | str | None", targets[0])
    if any(isinstance(target, str) or target is None for target in targets):
        raise AdapterError(
            f"adapters {list(names)} name their target_modules by different expressions; only equal expressions or "
            "lists of names can be combined"
        )
    return sorted({name for target in targets if target for name in target})


@torch.no_grad()
def fill_combined(layer: MokaLayer, name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Write the products of the other adapters of a layer into its adapter `name`.

    Over J adapters of r products each, alpha is J r and the gate of product i of adapter j becomes g_ji / J. What
    that leaves of the wanted weight w_j alpha_j g_ji goes into the factor A (B, where A is the identity).
    """
    r = sum(layer.moka_counts[name]) // len(adapters)
    new_a, new_b = layer.held(name)
    scaled, gates = new_a or new_b, []
    for position, k in enumerate(layer.moka_counts[name]):
        group, j = divmod(position, len(adapters))
        own = adapters[j]
        if own not in layer.moka_A:  # its products stay at the zero that they start at
            gates.append(torch.full((k,), 1.0 / r))
            continue
        for new, old in zip((new_a, new_b), layer.held(own), strict=True):
            if new:
                _copy(new[position], old[group], own)
        share = cast(Gate, layer.moka_gate[own])(scaled[position].device)
        scaled[position].mul_(weights[j] * layer.moka_scale[own] * layer.moka_alpha[own] / r)
        gates.append(share.split(layer.moka_counts[own])[group].cpu())
    logits = cast(Gate, layer.moka_gate[name]).logits
    if logits is not None:
        logits.copy_(torch.cat(gates).log())


def _copy(new: torch.Tensor, old: torch.Tensor, own: str) -> None:
    if new.shape != old.shape:
        raise AdapterError(
            f"adapter {own!r} has factors {tuple(old.shape)} where the combined one has {tuple(new.shape)}; only "
            "adapters of equal shapes are combined"
        )
    new.copy_(old)
