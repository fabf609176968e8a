"""The gradient of every sample's loss from one backward pass over the batch: pure functions on tensors.

A layer's parameters meet sample b only in the tokens of row b. With x the input of the layer and g the gradient of the
summed loss at its output, the gradient of sample b's own loss is therefore the layer's gradient formula summed over the
tokens of row b alone.
"""

import torch


def linear_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Of y_i = W_i x_i, k products: sum over t of g_t x_t^T for each sample and product.

    Args:
        x: (B, k, T, n), or (B, 1, T, n) where all products have one input.
        g: (B, k, T, m), or (B, 1, T, m) where they have one output.

    Returns:
        (B, k, m, n).
    """
    batch, blocks, tokens = x.shape[:3]
    if blocks == 1:
        merged = g.mT.reshape(batch, -1, tokens)  # one product of (B, k m, T) and (B, T, n)
        return torch.bmm(merged, x[:, 0]).view(batch, g.shape[1], g.shape[3], x.shape[3])
    if g.shape[1] == 1:
        merged = x.transpose(1, 2).reshape(batch, tokens, -1)
        found = torch.bmm(g[:, 0].mT, merged)
        return found.view(batch, g.shape[3], blocks, x.shape[3]).transpose(1, 2)
    return g.mT @ x


Sides = tuple[torch.Tensor, torch.Tensor]


def kron_sides(
    x: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor
) -> tuple[Sides, Sides, torch.Tensor]:
    """Of y = sum_i gate_i (A_i (x) B_i) x, k products of one shape: what the factors' gradients are sums over.

    With X_t the input as (n_a, n_b) and G_t the gradient as (m_a, m_b), row-major:

        dA_i = gate_i sum_t (G_t B_i) X_t^T,  dB_i = gate_i sum_t G_t^T (A_i X_t),  dgate_i = sum_t <G_t B_i, A_i X_t>

    The first two are a `linear_gradient` of sides: over pairs of a token and a column of X_t, or a row of G_t.

    Args:
        x: (S, T, n_a n_b).
        g: (S, T, m_a m_b).
        a: (k, m_a, n_a).
        b: (k, m_b, n_b).
        gate: (k,).

    Returns:
        The inputs (S, 1, T n_b, n_a) and gradients (S, k, T n_b, m_a) of A; the inputs (S, k, T m_a, n_b) and gradients
        (S, 1, T m_a, m_b) of B; and dgate (S, k).
    """
    (k, m_a, n_a), (_, m_b, n_b) = a.shape, b.shape
    samples, tokens = x.shape[:2]
    x = x.reshape(samples, tokens, n_a, n_b)
    g = g.reshape(samples, tokens, m_a, m_b)
    # The order of axes in memory is the one in which `linear_gradient` reads them without a copy.
    through_b = torch.einsum("stpq,kqj->skptj", g, b)
    through_a = torch.einsum("kpi,stij->stpkj", a, x)
    of_gate = (through_b * through_a.permute(0, 3, 2, 1, 4)).sum((2, 3, 4))
    scale = gate[:, None, None]
    x_a = x.transpose(2, 3).reshape(samples, 1, tokens * n_b, n_a)
    g_a = through_b.reshape(samples, k, m_a, tokens * n_b).mul_(scale).mT
    x_b = through_a.reshape(samples, tokens * m_a, k, n_b).transpose(1, 2).mul_(scale)
    g_b = g.reshape(samples, 1, tokens * m_a, m_b)
    return (x_a, g_a), (x_b, g_b), of_gate


def softmax_gradient(weights: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From the gradient at a softmax's output `weights` (r,) to its logits: grad (S, r) -> (S, r)."""
    return weights * (grad - (grad * weights).sum(1, keepdim=True))
