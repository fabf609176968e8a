"""Whether rows, masked ones above all, are of the kind that an encoder was trained on.

A model's answer to a masked row tells what the masked token was worth only if masked rows are not strange to it. This
tests each row: the null hypothesis is that it comes from where the rows came from that the test was fitted to.

MaSF (max, Simes, Fisher), as arXiv 2310.07819 uses it after arXiv 2102.12967:

1. of every layer and unit the maximum over the tokens, (L + 1, D) numbers a row;
2. for each its empirical distribution over rows that fit, and with it a two-sided p-value;
3. over the units of a layer Simes' combination, min_i p_(i) D / i, and of that again an empirical p-value;
4. over the layers Fisher's, -2 sum log p, and of that again an empirical p-value.

Two departures. The rows of the fit are split in three, one part for each of the empirical distributions, where the
paper takes all rows for each: a row that helped to draw a distribution looks less extreme in it than a new one does,
and with three parts p-values of rows like those of the fit are uniform whatever the model, P(p <= a) <= a. And ranks
are counted so that no p-value is 0, since Fisher takes logarithms.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .masking import HalfMaskCollator, Ids, padded
from .selection import MAX_SEED, checked_int
from .texts import DataSelectionError

Floats = NDArray[np.float64]
# Rows of the fit: ten for each of the three distributions is as few as makes a p-value of 0.1 possible.
FEWEST = 30


class InDistributionTest:
    """The test, for one trained encoder.

    Args:
        model: an encoder that gives its hidden states, such as `BertForSequenceClassification`. It is asked in
            evaluation mode and left as it was.
        tokenizer: its tokenizer.
        masks: how rows are masked before the test is fitted to them: the collator of the training, with a seed of its
            own; None fits rows as they are.
        batch_size: rows a forward pass.
        seed: of the split in three.

    Raises:
        DataSelectionError: a value is not as above.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        masks: HalfMaskCollator | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.batch_size = checked_int(batch_size, "batch_size", 1, 2**20, "32 does on a CPU")
        self.model, self.tokenizer, self.masks = model, tokenizer, masks
        self.random = np.random.default_rng(checked_int(seed, "seed", 0, MAX_SEED, "any such number does"))
        self.units: Floats | None = None  # (n, L + 1, D), sorted along n
        self.layers: Floats = np.empty(0)  # (n, L + 1), sorted along n
        self.whole: Floats = np.empty(0)  # (n,), sorted

    def fit(self, rows: Sequence[Sequence[int]]) -> "InDistributionTest":
        """Learn what is in distribution from rows that the model was not trained on, the more the better.

        Args:
            rows: token numbers of each, unmasked where `masks` is given.

        Raises:
            DataSelectionError: there are too few rows, or the model gives no hidden states.
        """
        if len(rows) < FEWEST:
            raise DataSelectionError(f"{len(rows)} rows to fit; give at least {FEWEST}, and better some hundreds")
        order = self.random.permutation(len(rows))
        found = self._maxima([np.array(rows[i], np.int64) for i in order], self.masks)
        first, second, third = (found[part::3] for part in range(3))
        self.units = np.sort(first, axis=0)
        self.layers = np.sort(self._of_layers(second), axis=0)
        self.whole = np.sort(self._of_rows(third))
        return self

    def p_values(self, rows: Sequence[Sequence[int]]) -> Floats:
        """(N,) the p-value of each row, masked or not: uniform for rows like those of the fit, small for others.

        The smallest possible is 3 / (rows of the fit), about.

        Args:
            rows: token numbers of each, as the model is to be asked about them.

        Raises:
            DataSelectionError: the test is not fitted, or there are no rows.
        """
        if self.units is None:
            raise DataSelectionError("the test is not fitted; call fit(rows) first")
        if not len(rows):
            raise DataSelectionError("there are no rows to test; give at least one")
        statistic = self._of_rows(self._maxima([np.array(row, np.int64) for row in rows], None))
        at_least = len(self.whole) - np.searchsorted(self.whole, statistic, side="left")
        return (at_least + 1) / (len(self.whole) + 1)

    def p_value(self, rows: Sequence[Sequence[int]]) -> float:
        """Of all rows together, by Simes: small where some of them are strange. As of `p_values`."""
        return min(1.0, float(simes(self.p_values(rows)[None])[0]))

    def _of_layers(self, maxima: Floats) -> Floats:
        """(N, L + 1): Simes' combination over the units."""
        assert self.units is not None
        return simes(two_sided(maxima, self.units))

    def _of_rows(self, maxima: Floats) -> Floats:
        """(N,): Fisher's combination over the layers, the larger the stranger."""
        return -2.0 * np.log(two_sided(self._of_layers(maxima), self.layers)).sum(axis=-1)

    def _maxima(self, rows: Sequence[Ids], masks: HalfMaskCollator | None) -> Floats:
        """(N, L + 1, D)"""
        device, found = next(self.model.parameters()).device, []
        with _evaluated(self.model), torch.no_grad():
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                batch = padded(part, self.tokenizer) if masks is None else masks([{"input_ids": row} for row in part])
                batch = {name: value.to(device) for name, value in batch.items()}
                states = self.model(**batch, output_hidden_states=True).hidden_states
                if states is None:
                    raise DataSelectionError(f"a {type(self.model).__name__} gives no hidden states; give an encoder")
                found.append(token_maxima(torch.stack(states, dim=1), batch["attention_mask"]))
        return torch.cat(found).double().cpu().numpy()


def token_maxima(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The maximum over the tokens that are no padding: states (B, L, T, D), mask (B, T) -> (B, L, D)."""
    return states.float().masked_fill(mask[:, None, :, None] == 0, -torch.inf).amax(dim=2)


def two_sided(values: Floats, fitted: Floats) -> Floats:
    """How far out values are in an empirical distribution: twice the smaller tail, ties counted half, never 0.

    Args:
        values: (N, ...).
        fitted: (n, ...), sorted along the first axis.
    """
    below, upto = np.empty(values.shape), np.empty(values.shape)
    for place in np.ndindex(*values.shape[1:]):
        own = (slice(None), *place)
        below[own] = np.searchsorted(fitted[own], values[own], side="left")
        upto[own] = np.searchsorted(fitted[own], values[own], side="right")
    share = ((below + upto) / 2 + 0.5) / (len(fitted) + 1)
    return 2.0 * np.minimum(share, 1.0 - share)


def simes(p: Floats) -> Floats:
    """Simes' combination of p-values over the last axis: min_i p_(i) n / i with p_(1) <= p_(2) ..."""
    ranked = np.sort(p, axis=-1)
    return (ranked * (p.shape[-1] / np.arange(1, p.shape[-1] + 1))).min(axis=-1)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
