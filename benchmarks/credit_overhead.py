"""What token statistics cost: beside one attention layer, in time and memory, and beside passes of the real model.

14 heads on 2 key heads of width 64, one row whose second half is response (and one that is all response), float32.
Times are medians of interleaved runs on one thread; memory is the rise of the process's peak above its resident size
before the call, each contender in a process of its own. The second table is SmolLM2-135M in bfloat16 with MoKA, four
rows of 64 prompt and 512 response tokens: the credit pass (five layers, stopped early), a forward, a training step.
The third is a whole step of GRPO, sampling included, on the same model, one prompt with `--rows` completions of 512
tokens, in CPU seconds of the process.

    python benchmarks/credit_overhead.py [layers passes steps] [--longest T] [--rows N]
"""

import argparse
import multiprocessing as mp
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from measure import medians, show

from krontune.rl.rhythm import attention_rhythm

HEADS, KV_HEADS, WIDTH, ROUNDS = 14, 2, 64, 5
LENGTHS = (2048, 4096, 8192)
DENSE_UP_TO = 4096
# A settled split reads 30 % of the heads for each group.
SETTLED = ([0, 3, 6, 9], [1, 4, 7, 12])


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, length, WIDTH)
    k, v = torch.randn(2, 1, KV_HEADS, length, WIDTH)
    return q, k, v


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def with_lse(q, k, v):
    """The same kernel, whose log-sum-exp is kept."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def dense(q, k, v, response):
    """Attention weights of all heads at once, as output_attentions gives them, and the statistics from them."""
    length = q.shape[2]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    share = (q @ k.mT * WIDTH**-0.5).masked_fill(distance < 0, -torch.inf).softmax(-1)  # (1, H, T, T)
    out = share @ v
    rows = share * response[:, None, :, None]
    far = rows * ((distance >= 10) & (distance <= 100))
    return out, (rows * distance).sum((-1, -2)), (rows * distance.clamp(max=10)).sum(-1), far.sum(-2)


def contenders(length: int, answer: int) -> dict:
    q, k, v = inputs(length)
    response = (torch.arange(length) >= length - answer).long()[None]
    everything = list(range(HEADS))
    calls = {
        "plain SDPA": lambda: plain(q, k, v),
        "SDPA, its LSE kept, + band of all heads": lambda: attention_rhythm(
            q, k, response, heads=(everything, everything), lse=with_lse(q, k, v)[1]
        ),
        "SDPA, its LSE kept, + band of settled heads": lambda: attention_rhythm(
            q, k, response, heads=SETTLED, lse=with_lse(q, k, v)[1]
        ),
        "statistics with spans, alone (auto)": lambda: attention_rhythm(q, k, response),
        "statistics with spans, alone (tiled)": lambda: attention_rhythm(q, k, response, backend="tiled"),
        "statistics of settled heads, alone": lambda: attention_rhythm(q, k, response, heads=SETTLED),
    }
    if length <= DENSE_UP_TO:
        calls["eager, dense maps + statistics"] = lambda: dense(q, k, v, response)
    return calls


def peak(length: int, answer: int, name: str) -> float:
    """MiB that the call adds to the process's peak."""
    torch.set_num_threads(1)
    call = contenders(length, answer)[name]
    plain(*inputs(64))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident()
    with torch.no_grad():
        call()
    return (resident("VmHWM") - before) / 1024


def resident(field: str = "VmRSS") -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def layers(longest: int) -> None:
    rows = []
    for length in (length for length in LENGTHS if length <= longest):
        for answer in (length, length // 2):
            calls = contenders(length, answer)
            with torch.no_grad():
                seconds = medians(calls, ROUNDS)
            for name in calls:
                with mp.get_context("spawn").Pool(1) as pool:
                    memory = pool.apply(peak, (length, answer, name))
                cost = [f"{seconds[name] * 1e3:.0f}", f"{seconds[name] / seconds['plain SDPA']:.2f}"]
                rows.append([f"{length} / {answer}", name, *cost, f"{memory:.0f}"])
    if rows:
        show(f"one layer, median of {ROUNDS}", ["T / response", "what", "ms", "x SDPA", "MiB"], rows)


def passes() -> None:
    """The pass on the real model. A GRPO step also generates, which takes longer than all of these."""
    from peft import get_peft_model

    from krontune.adapters import MokaConfig, load_base
    from krontune.rl.heads import split_heads
    from krontune.rl.rhythm import read_rhythm

    base, _ = load_base("smollm2-135m", quantization=None)
    model = get_peft_model(base, MokaConfig(r=10, target_modules="all-linear"))
    torch.manual_seed(0)
    ids = torch.randint(100, 40000, (4, 576))
    attended, response = torch.ones_like(ids), (torch.arange(576) >= 64).long().expand(4, -1)
    spans = read_rhythm(model, ids, attended, response)
    heads = split_heads({layer: rhythm.span.mean(0) for layer, rhythm in spans.items() if rhythm.span is not None})

    def forward():
        with torch.no_grad():
            model(input_ids=ids, attention_mask=attended, use_cache=False, logits_to_keep=512)

    def step():
        model.zero_grad()
        model(input_ids=ids, attention_mask=attended, labels=ids, use_cache=False).loss.backward()

    calls = {
        "forward and backward": step,
        "forward": forward,
        "credit pass, all heads with spans": lambda: read_rhythm(model, ids, attended, response),
        "credit pass, settled heads": lambda: read_rhythm(model, ids, attended, response, heads=heads),
    }
    seconds = medians(calls, 3)
    base = seconds["forward and backward"]
    rows = [[name, f"{value:.2f}", f"{value / base:.2f}"] for name, value in seconds.items()]
    show("SmolLM2-135M, 4 x 576 tokens, median of 3", ["what", "s", "x step"], rows)


def steps(rows: int) -> None:
    """One step with credit, whose pass measures spans, the pass of settled heads over the same batch, one without."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import PrinterCallback
    from trl import GRPOConfig

    from krontune.adapters import MokaConfig, load_base
    from krontune.rl import TokenCredit, TokenCreditGRPOTrainer

    class Timed(TokenCreditGRPOTrainer):
        """Notes the CPU seconds of sampling, of each credit pass and of the step."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.seconds: dict[str, list[float]] = {"sampling": [], "credit": [], "step": []}
            self.batch: dict[str, Any] = {}

        def _noted(self, name: str, call: Any) -> Any:
            start = time.process_time()
            result = call()
            self.seconds[name].append(time.process_time() - start)
            print(name, f"{self.seconds[name][-1]:.1f} s", flush=True)
            return result

        def _generate_single_turn(self, *args: Any, **options: Any) -> Any:
            return self._noted("sampling", lambda: super(Timed, self)._generate_single_turn(*args, **options))

        def _gamma(self, batch: dict[str, Any]) -> torch.Tensor:
            self.batch = dict(batch)
            return self._noted("credit", lambda: super(Timed, self)._gamma(batch))

        def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
            return self._noted("step", lambda: super(Timed, self).training_step(*args, **options))

    def one(strategy: str) -> dict[str, list[float]]:
        base, tokenizer = load_base("smollm2-135m", quantization=None)
        model = get_peft_model(base, MokaConfig(r=10, target_modules="all-linear", task_type="CAUSAL_LM"))
        with tempfile.TemporaryDirectory() as folder:
            trainer = Timed(
                credit=TokenCredit(strategy=strategy, credit_truncated=True),
                model=model,
                args=GRPOConfig(
                    output_dir=folder,
                    max_steps=1,
                    per_device_train_batch_size=rows,
                    num_generations=rows,
                    max_completion_length=512,
                    generation_kwargs={"min_new_tokens": 512},
                    gradient_checkpointing=False,
                    use_cpu=True,
                    report_to="none",
                    save_strategy="no",
                    disable_tqdm=True,
                    seed=0,
                ),
                # No two alike, so that every row has an advantage and is read.
                reward_funcs=lambda completions, **_: [float(at) for at in range(len(completions))],
                train_dataset=Dataset.from_dict({"prompt": ["the quick brown fox jumps over the lazy dog and " * 6]}),
                processing_class=tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        if strategy != "off":
            trainer._gamma(trainer.batch)
        return trainer.seconds

    on, off = one("coupled"), one("off")
    base, lines = off["step"][0], []
    lines.append(["off", f"{off['sampling'][0]:.1f}", "", f"{base:.1f}", ""])
    for name, credit in zip(("all heads, with spans", "settled heads"), on["credit"], strict=True):
        step = on["step"][0] - on["credit"][0] + credit
        cells = (on["sampling"][0], credit, step)
        lines.append([name, *(f"{value:.1f}" for value in cells), f"{credit / (step - credit):.1%}"])
    title = f"whole GRPO step, {rows} x 512 tokens, CPU seconds of one thread"
    show(title, ["credit", "sampling", "credit pass", "step", "pass / rest of the step"], lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", default=["layers", "passes", "steps"], help="layers, passes, steps")
    parser.add_argument("--longest", type=int, default=max(LENGTHS))
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "layers" in options.tables:
        layers(options.longest)
    if "passes" in options.tables:
        passes()
    if "steps" in options.tables:
        steps(options.rows)


if __name__ == "__main__":
    main()
