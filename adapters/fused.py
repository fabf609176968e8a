"""The Kronecker sum as Triton kernels, for CUDA. Verified in Triton's interpreter; not timed on a GPU.

Unfused, each shape reads x, writes its intermediate T, reads T, and reads and writes y. Here a program owns a few rows:
it takes them through every product of every shape, keeps T on chip, and is the only one to touch its rows of y, so
that x and y cross the memory bus once (between shapes they are found in the cache).

The mathematics is that of `kronecker`: the same grouping by shape, the same left and right matrices with the gates in
the left one, the same order. A tile of R rows X_r (n_a, n_b) is laid out as [n_a][R][n_b]. Read as (n_a, R n_b) it is
multiplied by A from the left, read as (n_a R, n_b) by B^T from the right, and no number moves between the two:

    A first: T = A_i X, (m_a, R n_b) read as (m_a R, n_b);  Y += T B_i^T, (m_a R, m_b)
    B first: T = X B_i^T, (n_a R, m_b) read as (n_a, R m_b);  Y += A_i T, (m_a, R m_b)

Sides are padded with zeros to powers of two of at least 16, as the tensor cores want.
"""

# Kernels are launched as kernel[grid](...), and written in a subset of Python, which pyright does not know.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .kronecker import Order

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when the kernels below are defined
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TILE = 2**14  # numbers in the largest tile: 64 KiB of float32, a quarter of a multiprocessor's registers
_MOST_ROWS = 8
_PARTS = 128  # programs that share the rows of one product's gradient, each with a sum of its own
_LARGEST_TILE = 2**17  # beyond it, a row does not fit on chip


def check_can_run(x: torch.Tensor) -> None:
    """Raise a RuntimeError that says why the kernels cannot take x, if they cannot."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"the fused Kronecker kernels run on CUDA, and x is on {x.device}; move the model, call "
            "use_fused(False), or set TRITON_INTERPRET=1 at the start to run them, slowly, in the interpreter"
        )
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"the fused Kronecker kernels compute in float32, bfloat16 and float16, not in {x.dtype}; call "
            "use_fused(False), or convert x"
        )


def check_fits(order: Order) -> None:
    """Raise a RuntimeError if a row of the products of this shape does not fit on chip."""
    sizes = {"input": _padded(order.n_a) * _padded(order.n_b), "output": _padded(order.m_a) * _padded(order.m_b)}
    for name, size in sizes.items():
        if size > _LARGEST_TILE:
            raise RuntimeError(
                f"one {name} row of A ({order.m_a}, {order.n_a}) and B ({order.m_b}, {order.n_b}) takes {size} numbers "
                f"when padded, and the fused kernels hold at most {_LARGEST_TILE}; call use_fused(False), give other "
                "shapes, or leave the layer out with exclude_modules"
            )


def add_sum(y: torch.Tensor, x: torch.Tensor, factors: Sequence[torch.Tensor], orders: Sequence[Order]) -> None:
    """Add every product of every shape to y (N, n_out), in place: x (N, n_in), left and right of each shape in turn."""
    for order in orders:
        check_fits(order)
    offsets = _offsets(factors)
    rows = min(_rows_a_program(order) for order in orders)
    shapes = tuple(
        (*order, offsets[2 * i], offsets[2 * i + 1], *_blocks(order), _first_tile(order, rows))
        for i, order in enumerate(orders)
    )
    grid = (triton.cdiv(x.shape[0], rows),)
    _add_sum[grid](x, y, _packed(factors), x.shape[0], SHAPES=shapes, R=rows, WIDEN=INTERPRETED, num_warps=8)


def sum_gradients(
    grad: torch.Tensor, x: torch.Tensor, factors: Sequence[torch.Tensor], orders: Sequence[Order], wanted: bool
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The backward pass of `add_sum`: grad (N, n_out) is that of y.

    Returns:
        The gradient of x (N, n_in), or None where it is not wanted, and those of the factors in float32.
    """
    grad_x = None
    if wanted:  # (A (x) B)^T = A^T (x) B^T
        grad_x = torch.zeros_like(x)
        add_sum(grad_x, grad, [factor.T for factor in factors], [transposed(order) for order in orders])
    grads = []
    for left, right, order in zip(factors[::2], factors[1::2], orders, strict=True):
        if order.a_first:
            grads += _factor_gradients(grad, x, left, right, order)
        else:  # the transposed product is one that takes A first, from y to x
            grads += [part.T for part in _factor_gradients(x, grad, left.T, right.T, transposed(order))]
    return grad_x, grads


def transposed(order: Order) -> Order:
    """The order of the transposed products, whose left and right matrices are those of `order` transposed."""
    return Order(not order.a_first, order.k, order.n_a, order.m_a, order.n_b, order.m_b)


def _factor_gradients(
    grad: torch.Tensor, x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, order: Order
) -> list[torch.Tensor]:
    """The gradients of left and right where A comes first, in float32."""
    check_fits(order)
    rows = _rows_a_program(order)
    parts = min(_PARTS, triton.cdiv(x.shape[0], rows))
    sums = [torch.empty(parts, f.numel(), dtype=torch.float32, device=x.device) for f in (left, right)]
    blocks = dict(zip(("MA", "NA", "MB", "NB"), _blocks(order), strict=True))
    sizes = dict(zip(("K", "m_a", "n_a", "m_b", "n_b"), order[1:], strict=True))
    _add_factor_gradients[(parts, order.k)](
        x,
        grad,
        left.contiguous(),
        right.contiguous(),
        *sums,
        x.shape[0],
        parts,
        **sizes,
        **blocks,
        R=rows,
        WIDEN=INTERPRETED,
        num_warps=8,
    )
    return [total.sum(0).view(f.shape) for total, f in zip(sums, (left, right), strict=True)]


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _blocks(order: Order) -> tuple[int, int, int, int]:
    return _padded(order.m_a), _padded(order.n_a), _padded(order.m_b), _padded(order.n_b)


def _rows_a_program(order: Order) -> int:
    m_a, n_a, m_b, n_b = _blocks(order)
    return min(_MOST_ROWS, max(1, _TILE // max(m_a * m_b, n_a * n_b)))


def _first_tile(order: Order, rows: int) -> int:
    """How much of the first factor's outputs goes through together, so that the tile of y is at most `_TILE`."""
    m_a, _, m_b, _ = _blocks(order)
    first, second = (m_a, m_b) if order.a_first else (m_b, m_a)
    return max(16, min(first, _TILE // (rows * second)))


def _packed(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([factor.reshape(-1) for factor in factors])


def _offsets(factors: Sequence[torch.Tensor]) -> list[int]:
    """Where each factor begins in `_packed`."""
    starts = [0]
    for factor in factors:
        starts.append(starts[-1] + factor.numel())
    return starts


@triton.jit
def _matrix(start_p, p_size, p_stride, P: tl.constexpr, q_size, q_stride, Q: tl.constexpr, start_q):
    """Offsets (P, Q) of the elements (start_p + p, start_q + q) of a matrix, and which of them exist."""
    p = start_p + tl.arange(0, P)[:, None]
    q = start_q + tl.arange(0, Q)[None, :]
    return p * p_stride + q * q_stride, (p < p_size) & (q < q_size)


@triton.jit
def _rows(row, rows, a_size, b_size, start_a, A: tl.constexpr, R: tl.constexpr, start_b, B: tl.constexpr):
    """Offsets (A, R B) of R rows, seen as (a_size, b_size), laid out as [A][R][B], and which of them exist."""
    a = start_a + tl.arange(0, A)[:, None]
    column = tl.arange(0, R * B)[None, :]
    r = row + column // B
    b = start_b + column % B
    return r.to(tl.int64) * (a_size * b_size) + a * b_size + b, (a < a_size) & (b < b_size) & (r < rows)


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """a b, summed in float32. The interpreter multiplies the bits of bfloat16 as whole numbers, unless widened."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_to(y_at, y, row, rows, a_size, b_size, start_a, A: tl.constexpr, R: tl.constexpr, start_b, B: tl.constexpr):
    at, there = _rows(row, rows, a_size, b_size, start_a, A, R, start_b, B)
    before = tl.load(y_at + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y_at + at, (before + tl.reshape(y, (A, R * B))).to(y_at.dtype.element_ty), mask=there)


@triton.jit
def _add_sum(x_at, y_at, factors_at, rows, SHAPES: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr):
    """y += sum over shapes and products of A_i X B_i^T, for R rows."""
    row = tl.program_id(0) * R
    for s in tl.static_range(len(SHAPES)):
        if SHAPES[s][0]:
            _add_a_first(x_at, y_at, factors_at, row, rows, SHAPES[s], R, WIDEN)
        else:
            _add_b_first(x_at, y_at, factors_at, row, rows, SHAPES[s], R, WIDEN)
        tl.debug_barrier()  # the next shape gives the numbers of y to other threads


@triton.jit
def _add_a_first(x_at, y_at, factors_at, row, rows, SHAPE: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr):
    K: tl.constexpr = SHAPE[1]
    m_a: tl.constexpr = SHAPE[2]
    n_a: tl.constexpr = SHAPE[3]
    m_b: tl.constexpr = SHAPE[4]
    n_b: tl.constexpr = SHAPE[5]
    left_at = factors_at + SHAPE[6]  # (m_a K, n_a)
    right_at = factors_at + SHAPE[7]  # (K n_b, m_b)
    NA: tl.constexpr = SHAPE[9]
    MB: tl.constexpr = SHAPE[10]
    NB: tl.constexpr = SHAPE[11]
    TILE: tl.constexpr = SHAPE[12]
    at, there = _rows(row, rows, n_a, n_b, 0, NA, R, 0, NB)
    x = tl.load(x_at + at, mask=there, other=0.0)  # (NA, R NB)
    b_at, b_there = _matrix(0, n_b, m_b, NB, m_b, 1, MB, 0)
    for start in range(0, m_a, TILE):
        a_at, a_there = _matrix(start, m_a, K * n_a, TILE, n_a, 1, NA, 0)
        y = tl.full((TILE * R, MB), 0.0, tl.float32)
        for i in tl.static_range(K):
            a = tl.load(left_at + i * n_a + a_at, mask=a_there, other=0.0)  # A_i: (TILE, NA)
            b_t = tl.load(right_at + i * n_b * m_b + b_at, mask=b_there, other=0.0)  # B_i^T: (NB, MB)
            t = _dot(a, x, WIDEN).to(x.dtype)  # (TILE, R NB)
            y += _dot(tl.reshape(t, (TILE * R, NB)), b_t, WIDEN)
        _add_to(y_at, y, row, rows, m_a, m_b, start, TILE, R, 0, MB)


@triton.jit
def _add_b_first(x_at, y_at, factors_at, row, rows, SHAPE: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr):
    K: tl.constexpr = SHAPE[1]
    m_a: tl.constexpr = SHAPE[2]
    n_a: tl.constexpr = SHAPE[3]
    m_b: tl.constexpr = SHAPE[4]
    n_b: tl.constexpr = SHAPE[5]
    left_at = factors_at + SHAPE[6]  # (m_a, n_a K)
    right_at = factors_at + SHAPE[7]  # (n_b, K m_b)
    MA: tl.constexpr = SHAPE[8]
    NA: tl.constexpr = SHAPE[9]
    NB: tl.constexpr = SHAPE[11]
    TILE: tl.constexpr = SHAPE[12]
    at, there = _rows(row, rows, n_a, n_b, 0, NA, R, 0, NB)
    x = tl.reshape(tl.load(x_at + at, mask=there, other=0.0), (NA * R, NB))
    a_at, a_there = _matrix(0, m_a, n_a * K, MA, n_a, K, NA, 0)
    for start in range(0, m_b, TILE):
        b_at, b_there = _matrix(0, n_b, K * m_b, NB, m_b, 1, TILE, start)
        y = tl.full((MA, R * TILE), 0.0, tl.float32)
        for i in tl.static_range(K):
            a = tl.load(left_at + i + a_at, mask=a_there, other=0.0)  # A_i: (MA, NA)
            b_t = tl.load(right_at + i * m_b + b_at, mask=b_there, other=0.0)  # B_i^T: (NB, TILE)
            t = _dot(x, b_t, WIDEN).to(x.dtype)  # (NA R, TILE)
            y += _dot(a, tl.reshape(t, (NA, R * TILE)), WIDEN)
        _add_to(y_at, y, row, rows, m_a, m_b, 0, MA, R, start, TILE)


@triton.jit
def _add_factor_gradients(
    x_at,
    grad_at,
    left_at,
    right_at,
    left_sums_at,
    right_sums_at,
    rows,
    parts,
    K: tl.constexpr,
    m_a: tl.constexpr,
    n_a: tl.constexpr,
    m_b: tl.constexpr,
    n_b: tl.constexpr,
    MA: tl.constexpr,
    NA: tl.constexpr,
    MB: tl.constexpr,
    NB: tl.constexpr,
    R: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The sums over rows of dA_i = G B_i X^T and dB_i^T = (A_i X)^T G, for product i and every `parts`-th tile."""
    part = tl.program_id(0)
    i = tl.program_id(1)
    a_at, a_there = _matrix(0, m_a, K * n_a, MA, n_a, 1, NA, 0)
    b_at, b_there = _matrix(0, n_b, m_b, NB, m_b, 1, MB, 0)
    a_at += i * n_a
    b_at += i * n_b * m_b
    a = tl.load(left_at + a_at, mask=a_there, other=0.0)  # A_i: (MA, NA)
    b_t = tl.load(right_at + b_at, mask=b_there, other=0.0)  # B_i^T: (NB, MB)
    grad_a = tl.full((MA, NA), 0.0, tl.float32)
    grad_b_t = tl.full((NB, MB), 0.0, tl.float32)
    for row in range(part * R, rows, parts * R):
        at, there = _rows(row, rows, n_a, n_b, 0, NA, R, 0, NB)
        x = tl.load(x_at + at, mask=there, other=0.0)  # (NA, R NB)
        at, there = _rows(row, rows, m_a, m_b, 0, MA, R, 0, MB)
        g = tl.reshape(tl.load(grad_at + at, mask=there, other=0.0), (MA * R, MB))
        t = _dot(a, x, WIDEN).to(x.dtype)  # (MA, R NB)
        grad_b_t += _dot(tl.trans(tl.reshape(t, (MA * R, NB))), g, WIDEN)
        grad_t = _dot(g, tl.trans(b_t), WIDEN).to(x.dtype)  # (MA R, NB)
        grad_a += _dot(tl.reshape(grad_t, (MA, R * NB)), tl.trans(x), WIDEN)
    tl.store(left_sums_at + part * (K * m_a * n_a) + a_at, grad_a, mask=a_there)
    tl.store(right_sums_at + part * (K * n_b * m_b) + b_at, grad_b_t, mask=b_there)
