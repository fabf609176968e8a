"""Kronecker-product linear maps: pure functions on tensors.

One product A (x) B with A (m_a, n_a) and B (m_b, n_b) is an (m, n) matrix, m = m_a m_b and n = n_a n_b, whose
product with x needs no (m, n) matrix. With X = x reshaped to (n_a, n_b), row-major as `torch.kron` orders it,

    (A (x) B) x = vec(A X B^T)                                          arXiv 2508.03527, reformulation of eq. 1

Either factor may go first, and the cheaper order differs from shape to shape by more than tenfold:

    B first: n m_b + m n_a multiplications          A first: n m_a + m n_b

Products of equal shape share two matrix products: the sum over products and the gates are absorbed by the inner
dimension of the second one.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from math import log

import torch

# Shapes that cost more than this many times the smallest are not mixed in: a dimension with few divisors would
# otherwise fill the mixture with nearly dense factors.
_LARGEST_TO_SMALLEST = 2.0


def balanced_shapes(n_out: int, n_in: int, n_shapes: int) -> list[tuple[int, int]]:
    """Choose the shapes (a_out, a_in) of the A factors for an (n_out, n_in) weight; B takes the complement.

    Shapes are ranked by parameters, a_out a_in + (n_out / a_out)(n_in / a_in), then by how square A is. Up to
    `n_shapes` are returned: fewer where the dimensions have too few divisors to offer more at a similar cost.
    For (4096, 4096) and five shapes: 64x64, 32x128, 128x32, 16x256, 256x16. The paper mixes five shapes but does
    not print them, so the choice is this library's; `MokaConfig.shapes` takes any other.

    >>> balanced_shapes(576, 576, 3)
    [(24, 24), (18, 32), (32, 18)]
    >>> balanced_shapes(7, 13, 3)  # primes leave nothing but rank one
    [(7, 1), (1, 13)]
    """
    if min(n_out, n_in, n_shapes) < 1:
        raise ValueError(f"n_out, n_in and n_shapes must be positive, got {n_out}, {n_in} and {n_shapes}")

    def cost(shape: tuple[int, int]) -> tuple[int, float, int]:
        a_out, a_in = shape
        return a_out * a_in + (n_out // a_out) * (n_in // a_in), abs(log(a_out / a_in)), a_out

    ranked = sorted(((o, i) for o in _divisors(n_out) for i in _divisors(n_in)), key=cost)
    limit = cost(ranked[0])[0] * _LARGEST_TO_SMALLEST
    return [shape for shape in ranked[:n_shapes] if cost(shape)[0] <= limit]


def kron_mix(
    x: torch.Tensor,
    factors_a: Sequence[torch.Tensor],
    factors_b: Sequence[torch.Tensor],
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a gated sum of Kronecker products: x @ (sum_i gate_i kron(A_i, B_i))^T, without building the sum.

    Args:
        x: (..., n_in).
        factors_a: r matrices A_i (m_a, n_a); shapes may differ from product to product.
        factors_b: r matrices B_i (m_b, n_b) with m_a m_b = n_out and n_a n_b = n_in for every i.
        gate: (r,) weights, or None for ones.

    Returns:
        (..., n_out), in the dtype of x.

    Raises:
        ValueError: the factors do not fit x, or each other.
    """
    _check_factors(x.shape[-1], factors_a, factors_b, gate)
    if gate is None:
        gate = x.new_ones(len(factors_a))
    groups: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for i, (a, b) in enumerate(zip(factors_a, factors_b, strict=True)):
        groups.setdefault((a.shape, b.shape), []).append(i)
    stacks_a = [torch.stack([factors_a[i] for i in at]) for at in groups.values()]
    stacks_b = [torch.stack([factors_b[i] for i in at]) for at in groups.values()]
    return kron_stacks(x, stacks_a, stacks_b, [gate[at] for at in groups.values()])


def kron_stacks(
    x: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], gates: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`kron_mix` with the products of equal shape stacked: for each shape a (k, m_a, n_a), b (k, m_b, n_b), gate (k,).

    For many rows of x the matrix itself is cheaper than its factored products, in time and in what is kept for the
    backward pass, and is built then.
    """
    if weight_is_cheaper(x.numel() // x.shape[-1], a, b):
        return x @ sum_all(kron_weight(*group) for group in zip(a, b, gates, strict=True)).T
    return sum_all(kron_group(x, *group) for group in zip(a, b, gates, strict=True))


def weight_is_cheaper(rows: int, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    """Whether building the (m, n) matrix moves fewer numbers than `rows` rows through the factors.

    Moving numbers, and not multiplying them, is what both ways wait for. The factors move, for each row, the
    intermediate T of every product and one input and one output for every shape; the matrix, r m n once. Measured on
    a CPU over (576, 576) to (2048, 2048), the matrix wins from 0.4 (bfloat16) to 0.8 (float32) of this bound.
    """
    moved, built = 0, 0
    for a_k, b_k in zip(a, b, strict=True):
        (k, m_a, n_a), (_, m_b, n_b) = a_k.shape, b_k.shape
        intermediate = m_a * n_b if a_first(m_a, n_a, m_b, n_b) else n_a * m_b
        moved += rows * (k * intermediate + n_a * n_b + m_a * m_b)
        built += k * m_a * m_b * n_a * n_b
    return moved > built


def kron_group(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """k products of one shape, through their factors: x (..., n_in), a (k, m_a, n_a), b (k, m_b, n_b), gate (k,)."""
    k, m_a, n_a = a.shape
    _, m_b, n_b = b.shape
    rows = x.reshape(-1, n_a, n_b)  # (N, n_a, n_b)
    gate = gate.to(x.dtype)[:, None, None]
    if a_first(m_a, n_a, m_b, n_b):
        t = rows.transpose(1, 2) @ a.reshape(k * m_a, n_a).T  # (N, n_b, k m_a)
        t = t.view(-1, n_b, k, m_a).permute(0, 3, 2, 1).reshape(-1, m_a, k * n_b)
        y = t @ (gate * b).transpose(1, 2).reshape(k * n_b, m_b)  # (N, m_a, m_b)
    else:
        t = rows @ b.reshape(k * m_b, n_b).T  # (N, n_a, k m_b)
        t = t.view(-1, n_a, k, m_b).permute(0, 3, 2, 1).reshape(-1, m_b, k * n_a)
        y = (t @ (gate * a).transpose(1, 2).reshape(k * n_a, m_a)).transpose(1, 2)  # (N, m_a, m_b)
    return y.reshape(*x.shape[:-1], m_a * m_b)


def kron_weight(a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The (m, n) matrix sum_i gate_i kron(A_i, B_i) of k products of one shape, as one matrix product over k."""
    k, m_a, n_a = a.shape
    _, m_b, n_b = b.shape
    gated = (gate.to(a.dtype)[:, None, None] * a).reshape(k, m_a * n_a)
    blocks = (gated.T @ b.reshape(k, m_b * n_b)).view(m_a, n_a, m_b, n_b)
    return blocks.transpose(1, 2).reshape(m_a * m_b, n_a * n_b)


def a_first(m_a: int, n_a: int, m_b: int, n_b: int) -> bool:
    """Whether A X first, then B^T, takes fewer multiplications than X B^T first, then A."""
    n, m = n_a * n_b, m_a * m_b
    return n * m_a + m * n_b < n * m_b + m * n_a


def sum_all(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, parts)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _check_factors(
    n_in: int, factors_a: Sequence[torch.Tensor], factors_b: Sequence[torch.Tensor], gate: torch.Tensor | None
) -> None:
    if not factors_a or len(factors_a) != len(factors_b):
        raise ValueError(f"need as many A as B factors, at least one: got {len(factors_a)} and {len(factors_b)}")
    if gate is not None and gate.shape != (len(factors_a),):
        raise ValueError(f"gate must have shape ({len(factors_a)},), one weight a product, got {tuple(gate.shape)}")
    n_out = factors_a[0].shape[0] * factors_b[0].shape[0]
    for i, (a, b) in enumerate(zip(factors_a, factors_b, strict=True)):
        if a.shape[1] * b.shape[1] != n_in or a.shape[0] * b.shape[0] != n_out:
            raise ValueError(
                f"product {i}: A {tuple(a.shape)} and B {tuple(b.shape)} make a "
                f"({a.shape[0] * b.shape[0]}, {a.shape[1] * b.shape[1]}) matrix, expected ({n_out}, {n_in})"
            )
