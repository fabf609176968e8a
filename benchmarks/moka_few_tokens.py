"""One adapted layer on a few tokens without gradients, as in generation: MoKA, also in `dense_weights`, beside LoRA.

"added" is the time over the frozen base; dense weights replace base and adapter by one matrix, so that theirs is about
zero. The base weight is not quantised.

    python benchmarks/moka_few_tokens.py
"""

import torch
from measure import medians, show
from peft import LoraConfig, get_peft_model
from torch import nn

from krontune.adapters import MokaConfig, dense_weights

TOKENS, ROUNDS, CALLS = (1, 4, 8), 9, 10
SIZES = ((2048, 2048), (4096, 1024))


def adapted(m: int, n: int, dtype: torch.dtype, config=None) -> nn.Module:
    model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
    return (get_peft_model(model, config, autocast_adapter_dtype=False) if config else model).eval()


def repeated(model: nn.Module, x: torch.Tensor):
    def run() -> None:
        for _ in range(CALLS):
            model(x)

    return run


@torch.no_grad()
def compare(m: int, n: int, dtype: torch.dtype) -> list[list[str]]:
    moka = MokaConfig(target_modules=["0"], init_weights=False)
    base, lora = adapted(m, n, dtype), adapted(m, n, dtype, LoraConfig(r=16, target_modules=["0"]))
    plain, dense = adapted(m, n, dtype, moka), adapted(m, n, dtype, moka)
    rows = []
    with dense_weights(dense, dtype):
        for tokens in TOKENS:
            x = torch.randn(tokens, n, dtype=dtype)
            models = {"base": base, "LoRA r=16": lora, "MoKA r=10": plain, "MoKA r=10, dense_weights": dense}
            seconds = medians({name: repeated(model, x) for name, model in models.items()}, ROUNDS)
            added = {name: seconds[name] - seconds["base"] for name in models}
            for name in list(models)[1:]:
                times = f"{added[name] / added['LoRA r=16']:.1f}"
                row = [f"{m}x{n} {str(dtype).removeprefix('torch.')}", str(tokens), name]
                microseconds = [f"{1e6 * value[name] / CALLS:.0f}" for value in (seconds, added)]
                rows.append([*row, *microseconds, times])
    return rows


def main() -> None:
    rows = [row for size in SIZES for dtype in (torch.float32, torch.bfloat16) for row in compare(*size, dtype)]
    columns = ["layer", "tokens", "adapter", "us", "added us", "x LoRA's added"]
    show(f"forward without gradients, median of {ROUNDS} times {CALLS} calls", columns, rows)


main()
