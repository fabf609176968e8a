"""Does training on the pick help? SmolLM2-135M is fine-tuned on selected, random and all data with equal tokens.

    python benchmarks/labelled_pool.py FOLDER
    OMP_NUM_THREADS=1 python benchmarks/dsir_downstream.py FOLDER [--domain postgres_doc] [--keep RUNS.jsonl]

The pool has the paragraphs of thirteen domains. Of the documents of the target domain a quarter gives the target (100
paragraphs), a quarter the held-out texts, and half lie in the pool. DSIR (default settings) picks k texts, k being the
number of right ones; "random" is its control of equal size. Each arm trains a fresh LoRA (r 16, last ten layers, bf16
base) for the same number of tokens: `selected` and `random` go over a draw of their k texts, `full` over a draw of the
whole pool. What counts is the
loss on the held-out texts, in nats a token. Each run is a line of --keep, and is not done again.
"""

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import show
from peft import LoraConfig, get_peft_model

from krontune.adapters import load_base
from krontune.data_selection import Dsir

ARMS = ("selected", "random", "full")
SEEDS = (0, 1, 2)
TARGET_TEXTS, HELD_OUT_TEXTS = 100, 80
BLOCK, BATCH = 192, 4  # tokens, blocks a step
# The last layers alone, which makes a step on a CPU twice as fast: gradients end there.
LAYERS, MODULES = 10, ["q_proj", "v_proj", "up_proj", "down_proj"]
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}  # Student's, by degrees of freedom


def split(rows: list[dict[str, str]], domain: str, seed: int) -> tuple[list[str], list[str], list[str], list[bool]]:
    """Target texts, held-out texts, the pool and which of it are right."""
    names = sorted({row["document"] for row in rows if row["source"] == domain})
    random.Random(seed).shuffle(names)
    quarter = len(names) // 4
    target, held = set(names[:quarter]), set(names[quarter : 2 * quarter])
    pool = [row for row in rows if row["document"] not in target | held]
    rng = random.Random(seed)
    drawn = [
        rng.sample([row["text"] for row in rows if row["document"] in part], count)
        for part, count in ((target, TARGET_TEXTS), (held, HELD_OUT_TEXTS))
    ]
    return drawn[0], drawn[1], [row["text"] for row in pool], [row["source"] == domain for row in pool]


def blocks(texts: list[str], tokenizer: Any, count: int, seed: int) -> torch.Tensor:
    """(count, BLOCK) tokens of the texts in random order, each ended; from the start again where they are too few."""
    rng, ids = random.Random(seed), []
    while len(ids) < count * BLOCK:
        for text in rng.sample(texts, min(len(texts), 2000)):
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= count * BLOCK:
                break
    return torch.tensor(ids[: count * BLOCK]).view(count, BLOCK)


@torch.no_grad()
def held_out_loss(model: Any, texts: list[str], tokenizer: Any) -> float:
    """Nats a token over the held-out texts, each cut to 256 tokens."""
    total, tokens = 0.0, 0
    model.eval()
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:256]])
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return total / tokens


def train(texts: list[str], steps: int, rate: float, seed: int) -> tuple[Any, Any, float]:
    """A model with a LoRA trained on the texts; its tokenizer; seconds of training."""
    base, tokenizer = load_base("smollm2-135m", None, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    layers = list(range(base.config.num_hidden_layers - LAYERS, base.config.num_hidden_layers))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, layers_to_transform=layers)
    model: Any = get_peft_model(base, config)
    data = blocks(texts, tokenizer, steps * BATCH, seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda at: min(1, (at + 1) / 5) * (1 - at / steps))
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        ids = data[step * BATCH : (step + 1) * BATCH]
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model, tokenizer, time.perf_counter() - start


def one_run(rows: list[dict[str, str]], arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    target, held, pool, right = split(rows, options.domain, seed)
    dsir = Dsir().fit(target=target, raw=pool)
    picked = dsir.select(pool, sum(right), seed=seed)
    chosen = {"selected": picked.indices, "random": picked.control.indices, "full": range(len(pool))}[arm]
    model, tokenizer, seconds = train([pool[row] for row in chosen], options.steps, options.rate, seed)
    return {
        "domain": options.domain,
        "arm": arm,
        "seed": seed,
        "steps": options.steps,
        "rate": options.rate,
        "tokens": options.steps * BATCH * BLOCK,
        "texts": len(chosen),
        "right": sum(right[row] for row in chosen) / len(chosen),
        "loss": held_out_loss(model, held, tokenizer),
        "base": held_out_loss(model.unload(), held, tokenizer) if arm == ARMS[0] else None,
        "kl_reduction": dsir.kl_reduction([pool[row] for row in chosen]) if arm != "full" else 0.0,
        "seconds": seconds,
    }


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = T_975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    by = {(run["arm"], run["seed"]): run for run in runs}
    seeds = [seed for seed in SEEDS if all((arm, seed) in by for arm in ARMS)]
    base = interval([by["selected", seed]["base"] for seed in seeds])
    lines = [["no training", "", "", base, ""]]
    for arm in ARMS:
        found = [by[arm, seed] for seed in seeds]
        gains = [by["random", seed]["loss"] - by[arm, seed]["loss"] for seed in seeds]
        lines.append(
            [
                arm,
                f"{found[0]['texts']:,}",
                f"{statistics.mean(run['right'] for run in found):.2f}",
                interval([run["loss"] for run in found]),
                "" if arm == "random" else interval(gains),
            ]
        )
    tokens = options.steps * BATCH * BLOCK
    show(
        f"{options.domain}: loss on held-out texts after {tokens:,} tokens, {len(seeds)} seeds",
        ["trained on", "texts", "share right", "loss (nats a token)", "below random, same seed"],
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--domain", default="postgres_doc")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--keep", type=Path, default=Path("dsir_downstream.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (options.folder / "paragraphs.jsonl").open()]
    lines = options.keep.read_text().splitlines() if options.keep.exists() else []
    same = {"domain": options.domain, "steps": options.steps, "rate": options.rate}
    runs = [run for run in map(json.loads, lines) if same.items() <= run.items()]
    for seed in SEEDS:
        for arm in ARMS:
            if any((run["arm"], run["seed"]) == (arm, seed) for run in runs):
                continue
            runs.append(one_run(rows, arm, seed, options))
            with options.keep.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(runs[-1], flush=True)
    report(runs, options)


main()
