"""How the factors start."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .kronecker import kron_weight

_EXACT = 256  # rows or columns up to which the whole SVD is as fast as a part of it


def kaiming_uniform(stack: torch.Tensor, fan_in: int | None = None) -> None:
    """Every (m, n) matrix of the stack uniform in +-1 / sqrt(fan_in), n by default: `kaiming_uniform_(a=sqrt(5))`."""
    bound = 1.0 / math.sqrt(fan_in or stack.shape[-1])
    nn.init.uniform_(stack, -bound, bound)


@torch.no_grad()
def nearest_kron_sum(
    weight: torch.Tensor, shapes: Sequence[tuple[int, int]], counts: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Kronecker products whose sum is near a matrix (Van Loan and Pitsianis, 1993).

    With the blocks of W (m, n) written as rows, a Kronecker product is a matrix of rank one, so the k products nearest
    to W in the Frobenius norm are the first k terms of an SVD. That holds for one shape; over several, each shape is
    fitted to what the ones before it left over, which is a good sum and not the best one.

    Args:
        weight: W (m, n).
        shapes: (a_out, a_in) of each group of products.
        counts: how many products each group has, at most min(a_out a_in, b_out b_in); more would be zero.

    Returns:
        For each shape A (k, a_out, a_in) and B (k, b_out, b_in), of equal norms, in float32.
    """
    rest = weight.float()
    n_out, n_in = rest.shape
    all_a, all_b = [], []
    for (a_out, a_in), k in zip(shapes, counts, strict=True):
        b_out, b_in = n_out // a_out, n_in // a_in
        blocks = rest.view(a_out, b_out, a_in, b_in).transpose(1, 2).reshape(a_out * a_in, b_out * b_in)
        left, values, right = _first_terms(blocks, k)
        a = (left * values.sqrt()).T.reshape(-1, a_out, a_in)
        b = (right * values.sqrt()).T.reshape(-1, b_out, b_in)
        rest = rest - kron_weight(a, b, a.new_ones(len(a)))
        all_a.append(a)
        all_b.append(b)
    return all_a, all_b


def _first_terms(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest terms of the SVD: left (p, k), values (k,), right (q, k). A large matrix is projected first."""
    if min(matrix.shape) <= max(_EXACT, k + 8):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :k], values[:k], right[:k].T
    left, values, right = torch.svd_lowrank(matrix, q=k + 8, niter=2)
    return left[:, :k], values[:k], right[:, :k]


@torch.no_grad()
def start_at_nearest(stacks_a: Sequence[torch.Tensor], weight: torch.Tensor, fan_in: int | None = None) -> None:
    """Point every A_i where the weight's nearest Kronecker sum has it, at the norm that `kaiming_uniform` gives."""
    shapes = [(a.shape[1], a.shape[2]) for a in stacks_a]
    found, _ = nearest_kron_sum(weight, shapes, [len(a) for a in stacks_a])
    for stack, near in zip(stacks_a, found, strict=True):
        kaiming_uniform(stack, fan_in)  # for products beyond the rank of the rearranged weight
        norm = near.flatten(1).norm(dim=1)
        near = near[norm > 1e-6 * norm.max().clamp_min(torch.finfo(near.dtype).tiny)]
        size = math.sqrt(stack[0].numel() / (3.0 * (fan_in or stack.shape[2])))
        stack[: len(near)] = size * near / near.flatten(1).norm(dim=1)[:, None, None]
