"""Scores and gradient vectors of a pool: score_samples beside the published loop of Adapt-inf.

The published loop is written anew: LoRA on every layer, one sample at a time, a backward pass through all layers of
which the last one's gradients are kept, cast to float16, and a dense random-sign projection to 8192 in blocks of 128,
drawn again for every 16 samples. Its projector without CUDA (BasicProjector of TRAK) draws the signs with `bernoulli_`
in the model's dtype; so does the projection here, bit for bit. A second one draws them as whole numbers of 8 bits,
which costs half and is what a reader might write. With CUDA and fast_jl a kernel takes their place, which is why the
rows without a projection are listed too. Both sides take NLL, EL2N, entropy and GraNd in the pass of the gradients,
which are compared; the published side takes a softmax for each, over all positions, as its code does.

"Forward pass alone" is the floor: the model as it is on the same batches, its output layer at answer positions alone,
and nothing kept. What is timed as score_samples holds all of it, the writing of the store included. Times are CPU
seconds on one thread, since the machine is shared, medians of runs taken in turns.

    python benchmarks/adapt_speed.py [--samples 32] [--length 128] [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from measure import show
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.data_selection import score_samples
from krontune.data_selection.encoding import collate, encode
from krontune.data_selection.gradients import scoring_mode
from krontune.data_selection.scores import answer_logits, answer_places

SCORES = ("nll", "el2n", "entropy", "grand")
VOCABULARY = 8192
PROMPT = 0.25  # share of a row that is no answer


class Words:
    """As much of a tokenizer as rows of ready-made tokens need."""

    eos_token, pad_token_id, chat_template = "</s>", 0, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return VOCABULARY


def build(samples: int, length: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
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
        ids = torch.randint(1, VOCABULARY, (length - i % 16,), generator=generator).tolist()
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
            logits = output.logits[0, :-1]
            answer = labels[0, 1:] != -100
            p = torch.softmax(logits, -1)[answer]
            one_hot = torch.nn.functional.one_hot(ids[0, 1:][answer], p.shape[1])
            el2n = (one_hot - p).pow(2).sum(1).sqrt().mean()
            p = torch.softmax(logits, -1)
            entropy = -(p * (p + 1e-10).log()).sum(1)[answer].mean()  # published: the mean over all positions
            nll = torch.nn.functional.cross_entropy(
                logits[answer], ids[0, 1:][answer]
            )  # published: of each token's exp
        for name, value in zip(SCORES, (nll, el2n, entropy, grad.norm()), strict=True):
            found[name].append(value.item())
        vectors.append(grad.half())
    model.zero_grad()
    return found, torch.stack(vectors)


def published_projection(vectors: torch.Tensor, size: int = 8192, block: int = 128, batch: int = 16) -> torch.Tensor:
    signs, projected = torch.empty(vectors.shape[1], block), []
    for part in vectors.float().split(batch):
        columns = []
        for number in range(size // block):
            generator = torch.Generator().manual_seed(1000 * number)
            columns.append(part @ signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1))
        projected.append(torch.cat(columns, 1))
    return torch.cat(projected)


def cheaper_projection(vectors: torch.Tensor, size: int = 8192, block: int = 128, batch: int = 16) -> torch.Tensor:
    projected = []
    for part in vectors.float().split(batch):
        columns = []
        for number in range(size // block):
            generator = torch.Generator().manual_seed(number)
            signs = torch.randint(0, 2, (vectors.shape[1], block), generator=generator, dtype=torch.int8)
            columns.append(part @ signs.float().mul_(2).sub_(1))
        projected.append(torch.cat(columns, 1))
    return torch.cat(projected)


def forward_alone(model, batches) -> None:
    with scoring_mode(model), torch.no_grad():
        for inputs, labels in batches:
            answer_logits(model, inputs, answer_places(labels)[0])


def measured(works, rounds: int):
    """Median CPU seconds of each, run in turns, and what each gave last."""
    seconds, results = {name: list[float]() for name in works}, {}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            results[name] = work()
            seconds[name].append(time.process_time() - start)
        print({name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, rows = build(options.samples, options.length)
    encoded = sorted((encode(Words(), row, "row", None) for row in rows), key=len)
    batches = [collate(encoded[i : i + 8], 0) for i in range(0, len(encoded), 8)]
    _, vectors = published_scores(model, rows)  # which also warms up
    with scoring_mode(model):  # bitsandbytes is imported here
        pass

    with tempfile.TemporaryDirectory() as folder:

        def ours(**settings):
            return score_samples(
                model, Words(), rows, SCORES, out_dir=tempfile.mkdtemp(dir=folder) + "/store", **settings
            )

        works = {
            "scores": lambda: published_scores(model, rows)[0],
            "projection": lambda: published_projection(vectors),
            "cheaper": lambda: cheaper_projection(vectors),
            "forward": lambda: forward_alone(model, batches),
            "whole": lambda: ours(projection=None),
            "small": lambda: ours(projection=1024),
            "single": lambda: ours(projection=1024, batch_size=1),
            "every": lambda: ours(projection=1024, gradients="all"),
        }
        times, results = measured(works, options.rounds)
        found = results["whole"].scores
        apart = max(np.abs(found[name] / results["scores"][name] - 1).max() for name in SCORES)
    scores, full, cheap = (times["scores"] + times.get(name, 0.0) for name in ("", "projection", "cheaper"))
    lines = [
        ("published loop, scores and whole vectors", scores, (scores,)),
        ("published loop with its projection to 8192", full, (full,)),
        ("published loop with cheaper random signs", cheap, (cheap,)),
        ("forward pass alone (floor), batches of 8", times["forward"], (scores, full, cheap)),
        ("score_samples, whole vectors, batches of 8", times["whole"], (scores,)),
        ("score_samples, count-sketch to 1024, batches of 8", times["small"], (full, cheap)),
        ("score_samples, count-sketch to 1024, batches of 1", times["single"], (full, cheap)),
        ("score_samples, all 8 layers, count-sketch to 1024", times["every"], (full, cheap)),
    ]
    table = []
    for name, seconds, peers in lines:
        ratios = {peer: f"{peer / seconds:.2f}" for peer in peers}
        table.append(
            [name, f"{1000 * seconds / options.samples:.0f}", *(ratios.get(p, "") for p in (scores, full, cheap))]
        )
    title = f"Llama of 8 layers, hidden 512, LoRA r 8; {options.samples} samples of {options.length} tokens"
    columns = ["what", "CPU ms / sample", "x no projection", "x its projection", "x cheaper signs"]
    show(f"{title}; scores agree to {apart:.0e}", columns, table)


if __name__ == "__main__":
    main()
