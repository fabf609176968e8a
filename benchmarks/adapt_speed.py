"""Scores and gradient vectors of a pool: score_samples beside the published loop of Adapt-inf.

The published loop is written anew: LoRA on every layer, one sample at a time, a backward pass through all layers of
which the last one's gradients are kept, cast to float16, and a dense random-sign projection to 8192 in blocks of 128,
drawn again for every 16 samples. That projection is the one for a CPU; the published code takes a CUDA kernel where it
is installed, which is why the rows without a projection are listed too. Both sides give NLL, EL2N, entropy and GraNd,
which are compared. Times are CPU seconds of one run on one thread, since the machine is shared.

    python benchmarks/adapt_speed.py [--samples 32] [--length 128]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import show
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.data_selection import score_samples

SCORES = ("nll", "el2n", "entropy", "grand")
PROMPT = 0.25  # share of a row that is no answer


class Words:
    """As much of a tokenizer as rows of ready-made tokens need."""

    eos_token, pad_token_id, chat_template = "</s>", 0, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 256


def build(samples: int, length: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(samples):
        ids = torch.randint(1, 8192, (length - i % 16,), generator=generator).tolist()
        start = int(len(ids) * PROMPT)
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return model, rows


def published_scores(model, rows):
    """One sample at a time: {name: (N,)} and the last layer's gradients (N, d)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    kept = [parameter for name, parameter in model.named_parameters() if ".layers.7." in name and "lora_" in name]
    found, vectors = {name: [] for name in SCORES}, []
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[None]
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        grad = torch.cat([parameter.grad.flatten() for parameter in kept])
        with torch.no_grad():
            p = torch.softmax(output.logits[0, :-1].float(), -1)
            answer = labels[0, 1:] != -100
            one_hot = torch.nn.functional.one_hot(ids[0, 1:], p.shape[1])
            el2n = (p - one_hot).norm(dim=1)[answer].mean()
            entropy = -(p * p.clamp(min=1e-30).log()).sum(1)[answer].mean()  # published: over all positions
        for name, value in zip(SCORES, (output.loss, el2n, entropy, grad.norm()), strict=True):
            found[name].append(value.item())
        vectors.append(grad.half())
    model.zero_grad()
    return found, torch.stack(vectors)


def published_projection(vectors: torch.Tensor, size: int = 8192, block: int = 128, batch: int = 16) -> torch.Tensor:
    projected = []
    for part in vectors.float().split(batch):
        columns = []
        for number in range(size // block):
            generator = torch.Generator().manual_seed(number)
            signs = torch.randint(0, 2, (vectors.shape[1], block), generator=generator, dtype=torch.int8)
            columns.append(part @ signs.float().mul_(2).sub_(1))
        projected.append(torch.cat(columns, 1))
    return torch.cat(projected)


def cpu_seconds(work):
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = build(options.samples, options.length)
    published_scores(model, rows[:2])

    with tempfile.TemporaryDirectory() as folder:

        def ours(name: str, **settings):
            out = Path(folder) / name
            return cpu_seconds(lambda: score_samples(model, Words(), rows, SCORES, out_dir=out, **settings))

        scored, (scores, vectors) = cpu_seconds(lambda: published_scores(model, rows))
        projecting, _ = cpu_seconds(lambda: published_projection(vectors))
        whole, store = ours("whole", projection=None)
        small, _ = ours("small", projection=1024)
        single, _ = ours("single", projection=1024, batch_size=1)
        every, _ = ours("every", projection=1024, gradients="all")
        apart = max(np.abs(store.scores[name] / scores[name] - 1).max() for name in SCORES)
        lines = [
            ("published loop, scores and whole vectors", scored, scored),
            ("published loop with its projection to 8192", scored + projecting, scored + projecting),
            ("score_samples, whole vectors, batches of 8", whole, scored),
            ("score_samples, count-sketch to 1024, batches of 8", small, scored + projecting),
            ("score_samples, count-sketch to 1024, batches of 1", single, scored + projecting),
            ("score_samples, all 8 layers, count-sketch to 1024", every, scored + projecting),
        ]
        table = [
            [
                name,
                f"{options.samples / seconds:.2f}",
                f"{1000 * seconds / options.samples:.0f}",
                f"{peer / seconds:.2f}",
            ]
            for name, seconds, peer in lines
        ]
    title = f"Llama of 8 layers, hidden 512, LoRA r 8; {options.samples} samples of {options.length} tokens"
    columns = ["what", "samples / CPU s", "CPU ms / sample", "x published like for like"]
    show(f"{title}; scores agree to {apart:.0e}", columns, table)


if __name__ == "__main__":
    main()
