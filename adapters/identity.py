"""MoKA_s, the light variant: one factor of every product is the identity, and only the other one is trained.

I (x) B repeats B along the diagonal; A (x) I mixes blocks of neighbours by A. Products of one shape then add up to a
single one, so r products over n_shapes shapes reach no more than n_shapes products do; the paper's body was not
readable, and what it does about that is not known.
"""

from collections.abc import Sequence
from math import gcd
from typing import Literal

import torch

from .kronecker import sum_all

Fixed = Literal["A", "B"]


def identity_sizes(n_out: int, n_in: int, n_shapes: int) -> list[int]:
    """Up to `n_shapes` sizes of the identity for a layer: common divisors, the trained factor never above balanced.

    The trained factor has n_out n_in / size^2 numbers. The sizes begin at the first divisor for which that is at most
    sqrt(n_out n_in), a balanced factor's count, and go up; where there is none, the largest divisor stands alone.

    >>> identity_sizes(4096, 4096, 5)
    [64, 128, 256, 512, 1024]
    >>> identity_sizes(576, 192, 3)
    [24, 32, 48]
    """
    common = [size for size in range(1, gcd(n_out, n_in) + 1) if n_out % size == 0 and n_in % size == 0]
    light = [size for size in common if size**4 >= n_out * n_in]
    return light[:n_shapes] or common[-1:]


def identity_mix(
    x: torch.Tensor, factors: Sequence[torch.Tensor], gates: Sequence[torch.Tensor], fixed: Fixed
) -> torch.Tensor:
    """Apply a gated sum of Kronecker products of which one factor is the identity.

    Args:
        x: (..., n_in).
        factors: for each shape the trained factors, (k, m, n): of size B where A is the identity, else of size A.
        gates: for each shape (k,).
        fixed: the factor that is the identity.

    Returns:
        (..., n_out), in the dtype of x.
    """
    return sum_all(_one_shape(x, factor, gate, fixed) for factor, gate in zip(factors, gates, strict=True))


def _one_shape(x: torch.Tensor, factor: torch.Tensor, gate: torch.Tensor, fixed: Fixed) -> torch.Tensor:
    summed = torch.einsum("k,kmn->mn", gate.to(factor.dtype), factor)  # equal shapes add up
    size = x.shape[-1] // summed.shape[1]
    if fixed == "A":
        y = x.unflatten(-1, (size, summed.shape[1])) @ summed.T  # (..., size, m)
    else:
        y = summed @ x.unflatten(-1, (summed.shape[1], size))  # (..., m, size)
    return y.flatten(-2)
