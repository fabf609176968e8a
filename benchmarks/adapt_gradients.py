"""Every sample's gradient of one layer's adapter: LoRA, and MoKA in the cheaper order of each shape.

Beside them stands MoKA as it was: for every shape G_t B_i and A_i X_t first, and the gates' gradient as a sum of their
products over all tokens. Inputs and output gradients are random. Times are CPU milliseconds a sample on one thread,
medians of runs taken in turns.

    python benchmarks/adapt_gradients.py [--rounds 5] [--length 128] [--batch 8]
"""

import argparse
import statistics
import time

import torch
from measure import show

from krontune.adapters.kronecker import balanced_shapes
from krontune.data_selection.per_sample import kron_gradient, linear_gradient

RANK, SHAPES = 8, 5
LAYERS = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)]


def moka_factors(m: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A (k, m_a, n_a), B (k, m_b, n_b) and gates (k,) of each shape that `MokaConfig(r=8)` takes."""
    shapes = balanced_shapes(m, n, SHAPES)
    counts = [RANK // len(shapes) + (i < RANK % len(shapes)) for i in range(len(shapes))]
    return [
        (torch.randn(k, a_out, a_in), torch.randn(k, m // a_out, n // a_in), torch.rand(k))
        for k, (a_out, a_in) in zip(counts, shapes, strict=True)
    ]


def lora(x: torch.Tensor, g: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    return [linear_gradient(x, g @ b), linear_gradient(x @ a.T, g)]


def moka(x: torch.Tensor, g: torch.Tensor, factors) -> list[torch.Tensor]:
    found = []
    for a, b, gate in factors:
        inputs, outputs = x.unflatten(2, (a.shape[2], b.shape[2])), g.unflatten(2, (a.shape[1], b.shape[1]))
        of_a, of_b = kron_gradient(inputs, outputs, b), kron_gradient(inputs.mT, outputs.mT, a)
        scale = gate[:, None, None]
        found += [of_a * scale, of_b * scale, (of_a * a).sum((2, 3))]
    return found


def moka_before(x: torch.Tensor, g: torch.Tensor, factors) -> list[torch.Tensor]:
    found = []
    for a, b, gate in factors:
        inputs, outputs = x.unflatten(2, (a.shape[2], b.shape[2])), g.unflatten(2, (a.shape[1], b.shape[1]))
        through_b = torch.einsum("stpq,kqj->skptj", outputs, b)
        through_a = torch.einsum("kpi,stij->stpkj", a, inputs)
        of_gate = (through_b * through_a.permute(0, 3, 2, 1, 4)).sum((2, 3, 4))
        scale = gate[:, None, None]
        left = through_b.flatten(3).flatten(1, 2)  # (S, k m_a, T n_b)
        of_a = torch.bmm(left, inputs.mT.flatten(1, 2)).unflatten(1, (len(a), a.shape[1]))
        right = through_a.flatten(1, 2).flatten(2)  # (S, T m_a, k n_b)
        of_b = torch.bmm(outputs.flatten(1, 2).mT, right).unflatten(2, (len(a), b.shape[2])).transpose(1, 2)
        found += [of_a * scale, of_b * scale, of_gate]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for m, n in LAYERS:
        torch.manual_seed(0)
        x, g = torch.randn(options.batch, options.length, n), torch.randn(options.batch, options.length, m)
        a, b, factors = torch.randn(RANK, n), torch.randn(m, RANK), moka_factors(m, n)
        for one, other in zip(moka(x, g, factors), moka_before(x, g, factors), strict=True):
            assert (one - other).norm() < 1e-4 * other.norm()
        contenders = {
            "lora": lambda x=x, g=g, a=a, b=b: lora(x, g, a, b),
            "before": lambda x=x, g=g, factors=factors: moka_before(x, g, factors),
            "now": lambda x=x, g=g, factors=factors: moka(x, g, factors),
        }
        seconds = {name: list[float]() for name in contenders}
        for _ in range(options.rounds):
            for name, run in contenders.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
        lora_ms, before, now = (1000 * statistics.median(seconds[name]) / options.batch for name in contenders)
        rows.append([f"{m} x {n}", f"{lora_ms:.2f}", f"{before:.2f}", f"{now:.2f}", f"{before / now:.1f}"])
        print(rows[-1], flush=True)  # so that a run that is cut has shown something
    title = f"CPU ms a sample of {options.length} tokens, batches of {options.batch}, r {RANK}, one layer"
    show(title, ["layer", "LoRA", "MoKA before", "MoKA now", "times as fast"], rows)


if __name__ == "__main__":
    main()
