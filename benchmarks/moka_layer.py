"""One adapted linear layer, forward and backward: MoKA beside LoRA of three sizes, LoKr, and a plain sum of products.

The base weight is frozen and not quantised. "saved" is what one forward pass keeps for the backward pass, weights and
parameters left out; "peak" is measured on a GPU only. MoKA has r = 10 products in up to five shapes.

    python benchmarks/moka_layer.py [SIZE ...] [--markdown]     SIZE is OUTxIN; all five sizes without one
"""

import argparse

import torch
from measure import machine, medians, show
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from krontune.adapters import MokaConfig
from krontune.adapters.kronecker import balanced_shapes

ROWS, ROUNDS, PRODUCTS = 512, 5, 10
SIZES = ["896x896", "2048x2048", "4096x4096", "4096x1024", "4096x11008"]
NAIVE_LIMIT = 2048 * 2048  # weights; beyond it the sum of torch.kron takes minutes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ["layer", "adapter", "trained", "ms", "x base", "saved MiB", "peak MiB"]


class Naive(nn.Module):
    """sum_i g_i kron(A_i, B_i) as one matrix, built with torch.kron at every call."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        shapes = products(m, n)
        self.a = nn.ParameterList(torch.randn(o, i, dtype=base.weight.dtype) for o, i in shapes)
        self.b = nn.ParameterList(torch.randn(m // o, n // i, dtype=base.weight.dtype) for o, i in shapes)
        self.gate = nn.Parameter(torch.ones(PRODUCTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate.softmax(0).to(x.dtype)
        weight = sum(g * torch.kron(a, b) for g, a, b in zip(gate, self.a, self.b, strict=True))
        return self.base(x) + x @ weight.T


def products(m: int, n: int) -> list[tuple[int, int]]:
    """The shape of A of each product, as `MokaConfig` spreads them."""
    shapes = balanced_shapes(m, n, 5)
    return [shapes[i % len(shapes)] for i in range(PRODUCTS)]


def equal_ranks(m: int, n: int) -> tuple[int, int]:
    """The LoRA ranks with about the parameters, and about the multiplications, of the mixture."""
    parameters = sum(o * i + (m // o) * (n // i) for o, i in products(m, n))
    multiplications = sum(min(n * o + m * (n // i), n * (m // o) + m * i) for o, i in products(m, n))
    return round(parameters / (m + n)), round(multiplications / (m + n))


def contenders(m: int, n: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    def adapted(config) -> nn.Module:
        model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
        return get_peft_model(model, config, autocast_adapter_dtype=False).train()

    by_parameters, by_flops = equal_ranks(m, n)
    target = {"target_modules": ["0"]}
    models = {
        "frozen base alone": nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False),
        "LoRA r=16": adapted(LoraConfig(r=16, **target)),
        f"LoRA r={by_parameters}, equal parameters": adapted(LoraConfig(r=by_parameters, **target)),
        f"LoRA r={by_flops}, equal FLOPs": adapted(LoraConfig(r=by_flops, **target)),
        "MoKA r=10": adapted(MokaConfig(r=PRODUCTS, **target)),
        "LoKr, one product": adapted(LoKrConfig(r=10**6, decompose_factor=-1, **target)),
    }
    if m * n <= NAIVE_LIMIT:
        models["sum of torch.kron"] = Naive(nn.Linear(n, m, bias=False, dtype=dtype))
    return {name: model.to(DEVICE) for name, model in models.items()}


def step(model: nn.Module, x: torch.Tensor):
    def run() -> None:
        model(x).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the distinct storages kept by one forward pass, less those of the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    total = sum(storage.nbytes() for storage in kept.values())
    del y
    return total


def peak_mib(run) -> str:
    if DEVICE == "cpu":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def compare(m: int, n: int, dtype: torch.dtype) -> list[list[str]]:
    x = torch.randn(ROWS, n, dtype=dtype, device=DEVICE, requires_grad=True)
    models = contenders(m, n, dtype)
    runs = {name: step(model, x) for name, model in models.items()}
    seconds = medians(runs, ROUNDS)
    rows = []
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = [f"{m}x{n} {str(dtype).removeprefix('torch.')}", name, f"{trained:,}", f"{seconds[name] * 1e3:.1f}"]
        row += [f"{seconds[name] / seconds['frozen base alone']:.2f}", f"{saved_bytes(model, x) / 2**20:.1f}"]
        rows.append([*row, peak_mib(runs[name])])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", default=SIZES)
    parser.add_argument("--markdown", action="store_true", help="print a row when it is measured, as Markdown")
    options = parser.parse_args()
    if options.markdown:
        print(f"{machine()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    rows = []
    for size in options.sizes:
        m, n = map(int, size.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            rows += (measured := compare(m, n, dtype))
            if options.markdown:
                print("\n".join(f"| {' | '.join(row)} |" for row in measured), flush=True)
    if not options.markdown:
        show(f"forward and backward of {ROWS} rows, median of {ROUNDS}", COLUMNS, rows)


main()
