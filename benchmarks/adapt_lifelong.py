"""Four skills learned one after the other under a fixed budget of rows: what each way of picking forgets and gains.

SmolLM2-135M with a MoKA adapter goes through worked puzzles of four kinds (sorting, arithmetic, scheduling,
subsequences). At each step the new skill's rows join the pool, `--steps` batches of 8 rows are picked and trained on,
and the pool is cut back to one skill's size. Every policy begins with the same adapter, warmed up on the first skill,
takes as many optimiser steps and is measured on the same held-out rows of all skills, before training and after each
step. A seed changes rows, warm-up, picks and the order of training.

    python benchmarks/adapt_lifelong.py [--seeds 3] [--steps 15] [--rows 300] [--tests 32] [--work FOLDER]

FOLDER keeps every step, so that an interrupted run goes on, and one with more seeds goes on from fewer.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import show
from peft import PeftModel, get_peft_model

from krontune.adapters import MokaConfig, load_base
from krontune.data_selection import AdaptInf, Store, score_samples
from krontune.data_selection.encoding import collate, encode
from krontune.data_selection.lifelong import POLICIES, Lifelong, lifelong
from krontune.data_selection.performance import answer_performance
from krontune.data_selection.scores import answer_logits, answer_places
from krontune.rl.tasks.worked import worked_examples

SKILLS = ("sorting", "arithmetic", "scheduling", "lis")
BATCH, LENGTH, RATE = 8, 256, 5e-3


def puzzles(kind: str, rows: int, seed: int, split: str) -> list[dict]:
    """Question and table, without the lines that tell how to reply: that is part of the skill."""
    found = worked_examples(kind, rows, seed, [3, 5], split, {})
    return [{"prompt": table_of(one["prompt"]), "completion": one["completion"]} for one in found]


def table_of(prompt: str) -> str:
    question, *lines = prompt.splitlines()
    return "\n".join([question, *(line for line in lines if "|" in line), ""])


def fit(model, words, rows: list[dict], order: random.Random) -> None:
    """One pass over the rows in batches."""
    rows = order.sample(rows, len(rows))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    model.train()
    for first in range(0, len(rows), BATCH):
        encoded = [encode(words, row, "row", LENGTH) for row in rows[first : first + BATCH]]
        inputs, labels = collate(encoded, words.pad_token_id or 0)
        places, targets, _ = answer_places(labels)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(answer_logits(model, inputs, places).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


class Adapted:
    """The `Learner` of one policy."""

    def __init__(self, start: Path, tests: dict[str, list[dict]], seed: int) -> None:
        self.start, self.tests, self.seed = start, tests, seed

    def restore(self, folder: Path | None) -> None:
        base, self.words = load_base("smollm2-135m", None)
        self.model = PeftModel.from_pretrained(base, folder or self.start, is_trainable=True).eval()

    def score(self, rows: list[dict], folder: Path) -> Store:
        return score_samples(self.model, self.words, rows, out_dir=folder, max_length=LENGTH, seed=self.seed)

    def train(self, rows: list[dict], count: int, folder: Path) -> None:
        order = random.Random(self.seed)
        fit(self.model, self.words, order.sample(rows, count), order)
        self.model.save_pretrained(folder)

    def performance(self, skill: str) -> dict[str, float]:
        return answer_performance(self.model, self.words, self.tests[skill], max_length=LENGTH)


def warm_up(folder: Path, rows: list[dict], seed: int) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    base, words = load_base("smollm2-135m", None)
    torch.manual_seed(seed)
    model = get_peft_model(base, MokaConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    order = random.Random(seed)
    fit(model, words, order.sample(rows, min(len(rows), 5 * BATCH)), order)
    model.save_pretrained(folder)


def learn(options: argparse.Namespace, seed: int, policy: str, work: Path) -> Lifelong:
    data = {kind: puzzles(kind, options.rows, seed, "train") for kind in SKILLS}
    tests = {kind: puzzles(kind, options.tests, seed, "test") for kind in SKILLS}
    start = work / f"seed-{seed}" / "start"
    warm_up(start, data[SKILLS[0]], seed)
    return lifelong(
        data,
        Adapted(start, tests, seed),
        budget=options.steps * BATCH,
        keep=options.rows,
        policy=policy,  # type: ignore[arg-type]
        method=AdaptInf(),
        seed=seed,
        out_dir=work / f"seed-{seed}" / policy,
        key={"tests": options.tests, "rate": RATE},
    )


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("seeds", 3), ("steps", 15), ("rows", 300), ("tests", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work or Path(tempfile.mkdtemp())
    found: dict[str, list[Lifelong]] = {policy: [] for policy in POLICIES}
    for seed in range(options.seeds):
        for policy in POLICIES:
            started = time.process_time()
            one = learn(options, seed, policy, work)
            found[policy].append(one)
            minutes = (time.process_time() - started) / 60
            print(f"seed {seed}, {policy}: {minutes:.1f} CPU minutes; {one.summary('probability')}", flush=True)
    table = []
    for policy, runs in found.items():
        accuracy, chance = ([run.summary(name) for run in runs] for name in ("accuracy", "probability"))
        table.append(
            [
                policy,
                spread([100 * one["final"] for one in accuracy]),
                spread([one["forgetting"] for one in accuracy]),
                spread([100 * one["final"] for one in chance]),
                spread([one["forgetting"] for one in chance]),
                spread([one["relative_gain"] for one in chance]),
            ]
        )
    columns = ["policy", "accuracy", "forgotten", "token probability", "forgotten", "relative gain"]
    show(f"{options.steps} steps a skill, {options.seeds} seeds, per cent; mean ± sd over seeds", columns, table)
    names = [policy for policy in POLICIES if policy != "random"]
    random_ends = [run.matrix("probability")[-1].mean() for run in found["random"]]
    for policy in names:
        gains = [
            100 * (run.matrix("probability")[-1].mean() - end)
            for run, end in zip(found[policy], random_ends, strict=True)
        ]
        print(f"{policy} minus random, token probability, by seed: {[round(float(gain), 2) for gain in gains]}")


if __name__ == "__main__":
    main()
