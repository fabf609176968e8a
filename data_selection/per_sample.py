"""The gradient of every sample's loss from one backward pass over the batch: pure functions on tensors.

A layer's parameters meet sample b only in the tokens of row b. With x the input of the layer and g the gradient of the
summed loss at its output, the gradient of sample b's own loss is therefore the layer's gradient formula summed over the
tokens of row b alone.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .ngrams import mix64


def linear_gradient(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Of y = W x: x (B, T, n), g (B, T, m) -> (B, m, n), sum over t of g_t x_t^T."""
    return torch.bmm(g.transpose(1, 2), x)


def kron_gradients(
    x: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of y = sum_i gate_i (A_i (x) B_i) x, k products of one shape.

    With X_t the input as (n_a, n_b) and G_t the gradient as (m_a, m_b), row-major:

        dA_i = gate_i sum_t G_t B_i X_t^T,    dB_i = gate_i sum_t G_t^T A_i X_t,    dgate_i = <A_i, sum_t G_t B_i X_t^T>

    Args:
        x: (S, T, n_a n_b).
        g: (S, T, m_a m_b).
        a: (k, m_a, n_a).
        b: (k, m_b, n_b).
        gate: (k,).

    Returns:
        dA (S, k, m_a, n_a), dB (S, k, m_b, n_b) and dgate (S, k).
    """
    (k, m_a, n_a), (_, m_b, n_b) = a.shape, b.shape
    samples, tokens = x.shape[:2]
    x = x.reshape(samples, tokens, n_a, n_b)
    g = g.reshape(samples, tokens, m_a, m_b)
    through_b = torch.einsum("stpq,kqj->skptj", g, b).reshape(samples, k * m_a, tokens * n_b)
    of_a = torch.bmm(through_b, x.permute(0, 1, 3, 2).reshape(samples, tokens * n_b, n_a)).view(samples, k, m_a, n_a)
    through_a = torch.einsum("kpi,stij->stpkj", a, x).reshape(samples, tokens * m_a, k * n_b)
    of_b = torch.bmm(g.reshape(samples, tokens * m_a, m_b).transpose(1, 2), through_a).view(samples, m_b, k, n_b)
    of_gate = (of_a * a).sum((2, 3))
    scale = gate[None, :, None, None]
    return of_a * scale, of_b.transpose(1, 2) * scale, of_gate


def softmax_gradient(weights: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """From the gradient at a softmax's output `weights` (r,) to its logits: grad (S, r) -> (S, r)."""
    return weights * (grad - (grad * weights).sum(1, keepdim=True))


class CountSketch:
    """A seeded linear map from any number of coordinates to `size`: each is added, with a random sign, to one of them.

    Inner products are kept in expectation, with a standard deviation of about 1/sqrt(size) between unit vectors. Where
    coordinate j goes depends on the seed, the size and j alone.
    """

    def __init__(self, coordinates: int, size: int, seed: int, device: torch.device) -> None:
        start = mix64(mix64(np.array([seed], np.uint64)) + np.uint64(size))
        hashes = np.empty(coordinates, np.uint64)
        for first in range(0, coordinates, 1 << 20):
            last = min(first + (1 << 20), coordinates)
            places = np.arange(first + 1, last + 1, dtype=np.uint64)
            hashes[first:last] = mix64(start + places * np.uint64(0x9E3779B97F4A7C15))
        self.size = size
        self.buckets = torch.from_numpy(((hashes >> np.uint64(1)) % np.uint64(size)).astype(np.int64)).to(device)
        self.signs = torch.from_numpy(1.0 - 2.0 * (hashes & np.uint64(1)).astype(np.float32)).to(device)

    def add(self, sketch: torch.Tensor, grads: torch.Tensor, first: int) -> None:
        """Add to `sketch` (B, size), in place, the coordinates `first` onwards: grads (B, n) float32."""
        last = first + grads.shape[1]
        sketch.index_add_(1, self.buckets[first:last], grads * self.signs[first:last])


def flat(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gradients (B, ...) side by side, (B, n)."""
    return torch.cat([grad.flatten(1) for grad in grads], dim=1)
