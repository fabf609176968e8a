"""Kronecker-product linear maps: pure functions on tensors.

One product A (x) B with A (m_a, n_a) and B (m_b, n_b) is an (m, n) matrix, m = m_a m_b and n = n_a n_b, whose
product with x needs no (m, n) matrix. With X = x reshaped to (n_a, n_b), row-major as `torch.kron` orders it,

    (A (x) B) x = vec(A X B^T)                                          arXiv 2508.03527, reformulation of eq. 1

Either factor may go first, and the cheaper order differs from shape to shape by more than tenfold:

    B first: n m_b + m n_a multiplications          A first: n m_a + m n_b

Products of equal shape share two matrix products: the sum over products is absorbed by the inner dimension of the
second one, the gates by a factor. `arrange` says how.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from importlib.util import find_spec
from math import log
from typing import Any, NamedTuple

import torch

# Shapes that cost more than this many times the smallest are not mixed in: a dimension with few divisors would
# otherwise fill the mixture with nearly dense factors.
_LARGEST_TO_SMALLEST = 2.0

# Measured on a CPU over 128, 256 and 512 rows of a 2048 x 2048 layer. Below this width a batch of float32 products
# costs twice one product with a copy before and after it; larger slices fall out of the second-level cache.
_NARROW = 16
_SLICE_BYTES = 2**20

_fused = False


def use_fused(on: bool = True) -> None:
    """Compute Kronecker sums with the Triton kernels of `fused.py`, in this process, from the next forward pass on.

    Off at the start: the kernels are verified in Triton's interpreter and not timed on a GPU. They take CUDA tensors in
    float32, bfloat16 and float16, and raise a RuntimeError elsewhere. They are used at any number of rows. Under
    `torch.compile`, and for MoKA_s, the switch changes nothing.

    Raises:
        RuntimeError: Triton is not installed.
    """
    global _fused
    if on and find_spec("triton") is None:
        raise RuntimeError("the fused kernels need Triton, which is not installed: pip install 'triton>=3.4'")
    _fused = on


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

    Raises:
        ValueError: a size or the number of shapes is below one.
    """
    if min(n_out, n_in, n_shapes) < 1:
        raise ValueError(f"n_out, n_in and n_shapes must be positive, got {n_out}, {n_in} and {n_shapes}")

    def cost(shape: tuple[int, int]) -> tuple[int, float, int]:
        a_out, a_in = shape
        return a_out * a_in + (n_out // a_out) * (n_in // a_in), abs(log(a_out / a_in)), a_out

    ranked = sorted(((o, i) for o in divisors(n_out) for i in divisors(n_in)), key=cost)
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

    For many rows of x the matrix itself is cheaper than its factored products, and is built then. Through the factors,
    the backward pass keeps x and the factors alone and computes the rest again; it can be taken once, and
    create_graph=True is refused with a RuntimeError. Under `torch.compile` the same products are left to the compiler.
    `use_fused` has them computed by Triton kernels, never through the matrix.
    """
    device = x.device.type
    if _autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        x, a, b = x.to(dtype), [a_k.to(dtype) for a_k in a], [b_k.to(dtype) for b_k in b]
    with _without_autocast(device):
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # (N, n_in)
        fused = _fused and not torch.compiler.is_compiling()
        if not fused and weight_is_cheaper(rows.shape[0], a, b):
            y = rows @ sum_all(kron_weight(*group) for group in zip(a, b, gates, strict=True)).T
        elif torch.compiler.is_compiling():
            y = sum_all(kron_group(rows, *group) for group in zip(a, b, gates, strict=True))
        else:
            groups = [arrange(*group) for group in zip(a, b, gates, strict=True)]
            factors = [factor for left, right, _ in groups for factor in (left, right)]
            y = _KronSum.apply(rows, [order for _, _, order in groups], fused, *factors)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # which has no such state


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


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


class Order(NamedTuple):
    """How the k products of one shape are computed; fixed by their sizes."""

    a_first: bool
    k: int
    m_a: int
    n_a: int
    m_b: int
    n_b: int


def arrange(a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Order]:
    """Lay out k products of one shape as one left and one right matrix, the gates in the left one.

    With X (n_a, n_b) and the k products numbered by i, the sum of all A_i X B_i^T is two plain products. Whichever
    comes first leaves i as the inner half of one index; the other contracts i together with its own. Reading that
    index in the other place moves no number:

        A first: T = L X, L (m_a k, n_a);  T (m_a k, n_b) read as (m_a, k n_b);  Y = T R, R (k n_b, m_b)
        B first: T = X R, R (n_b, k m_b);  T (n_a, k m_b) read as (n_a k, m_b);  Y = L T, L (m_a, n_a k)
    """
    k, m_a, n_a = a.shape
    _, m_b, n_b = b.shape
    order = Order(a_first(m_a, n_a, m_b, n_b), k, m_a, n_a, m_b, n_b)
    gated = (gate[:, None, None] * a).to(b.dtype)
    if order.a_first:
        return gated.transpose(0, 1).reshape(m_a * k, n_a), b.transpose(1, 2).reshape(k * n_b, m_b), order
    return gated.permute(1, 2, 0).reshape(m_a, n_a * k), b.reshape(k * m_b, n_b).T, order


def kron_group(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """k products of one shape: x (N, n_in), a (k, m_a, n_a), b (k, m_b, n_b), gate (k,) -> (N, n_out)."""
    left, right, order = arrange(a, b, gate)
    rows = x.reshape(x.shape[0], order.n_a, order.n_b)
    t = first_half(rows, left, right, order)
    y = times_right(t, right) if order.a_first else times_left(left, t)  # (N, m_a, m_b)
    return y.reshape(x.shape[0], order.m_a * order.m_b)


def first_half(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, order: Order) -> torch.Tensor:
    """The intermediate T of x (N, n_a, n_b): (N, m_a, k n_b), A first, or (N, n_a k, m_b), B first."""
    if order.a_first:
        return times_left(left, x).reshape(x.shape[0], order.m_a, order.k * order.n_b)
    return times_right(x, right).reshape(x.shape[0], order.n_a * order.k, order.m_b)


def add_group(y: torch.Tensor, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, order: Order) -> None:
    """Add k products of one shape to y (N, n_out), in place; x is (N, n_in)."""
    x = x.view(x.shape[0], order.n_a, order.n_b)
    y = y.view(y.shape[0], order.m_a, order.m_b)
    t = first_half(x, left, right, order)
    if order.a_first:
        times_right(t, right, onto=y)
    else:
        times_left(left, t, onto=y)


def group_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    order: Order,
    grad_x: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backward pass of `add_group`: grad (N, n_out) is that of y. Adds to grad_x (N, n_in), where it is wanted.

    Returns:
        The gradients of left and right.
    """
    n = x.shape[0]
    x = x.view(n, order.n_a, order.n_b)
    grad = grad.view(n, order.m_a, order.m_b)
    onto = None if grad_x is None else grad_x.view(x.shape)
    t = first_half(x, left, right, order)
    if order.a_first:
        grad_right = right_gradient(t, grad)
        grad_t = times_right(grad, right.T).view(n, order.m_a * order.k, order.n_b)
        if onto is not None:
            times_left(left.T, grad_t, onto=onto)
        return left_gradient(grad_t, x), grad_right
    grad_left = left_gradient(grad, t)
    grad_t = times_left(left.T, grad).view(n, order.n_a, order.k * order.m_b)
    if onto is not None:
        times_right(grad_t, right.T, onto=onto)
    return grad_left, right_gradient(x, grad_t)


def times_right(x: torch.Tensor, right: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """X_n R for every n: x (N, p, q), right (q, s) -> (N, p, s), added to `onto` in place where it is given."""
    flat = x.reshape(-1, x.shape[2]) if x.numel() else x.new_empty(0, x.shape[2])
    if onto is not None:
        onto.view(flat.shape[0], right.shape[1]).addmm_(flat, right)
        return onto
    return (flat @ right).view(x.shape[0], x.shape[1], right.shape[1])


def times_left(left: torch.Tensor, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """L X_n for every n: left (s, p), x (N, p, q) -> (N, s, q), added to `onto` in place where it is given."""
    if x.shape[2] == 1:  # a ladder's first rung: one plain product, as a LoRA's
        y = times_right(x.transpose(1, 2), left.T, None if onto is None else onto.transpose(1, 2))
        return y.transpose(1, 2)
    if x.shape[2] < _NARROW and x.dtype == torch.float32:
        y = times_right(x.transpose(1, 2), left.T).transpose(1, 2)
        return y.contiguous() if onto is None else onto.add_(y)
    wide = left.contiguous().expand(x.shape[0], -1, -1)
    return torch.bmm(wide, x) if onto is None else onto.baddbmm_(wide, x)


def right_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The sum over n of X_n^T G_n: x (N, p, q), grad (N, p, s) -> (q, s)."""
    return x.flatten(0, 1).T @ grad.flatten(0, 1)


def left_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The sum over n of G_n X_n^T: grad (N, s, q), x (N, p, q) -> (s, p)."""
    if x.shape[2] == 1:  # nothing to copy
        return grad.flatten(1).T @ x.flatten(1)
    return grad.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T


class _KronSum(torch.autograd.Function):
    """The sum over all shapes; keeps its inputs for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, orders: list[Order], fused: bool, *factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, *factors)
        ctx.orders, ctx.fused = orders, fused
        y = rows.new_zeros(rows.shape[0], orders[0].m_a * orders[0].m_b)
        _engine(fused, rows).add_sum(y, rows, factors, orders)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the products below would be missing from that graph
            raise RuntimeError(
                "the Kronecker update has no second derivative: call backward() or grad() without create_graph=True, "
                "or take the matrix from kron_weight() and multiply by it"
            )
        rows, *factors = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        with _without_autocast(rows.device.type):
            grad_rows, totals = _engine(ctx.fused, rows).sum_gradients(
                grad, rows, factors, ctx.orders, ctx.needs_input_grad[0]
            )
        return grad_rows, None, None, *(total.to(f.dtype) for total, f in zip(totals, factors, strict=True))


def _engine(fused: bool, x: torch.Tensor) -> Any:
    """What computes the two passes: this module, or the Triton kernels, which take the same arguments."""
    if not fused:
        return sys.modules[__name__]
    from . import fused as kernels

    kernels.check_can_run(x)
    return kernels


def add_sum(y: torch.Tensor, x: torch.Tensor, factors: Sequence[torch.Tensor], orders: Sequence[Order]) -> None:
    """Add every product of every shape to y (N, n_out), in place, a slice of rows at a time.

    Args:
        y: (N, n_out).
        x: (N, n_in).
        factors: left and right of each shape in turn, as `arrange` lays them out.
        orders: one a shape.
    """
    size = slice_size(x)
    for part, onto in zip(x.split(size), y.split(size), strict=True):
        for left, right, order in zip(factors[::2], factors[1::2], orders, strict=True):
            add_group(onto, part, left, right, order)


def sum_gradients(
    grad: torch.Tensor, x: torch.Tensor, factors: Sequence[torch.Tensor], orders: Sequence[Order], wanted: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The backward pass of `add_sum`: grad (N, n_out) is that of y.

    Returns:
        The gradient of x (N, n_in), or None where it is not wanted, and those of the factors in float32 or above.
    """
    size = slice_size(x)
    grad_x = torch.zeros_like(x) if wanted else None
    # Slices are summed in float32, where the dtype of x would lose digits from sum to sum.
    sums = [torch.zeros(f.shape, dtype=torch.promote_types(f.dtype, torch.float32), device=f.device) for f in factors]
    for start in range(0, x.shape[0], size):
        g, part = grad[start : start + size], x[start : start + size]
        onto = None if grad_x is None else grad_x[start : start + size]
        for i, order in enumerate(orders):
            parts = group_gradients(g, part, factors[2 * i], factors[2 * i + 1], order, onto)
            for total, own in zip(sums[2 * i : 2 * i + 2], parts, strict=True):
                total.add_(own)
    return grad_x, sums


def slice_size(rows: torch.Tensor) -> int:
    """Rows that go through the factors together: on a CPU a slice and its intermediates should stay in the cache."""
    per_slice = _SLICE_BYTES if rows.device.type == "cpu" else 64 * _SLICE_BYTES
    return max(1, per_slice // (rows.shape[1] * rows.element_size()))


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


def divisors(number: int) -> list[int]:
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
