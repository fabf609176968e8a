"""Seeded linear maps from gradients to short vectors that keep inner products in expectation.

Two of them: a count-sketch of the whole gradient, and the projection of both factors of each parameter's gradient
(LoGra, arXiv 2405.13954). Both depend on nothing but the seed, their size and the shapes of the parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .ngrams import mix64
from .per_sample import linear_gradient
from .selection import checked_int


@dataclass(frozen=True)
class Factorised:
    """A projection of both factors of each parameter's gradient, for `projection=` where all layers are kept.

    Args:
        side: numbers that a row and a column of a gradient are brought down to; shorter ones are kept as they are. A
            vector has at most side * side numbers for each matrix of the adapter.
    """

    side: int = 16


Projection = int | Factorised | None
# (k, m, n): a parameter of k matrices.
Shape = tuple[int, int, int]


def projection_key(projection: Projection) -> dict[str, Any] | None:
    """What a store says of its projection.

    Raises:
        DataSelectionError: it is no projection.
    """
    if projection is None:
        return None
    if isinstance(projection, Factorised):
        checked_int(projection.side, "side", 1, 2**16, "16 gives at most 256 numbers for each matrix of the adapter")
        return {"kind": "factorised", "side": projection.side}
    checked_int(projection, "projection", 1, 2**31, "1024 keeps cosines to about 0.03; None keeps whole gradients")
    return {"kind": "count_sketch", "size": projection}


def projected_size(projection: Projection, shapes: Sequence[Shape]) -> int:
    """Length of the vectors that a projection makes of parameters of these shapes."""
    if isinstance(projection, Factorised):
        return sum(_projected_sizes(shapes, projection.side))
    return sum(map(prod, shapes)) if projection is None else projection


def _projected_sizes(shapes: Sequence[Shape], side: int) -> list[int]:
    return [k * min(m, side) * min(n, side) for k, m, n in shapes]


class CountSketch:
    """A seeded linear map from any number of coordinates to `size`: each is added, with a random sign, to one of them.

    Inner products are kept in expectation, with a standard deviation of about 1/sqrt(size) between unit vectors. Where
    coordinate j goes depends on the seed, the size and j alone.
    """

    def __init__(self, coordinates: int, size: int, seed: int, device: torch.device) -> None:
        hashes = _hashes(coordinates, _stream(seed, size))
        self.size = size
        self.buckets = torch.from_numpy(((hashes >> np.uint64(1)) % np.uint64(size)).astype(np.int64)).to(device)
        self.signs = _signs(hashes).to(device)

    def add(self, sketch: torch.Tensor, grads: torch.Tensor, first: int) -> None:
        """Add to `sketch` (B, size), in place, the coordinates `first` onwards: grads (B, n) float32."""
        last = first + grads.shape[1]
        sketch.index_add_(1, self.buckets[first:last], grads * self.signs[first:last])


class FactorProjection:
    """A seeded linear map of the gradient G (m, n) of each matrix of the adapter to P G Q^T, one after the other.

    A sample's gradient is a sum over tokens of outer products, G = sum_t g_t x_t^T, so that P G Q^T is the sum of
    (P g_t) (Q x_t)^T and needs no G. The entries of P (side, m) and Q (side, n) are 1/sqrt(side) with independent
    random signs, hence E P^T P = 1 and E <P G Q^T, P H Q^T> = <G, H>. A side that is no longer than `side` is left as
    it is, which is exact.

    Source: LoGra (arXiv 2405.13954), which starts its projections from principal components; these are random ones.
    """

    def __init__(self, shapes: Sequence[Shape], side: int, seed: int, device: torch.device) -> None:
        self.left = [self._matrices(k, m, side, _stream(seed, side, 2 * i)) for i, (k, m, _) in enumerate(shapes)]
        self.right = [self._matrices(k, n, side, _stream(seed, side, 2 * i + 1)) for i, (k, _, n) in enumerate(shapes)]
        self.left, self.right = ([m if m is None else m.to(device) for m in held] for held in (self.left, self.right))
        sizes = _projected_sizes(shapes, side)
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.size = sum(sizes)

    @staticmethod
    def _matrices(count: int, length: int, side: int, start: np.uint64) -> torch.Tensor | None:
        """(count, side, length), or None for the identity."""
        if length <= side:
            return None
        return (_signs(_hashes(count * side * length, start)) / side**0.5).view(count, side, length)

    def put(self, vectors: torch.Tensor, place: int, grads: torch.Tensor) -> None:
        """Put the projection of one parameter's gradients at its place in `vectors` (B, size).

        Args:
            vectors: changed in place.
            place: number of the parameter.
            grads: (B, k, m, n) float32.
        """
        left, found = self.left[place], _times(grads, self.right[place])
        self._fill(vectors, place, found if left is None else left @ found)

    def put_products(self, vectors: torch.Tensor, place: int, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """`put` for the gradients sum_t g_t x_t^T of a single matrix, k = 1.

        They are formed only where that is less work than their norm would be without it.

        Args:
            vectors: changed in place.
            place: number of the parameter.
            x: (B, T, n) float32.
            g: (B, T, m) float32.

        Returns:
            (B,) the squared norms of the whole gradients.
        """
        tokens, n, m = *x.shape[1:], g.shape[2]
        if tokens * (m + n) >= m * n:
            whole = linear_gradient(x, g)
            self.put(vectors, place, whole[:, None])
            return whole.square().sum((1, 2))
        left, right = ((None if held is None else held[0]) for held in (self.left[place], self.right[place]))
        self._fill(vectors, place, linear_gradient(_times(x, right), _times(g, left)))
        return squared_norms(x, g)

    def _fill(self, vectors: torch.Tensor, place: int, found: torch.Tensor) -> None:
        start = self.starts[place]
        vectors[:, start : start + found[0].numel()] = found.flatten(1)


def squared_norms(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """(B,) of sum_t g_t x_t^T, from the inner products of tokens alone: sum_{ts} (x_t . x_s) (g_t . g_s).

    Args:
        x: (B, T, n).
        g: (B, T, m).
    """
    return ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp(min=0)


def projector(
    projection: Projection, shapes: Sequence[Shape], seed: int, device: torch.device
) -> CountSketch | FactorProjection | None:
    """The map that a projection means for parameters of these shapes; None for whole gradients."""
    if projection is None:
        return None
    if isinstance(projection, Factorised):
        return FactorProjection(shapes, projection.side, seed, device)
    return CountSketch(sum(map(prod, shapes)), projection, seed, device)


def _times(rows: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    return rows if matrix is None else rows @ matrix.mT


def _stream(*numbers: int) -> np.uint64:
    """A start for `_hashes` of its own for every sequence of numbers."""
    state = mix64(np.array([numbers[0]], np.uint64))
    for number in numbers[1:]:
        state = mix64(state + np.uint64(number))
    return state[0]


def _hashes(count: int, start: np.uint64) -> NDArray[np.uint64]:
    hashes = np.empty(count, np.uint64)
    for first in range(0, count, 1 << 20):
        last = min(first + (1 << 20), count)
        places = np.arange(first + 1, last + 1, dtype=np.uint64)
        hashes[first:last] = mix64(start + places * np.uint64(0x9E3779B97F4A7C15))
    return hashes


def _signs(hashes: NDArray[np.uint64]) -> torch.Tensor:
    return torch.from_numpy(1.0 - 2.0 * (hashes & np.uint64(1)).astype(np.float32))
