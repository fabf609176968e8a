"""Vectors of samples from a model's hidden states, without a backward pass, and picks for a target by them (RDS+).

Source: arXiv 2503.01807: the mean of the last hidden states, weighted by position, and the target's examples picking
the nearest row in turn.
"""

import os
from typing import Any

import numpy as np
import torch

from .encoding import collate
from .gradients import scoring_mode
from .identity import store_identity
from .pool_scoring import active_adapters, batches_to_do, part_of_launch, pool_of
from .scores import head_at, output_layer
from .selection import Selection, checked_int
from .store import NORM, Store
from .targeted import select_for_target
from .texts import DataSelectionError, TextSource

KIND = {"kind": "last_states_weighted_by_position"}


def weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_i w_i h_i with w_i = i / sum_j j, over the tokens i = 1, 2, ... of a row.

    Later tokens have seen more of the row, and so count more.

    Args:
        states: (B, T, H).
        mask: (B, T), 1 for a token and 0 for padding, which stands on the right.

    Returns:
        (B, H) float32.
    """
    weights = mask.float() * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return torch.bmm((weights / weights.sum(1, keepdim=True).clamp(min=1.0))[:, None], states.float())[:, 0]


def last_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T, H) what the output layer is given, which is run at one position alone."""
    seen: list[torch.Tensor] = []
    head = output_layer(model)
    places = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    places[0, 0] = True
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with head_at(model, places), torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def represent_samples(
    model: Any,
    tokenizer: Any,
    dataset: TextSource,
    *,
    out_dir: str | os.PathLike[str],
    batch_size: int = 8,
    max_length: int | None = 2048,
    part: tuple[int, int] | None = None,
) -> Store:
    """The weighted mean of the last hidden states of every row, into a store where an interrupted run goes on.

    Args:
        model: a causal language model, bare or a `peft.PeftModel`; one that was never trained on the pool does.
        tokenizer, dataset, out_dir, batch_size, max_length, part: as of `score_samples`.

    Returns:
        The store: `vectors` (N, H) of unit length, zero for a row without an answer token, which is never picked; no
        scores.

    Raises:
        DataSelectionError: as of `score_samples`.
    """
    checked_int(batch_size, "batch_size", 1, 2**20, "8 does on a CPU")
    rows, part_of_rows = pool_of(dataset), part_of_launch(part)
    key = {
        **store_identity(model, tokenizer, rows, active_adapters(model)),
        "layers": None,
        "projection": KIND,
        "batch_size": batch_size,
        "max_length": max_length,
        "seed": 0,
    }
    store = Store.prepare(out_dir, key, len(rows), [NORM], output_layer(model).in_features)
    device = next(model.parameters()).device
    words = getattr(tokenizer, "tokenizer", tokenizer)
    with scoring_mode(model):
        for places, batch in batches_to_do(rows, tokenizer, store, batch_size, max_length, part_of_rows):
            inputs, _ = collate(batch, words.pad_token_id or 0)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            found = weighted_mean(last_states(model, inputs), inputs["attention_mask"])
            norms = found.norm(dim=1)
            units = (found / norms.clamp(min=1e-30)[:, None]).cpu().numpy()
            answered = np.array([row.answers > 0 for row in batch])
            units[~answered] = 0.0
            store.write(places, np.where(answered, norms.double().cpu().numpy(), np.nan)[:, None], units)
    if part is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    store.finish()
    return store


def select_rds(store: Store, target: Store, *, budget: int, seed: int = 0) -> Selection:
    """RDS+: the target's examples, in their order, pick in turn the row that is left with the highest cosine to them.

    Args:
        store, target: of `represent_samples`, with one model.
        budget: how many rows.
        seed: of the random control.

    Returns:
        The selection; reasons: `task` (the number of the example, in eight digits) and `score` (the cosine).

    Raises:
        DataSelectionError: as of `targeted.select_for_target`, or a store holds other vectors.
    """
    for name, one in (("store", store), ("target", target)):
        if one.key.get("projection") != KIND:
            raise DataSelectionError(
                f"{name}: {one.folder} holds no hidden states; make it with represent_samples, or pick by "
                "gradients with select_for_target"
            )
    examples = [f"{i:08d}" for i in range(len(target))]
    return select_for_target(store, target, budget=budget, tasks=examples, turns="round_robin", seed=seed)
