"""Masked fine-tuning of encoders, after which masking a token is a fair question, and how faithful an explanation is.

Whether a token matters can be asked by masking it, if the model was trained on masked inputs: else what is measured may
be its surprise. `HalfMaskCollator` masks half of each batch; `faithfulness_curve` masks the most important tokens first
and compares with random ones; `in_distribution.InDistributionTest` says whether the masked rows are still of the kind
that the model was trained on, without which the curve means little.

Source: arXiv 2310.07819 ("faithfulness measurable masked language models").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from .selection import MAX_SEED, checked_int
from .texts import DataSelectionError

Ids = NDArray[np.int64]


class HalfMaskCollator:
    """Pads rows to a batch and masks tokens of some; a `data_collator` for classifiers on encoders.

    A masked row draws a rate between 0 and `most`, and each of its tokens but special ones is masked with that
    probability, independently.

    Args:
        tokenizer: of the encoder; it has a mask token.
        rows: "half", the second half of each batch (for an odd number the smaller part); "all"; or "coin", each row
            with probability a half.
        most: the highest rate.
        seed: of rates and masks.

    Calling it with mappings that hold `input_ids`, and `label` or `labels`, gives `input_ids`, `attention_mask` and,
    where there are any, `labels`.

    Raises:
        DataSelectionError: a value is not as above, or the tokenizer has no mask token, as those of decoders.
    """

    def __init__(
        self, tokenizer: Any, rows: Literal["half", "all", "coin"] = "half", most: float = 1.0, seed: int = 0
    ) -> None:
        if rows not in ("half", "all", "coin"):
            raise DataSelectionError(f"rows={rows!r}: must be 'half', 'all' or 'coin'")
        if not 0.0 < most <= 1.0:
            raise DataSelectionError(f"most={most!r}: must be above 0 and at most 1; it is the highest share masked")
        self.mask = mask_token(tokenizer)
        self.tokenizer, self.rows, self.most = tokenizer, rows, most
        self.random = np.random.default_rng(checked_int(seed, "seed", 0, MAX_SEED, "any such number does"))

    def __call__(self, features: Sequence[Any]) -> dict[str, torch.Tensor]:
        rows = [np.array(feature["input_ids"], np.int64) for feature in features]
        chosen = {
            "half": np.arange(len(rows)) >= (len(rows) + 1) // 2,
            "all": np.ones(len(rows), bool),
            "coin": self.random.random(len(rows)) < 0.5,
        }[self.rows]
        for i in np.flatnonzero(chosen):
            rate = self.random.uniform(0.0, self.most)
            hit = (self.random.random(len(rows[i])) < rate) & maskable(self.tokenizer, rows[i])
            rows[i] = np.where(hit, self.mask, rows[i])
        batch = padded(rows, self.tokenizer)
        labels = [feature.get("labels", feature.get("label")) for feature in features]
        return batch if labels[0] is None else {**batch, "labels": torch.tensor(labels)}


def padded(rows: Sequence[Ids], tokenizer: Any) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right: `input_ids` and `attention_mask`, (B, T) each."""
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    return {
        "input_ids": torch.tensor(np.stack([np.pad(r, (0, length - len(r)), constant_values=pad) for r in rows])),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows]),
    }


def mask_token(tokenizer: Any) -> int:
    """The number of the mask token.

    Raises:
        DataSelectionError: there is none.
    """
    if tokenizer.mask_token_id is None:
        raise DataSelectionError("the tokenizer has no mask token; give that of an encoder such as BERT")
    return tokenizer.mask_token_id


def maskable(tokenizer: Any, ids: Ids) -> NDArray[np.bool_]:
    """(T,) whether a token is none of the special ones."""
    return ~np.isin(ids, tokenizer.all_special_ids)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """A curve of performance over the share of tokens masked.

    Args:
        shares: (K,) from 0 to 1.
        masked: (K,) performance with the most important tokens masked.
        random: (K,) performance with as many random ones masked.
    """

    shares: NDArray[np.float64]
    masked: NDArray[np.float64]
    random: NDArray[np.float64]

    @property
    def acu(self) -> float:
        """Area between the curves: the integral of random - masked."""
        return float(np.trapezoid(self.random - self.masked, self.shares))

    @property
    def racu(self) -> float:
        """`acu` over the area that random masking leaves above what it ends with: 0 for an explanation no better than
        chance, 1 as if the first mask took everything, below 0 for one that is worse than chance. NaN where masking
        everything changes nothing."""
        most = float(np.trapezoid(self.random - self.random[-1], self.shares))
        return self.acu / most if abs(most) > 1e-12 else float("nan")


def faithfulness_curve(
    rows: Sequence[Sequence[int]],
    importance: Callable[[Sequence[Ids]], Sequence[NDArray[np.floating[Any]]]],
    performance: Callable[[Sequence[Ids]], float],
    tokenizer: Any,
    *,
    steps: int = 10,
    seed: int = 0,
) -> Faithfulness:
    """How much faster performance falls when the tokens that an explanation calls important are masked.

    Args:
        rows: token numbers of each row.
        importance: takes rows, some of whose tokens are masked, and gives a number for each token of each row. It is
            asked anew after each masking.
        performance: takes rows and gives a number, the higher the better, such as the accuracy on their labels.
        tokenizer: says what the mask token is, and which tokens cannot be masked.
        steps: masks are added in so many equal parts of a row's tokens, rounded up.
        seed: of the random masks.

    Raises:
        DataSelectionError: there are no rows, or a row's importances are not as many as its tokens.
    """
    checked_int(steps, "steps", 1, 2**20, "10 gives points at every tenth")
    if not len(rows):
        raise DataSelectionError("there are no rows to mask; give at least one")
    mask, start = mask_token(tokenizer), [np.array(row, np.int64) for row in rows]
    free = [maskable(tokenizer, row) for row in start]
    rng = np.random.default_rng(seed)
    chance = [rng.random(len(row)) for row in start]
    curves: list[list[float]] = []
    for explained in (True, False):
        now = [row.copy() for row in start]
        curve = [performance(now)]
        for step in range(1, steps + 1):
            scores = importance(now) if explained else chance
            for row, own, open_, score in zip(now, start, free, scores, strict=True):
                if len(score) != len(row):
                    raise DataSelectionError(f"{len(score)} importances for a row of {len(row)} tokens; give one each")
                left = np.flatnonzero(open_ & (row == own))
                count = -(-step * int(open_.sum()) // steps) - int((open_ & (row != own)).sum())
                row[left[np.argsort(-np.asarray(score)[left], kind="stable")[:count]]] = mask
            curve.append(performance(now))
        curves.append(curve)
    return Faithfulness(np.linspace(0.0, 1.0, steps + 1), np.array(curves[0]), np.array(curves[1]))
