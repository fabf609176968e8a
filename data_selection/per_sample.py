"""The gradient of every sample's loss from one backward pass over the batch: pure functions on tensors.

A layer's parameters meet sample b only in the tokens of row b. With x the input of the layer and g the gradient of the
summed loss at its output, the gradient of sample b's own loss is therefore the layer's gradient formula summed over the
tokens of row b alone.
"""

import torch


def linear_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Of y = W x: x (S, T, n) and g (S, T, m) -> (S, m, n), the sum over t of g_t x_t^T."""
    return torch.bmm(g.mT, x)


def kron_gradient(x: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of y = sum_i (A_i (x) B_i) x, k products of one shape: the gradients of the left factors.

    With X_t the input as (n_a, n_b) and G_t the gradient as (m_a, m_b), row-major,

        dA_i = sum_t G_t B_i X_t^T        dB_i = sum_t G_t^T A_i X_t

    so that dB is dA of the transposed problem: `kron_gradient(x.mT, g.mT, a)`. Of G_t B_i and B_i X_t^T the one that
    takes less work comes first; they differ by up to thirtyfold in the shapes that a MoKA layer mixes.

    Args:
        x: (S, T, n_a, n_b), in any memory layout.
        g: (S, T, m_a, m_b).
        b: (k, m_b, n_b).

    Returns:
        (S, k, m_a, n_a).
    """
    (samples, tokens, n_a, n_b), (m_a, m_b), k = x.shape, g.shape[2:], len(b)
    if m_b * n_a * (m_a + n_b) < m_a * n_b * (m_b + n_a):
        return kron_gradient(g, x, b.mT).mT  # sum_t X_t B_i^T G_t^T
    through_b = g.reshape(-1, m_b) @ b.transpose(0, 1).reshape(m_b, k * n_b)  # one product for all of k
    through_b = through_b.view(samples, tokens, m_a, k, n_b).permute(0, 3, 2, 1, 4)  # (S, k, m_a, T, n_b)
    columns = x.transpose(2, 3).reshape(samples, tokens * n_b, n_a)
    return torch.bmm(through_b.reshape(samples, k * m_a, tokens * n_b), columns).view(samples, k, m_a, n_a)


def softmax_gradient(weights: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From the gradient at a softmax's output `weights` (r,) to its logits: grad (S, r) -> (S, r)."""
    return weights * (grad - (grad * weights).sum(1, keepdim=True))
