"""One adapted linear layer, forward and backward: MoKA beside PEFT's LoRA and LoKr, and a plain sum of products.

The base weight is frozen and not quantised. LoRA r = 10 has about as many parameters as MoKA r = 10.
"""

import torch
from measure import medians, show
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from krontune.adapters import MokaConfig
from krontune.adapters.kronecker import balanced_shapes

ROWS, ROUNDS = 512, 7


class Naive(nn.Module):
    """sum_i g_i kron(A_i, B_i) as one matrix, built with torch.kron at every call."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base = base.requires_grad_(False)
        shapes = [shape for shape in balanced_shapes(m, n, 5) for _ in range(2)]
        self.a = nn.ParameterList(torch.randn(o, i, dtype=base.weight.dtype) for o, i in shapes)
        self.b = nn.ParameterList(torch.randn(m // o, n // i, dtype=base.weight.dtype) for o, i in shapes)
        self.gate = nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate.softmax(0).to(x.dtype)
        weight = sum(g * torch.kron(a, b) for g, a, b in zip(gate, self.a, self.b, strict=True))
        return self.base(x) + x @ weight.T


def layer(size: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(size, size, bias=False, dtype=dtype)


def adapted(config, size: int, dtype: torch.dtype) -> nn.Module:
    model = get_peft_model(nn.Sequential(layer(size, dtype)), config, autocast_adapter_dtype=False)
    return model.train()


def step(model: nn.Module, x: torch.Tensor):
    return lambda: model(x).sum().backward()


def main() -> None:
    rows = []
    for size in (576, 2048):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(ROWS, size, dtype=dtype, requires_grad=True)
            target = {"target_modules": ["0"]}
            models = {
                "frozen base alone": layer(size, dtype).requires_grad_(False),
                "LoRA r=10 (peft)": adapted(LoraConfig(r=10, **target), size, dtype),
                "MoKA r=10": adapted(MokaConfig(r=10, **target), size, dtype),
                "LoKr, one product (peft)": adapted(LoKrConfig(r=10**6, decompose_factor=-1, **target), size, dtype),
                "sum of torch.kron": Naive(layer(size, dtype)),
            }
            seconds = medians({name: step(model, x) for name, model in models.items()}, ROUNDS)
            for name, model in models.items():
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                relative = [seconds[name] / seconds[other] for other in ("frozen base alone", "LoRA r=10 (peft)")]
                rows.append([f"{size} {str(dtype).removeprefix('torch.')}", name, f"{trained:,}"])
                rows[-1] += [f"{seconds[name] * 1e3:.1f}", *(f"{ratio:.2f}" for ratio in relative)]
    columns = ["layer", "adapter", "trained", "ms", "x base", "x LoRA"]
    show(f"forward and backward of {ROWS} rows, median of {ROUNDS}", columns, rows)


main()
