"""What selectors do with rare skills and copies: real text in which both are planted, scored by the real model.

The pool is text that comes with krontune: paragraphs of eight large sources, and of four rare skills 1 % each: entries
of The Devil's Dictionary, which look like any other paragraph, and worked sorting, arithmetic and subsequence puzzles,
which as chats look like nothing else. A tenth of the pool is copies of rows of the large sources, half of them exact,
half without every ninth word. A selector sees neither source nor copies. Measured, at a budget of a tenth of the pool:

- recall: the share of the rare rows that is picked, a tenth by chance;
- wasted picks: the share of picks that are copies of another pick;
- of permanent pruning to the number of distinct rows: the share of the copies that is removed, and how many of the rare
  rows go with them.

Selectors with a random part are drawn ten times, all from one store (mean and standard deviation over the draws). The
scores, the warm-up and the pool have one seed.

    python benchmarks/adapt_coverage.py [--rows 1500] [--work FOLDER]

FOLDER keeps the store, so that an interrupted run goes on; about ten minutes on one core.
"""

import argparse
import gzip
import json
import random
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from measure import show
from peft import PeftModel, get_peft_model

from krontune.adapters import MokaConfig, load_base
from krontune.data_selection import AdaptInf, score_samples
from krontune.data_selection.clusters import cluster, unit_rows
from krontune.data_selection.coverage import similarity_to_earlier
from krontune.data_selection.encoding import collate, encode
from krontune.rl.tasks.worked import worked_examples

LARGE = ("austen", "jargon", "newton", "cpython", "numpy", "pandas", "torch", "transformers")
RARE = ("bierce", "sorting", "arithmetic", "lis")
LENGTH, DRAWS = 96, 10


def build_pool(rows: int) -> list[dict]:
    """Rows of text, source and group; copies share their group."""
    rng, by_source = random.Random(0), {}
    with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
        for line in gzip.open(file):
            row = json.loads(line)
            by_source.setdefault(row["source"], []).append({"text": row["text"]})
    each = max(3, rows // 100)
    for kind in RARE[1:]:
        by_source[kind] = [
            {
                "prompt": [{"role": "user", "content": one["prompt"]}],
                "completion": [{"role": "assistant", "content": one["completion"]}],
            }
            for one in worked_examples(kind, each, 0, [3, 5], "train", {})
        ]
    pool = [{**row, "source": kind} for kind in RARE for row in rng.sample(by_source[kind], each)]
    copies = rows // 10
    common = (rows - len(pool) - copies) // len(LARGE)
    pool += [{**row, "source": name} for name in LARGE for row in rng.sample(by_source[name], common)]
    pool = [{**row, "group": i} for i, row in enumerate(pool)]
    originals = rng.sample([row for row in pool if row["source"] in LARGE], copies)
    for number, row in enumerate(originals):
        words = row["text"].split()
        near = " ".join(word for i, word in enumerate(words) if i % 9 != 4)
        pool.append({**row, "text": row["text"] if number % 2 else near})
    rng.shuffle(pool)
    return pool


def warmed_model(pool: list[dict], folder: Path):
    """The base with an adapter after 20 steps on random rows, and the tokenizer."""
    model, words = load_base("smollm2-135m", None)
    if not (folder / "adapter_config.json").is_file():
        torch.manual_seed(0)
        adapted = get_peft_model(model, MokaConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
        for rows in (random.Random(step).sample(pool, 8) for step in range(20)):
            inputs, labels = collate(
                [encode(words, plain(row), "row", LENGTH) for row in rows], words.pad_token_id or 0
            )
            optimizer.zero_grad()
            adapted(**inputs, labels=labels).loss.backward()
            optimizer.step()
        adapted.save_pretrained(folder)
        model, words = load_base("smollm2-135m", None)
    return PeftModel.from_pretrained(model, folder), words


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("source", "group")}


def embeddings(model, words, rows: list[dict], kept: Path) -> np.ndarray:
    """(N, H) mean hidden state of the base's last layer over all tokens, for SemDeDup."""
    if kept.is_file():
        return np.load(kept)
    encoded = [encode(words, row, "row", LENGTH) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    found = np.zeros((len(rows), model.config.hidden_size), np.float32)
    with torch.no_grad(), model.disable_adapter():
        for first in range(0, len(order), 8):
            places = order[first : first + 8]
            inputs, _ = collate([encoded[i] for i in places], words.pad_token_id or 0)
            states = model.get_base_model().model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None]
            found[places] = ((states * mask).sum(1) / mask.sum(1)).numpy()
    np.save(kept, found)
    return found


def sem_dedup(vectors: np.ndarray, keep: int, seed: int) -> np.ndarray:
    """SemDeDup (arXiv 2303.09540) with the threshold at which `keep` rows stay: the row numbers of those."""
    units = unit_rows(vectors - vectors.mean(0))
    clusters = cluster(units, max(2, len(units) // 100), seed, 1)
    likeness = np.full(len(units), -1.0, np.float32)
    for number in range(len(clusters.centres)):
        own = np.flatnonzero(clusters.labels == number)
        own = own[np.argsort(units[own] @ clusters.centres[number], kind="stable")]  # the least typical stay
        likeness[own] = similarity_to_earlier(units[own])
    return np.sort(np.argsort(likeness, kind="stable")[:keep])


class Judge:
    """Counts what is right about picks."""

    def __init__(self, pool: list[dict]) -> None:
        self.sources = np.array([row["source"] for row in pool])
        self.groups = np.array([row["group"] for row in pool])
        self.copies = len(pool) - len(set(self.groups.tolist()))

    def recalls(self, rows: np.ndarray) -> list[float]:
        return [float((self.sources[rows] == kind).sum() / (self.sources == kind).sum()) for kind in RARE]

    def wasted(self, rows: np.ndarray) -> float:
        return 1.0 - len(set(self.groups[rows].tolist())) / len(rows)

    def removed(self, rows: np.ndarray) -> float:
        """Of the copies; all are removed when every group is left with one row or none."""
        left = len(rows) - len(set(self.groups[rows].tolist()))
        return 1.0 - left / self.copies


def spread(values: list[float]) -> str:
    return f"{100 * np.mean(values):.1f}" + (f" ± {100 * np.std(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    pool = build_pool(options.rows)
    rows, judge, n = [plain(row) for row in pool], Judge(pool), len(pool)
    started = time.process_time()
    model, words = warmed_model(pool, work / "adapter")
    scores = ("nll", "ppl", "el2n", "entropy", "grand")
    store = score_samples(model, words, rows, scores, out_dir=work / "store", max_length=LENGTH)
    hidden = embeddings(model, words, rows, work / "hidden.npy")
    scored = time.process_time() - started

    budget, keep, seeds = n // 10, n - judge.copies, range(DRAWS)
    own = ("nll", "el2n", "entropy")
    method, balanced = AdaptInf(scores=own), AdaptInf(scores=own, selector="random")
    legacy = AdaptInf(scores=own, legacy=True)
    pruned = [method.prune(store, keep=keep, seed=seed).indices for seed in seeds]
    usable = np.flatnonzero(store.norms > 0)

    def draw(among: np.ndarray, seed: int) -> np.ndarray:
        return np.sort(np.random.default_rng(seed).choice(among, budget, replace=False))

    def top(name: str) -> np.ndarray:
        return usable[np.argsort(-store.scores[name][usable], kind="stable")[:budget]]

    contenders = {
        "random": [draw(usable, seed) for seed in seeds],
        "balanced random (our clusters)": [balanced.select(store, budget=budget, seed=seed).indices for seed in seeds],
        "Adapt-inf": [method.select(store, budget=budget, seed=seed).indices for seed in seeds],
        "Adapt-inf, legacy": [legacy.select(store, budget=budget, seed=seed).indices for seed in seeds],
        "Adapt-inf's pruning, then random": [draw(kept, seed) for seed, kept in zip(seeds, pruned, strict=True)],
        "highest PPL": [top("ppl")],
        "highest EL2N": [top("el2n")],
        "SemDeDup, then random": [draw(sem_dedup(hidden, keep, seed), seed) for seed in seeds],
        "SemDeDup down to the budget": [sem_dedup(hidden, budget, seed) for seed in seeds],
    }
    table = []
    for name, picks in contenders.items():
        recalls = [judge.recalls(one) for one in picks]
        puzzles, entries = [float(np.mean(one[1:])) for one in recalls], [one[0] for one in recalls]
        table.append([name, spread(puzzles), spread(entries), spread([judge.wasted(one) for one in picks])])
    chosen = method.select(store, budget=budget, seed=0).details["clusters"]
    title = f"{n} rows, budget {budget}, {judge.copies} copies, {len(chosen)} clusters; {scored:.0f} CPU s of scoring"
    show(title, ["selector", "recall of puzzles, %", "of dictionary, %", "wasted picks, %"], table)

    table = []
    for name, left in {
        "random": [np.sort(np.random.default_rng(seed).choice(n, keep, replace=False)) for seed in seeds],
        "Adapt-inf": pruned,
        "SemDeDup": [sem_dedup(hidden, keep, seed) for seed in seeds],
    }.items():
        rare = [1.0 - float(np.mean(judge.recalls(one))) for one in left]
        table.append([name, spread([judge.removed(one) for one in left]), spread(rare)])
    show(f"pruning to {keep} rows", ["", "copies removed, %", "rare rows lost, %"], table)
    sizes = sorted(((one["rows"], one["selector"]) for one in chosen), reverse=True)
    print("clusters:", ", ".join(f"{size} rows by {name}" for size, name in sizes))


if __name__ == "__main__":
    main()
