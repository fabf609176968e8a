"""How well a model gives the answers of some rows, from one forward pass and without generating."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from .encoding import Encoded, collate, encode, image_signature
from .gradients import scoring_mode
from .scores import answer_logits, answer_places, sample_means, token_scores
from .texts import DataSelectionError


def answer_performance(
    model: Any, tokenizer: Any, rows: Sequence[Any], *, batch_size: int = 8, max_length: int | None = 2048
) -> dict[str, float]:
    """Two measures of the rows' answers, both from 0 to 1 and the higher the better.

    - `accuracy`: the share of rows whose every answer token is the likeliest after those before it, which is the share
      for which greedy decoding gives the answer word for word, its end included.
    - `probability`: exp of minus the mean over rows of the mean answer NLL: the geometric mean probability of an answer
      token. It has a meaning where no answer is ever given word for word.

    Args:
        model: a causal language model, bare or a `peft.PeftModel`; left as it was.
        tokenizer: its tokenizer, or for rows with images its processor.
        rows: see `encoding.encode`. Rows without an answer token do not count.
        batch_size: rows a batch.
        max_length: tokens of a row that are read; None for all.

    Raises:
        DataSelectionError: no row has an answer token, or a row cannot be read.
    """
    encoded = [encode(tokenizer, row, f"row {i}", max_length) for i, row in enumerate(rows)]
    encoded = [row for row in encoded if row.answers]
    if not encoded:
        raise DataSelectionError("no row has an answer token, so there is nothing to measure by; look at the rows")
    words = getattr(tokenizer, "tokenizer", tokenizer)
    device = next(model.parameters()).device
    right, nll = [], []
    with scoring_mode(model), torch.no_grad():
        for batch in _batches(encoded, batch_size):
            inputs, labels = collate(batch, words.pad_token_id or 0)
            places, targets, owner = answer_places(labels.to(device))
            logits = answer_logits(model, {name: value.to(device) for name, value in inputs.items()}, places)
            hits = (logits.argmax(dim=-1) == targets).float()
            right.append(sample_means(hits, owner, len(batch)) == 1.0)
            nll.append(sample_means(token_scores(logits, targets)["nll"], owner, len(batch)))
    return {
        "accuracy": float(np.concatenate(right).mean()),
        "probability": float(np.exp(-np.concatenate(nll).mean())),
    }


def _batches(rows: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    """Rows whose images fit in one tensor, of like length."""

    def shape(row: Encoded) -> str:
        return repr(image_signature(row))

    for _, alike in groupby(sorted(rows, key=lambda row: (shape(row), len(row))), key=shape):
        held = list(alike)
        yield from (held[first : first + size] for first in range(0, len(held), size))
