"""How well projected gradients of all layers keep the cosines of whole ones, and what the projection costs.

SmolLM2-135M (the embedded model) in bfloat16 with an adapter on all linear layers after a short warm-up on shipped
prose; then the gradients of other passages with respect to all of it: whole, by the count-sketch, and by the factorised
projection. Compared are the cosines of all pairs of rows. Times are CPU seconds of one scoring run on one thread,
forward and backward pass included, since the machine is shared.

    python benchmarks/adapt_projection.py [--samples 24] [--length 64] [--adapters lora moka]
"""

import argparse
import gzip
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from measure import show
from peft import LoraConfig, get_peft_model

from krontune.adapters import MokaConfig, load_base
from krontune.data_selection import score_samples
from krontune.data_selection.projections import Factorised

ADAPTERS = {
    "lora": lambda: LoraConfig(r=8, target_modules="all-linear"),
    "moka": lambda: MokaConfig(r=10, target_modules="all-linear"),
}
WARM_UP, BATCH = 8, 4
PROJECTIONS = [None, 1024, 8192, 65536, Factorised(4), Factorised(8), Factorised(16)]


def passages(count: int) -> list[str]:
    with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
        rows = [json.loads(line) for line in gzip.open(file)]
    return [row["text"] for row in rows[:: max(1, len(rows) // count)]][:count]


def adapted(config, texts: list[str], length: int):
    torch.manual_seed(0)
    base, tokenizer = load_base("smollm2-135m", None, device="cpu")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(WARM_UP):
        part = texts[step * BATCH : (step + 1) * BATCH]
        batch = tokenizer(part, truncation=True, max_length=length, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


def cosines(vectors: np.ndarray) -> np.ndarray:
    units = vectors.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    return (units @ units.T)[np.triu_indices(len(units), 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = passages(WARM_UP * BATCH + options.samples)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.adapters:
            model, tokenizer = adapted(ADAPTERS[name](), texts, options.length)
            expected = None
            for number, projection in enumerate(PROJECTIONS):
                start = time.process_time()
                store = score_samples(
                    model,
                    tokenizer,
                    texts[WARM_UP * BATCH :],
                    ("nll",),
                    gradients="all",
                    projection=projection,
                    max_length=options.length,
                    out_dir=Path(folder) / f"{name}-{number}",
                )
                seconds = (time.process_time() - start) / options.samples
                found = cosines(store.vectors)
                expected = found if expected is None else expected
                kind = "whole" if projection is None else "count-sketch"
                kind = f"factorised, side {projection.side}" if isinstance(projection, Factorised) else kind
                lines.append(
                    [
                        name,
                        kind,
                        f"{store.width:,}",
                        f"{np.corrcoef(found, expected)[0, 1]:.4f}",
                        f"{np.abs(found - expected).mean():.4f}",
                        f"{seconds:.2f}",
                    ]
                )
                print(lines[-1], flush=True)  # so that a run that is cut has shown something
    title = f"SmolLM2-135M, all linear layers; {options.samples} passages of up to {options.length} tokens"
    columns = ["adapter", "projection", "numbers a row", "Pearson of cosines", "mean error of a cosine", "CPU s a row"]
    show(title, columns, lines)


if __name__ == "__main__":
    main()
