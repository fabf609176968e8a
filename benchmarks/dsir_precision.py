"""How many of the right texts each selector finds in a pool of thirteen domains, and how near it comes to the target.

    python benchmarks/labelled_pool.py FOLDER
    python benchmarks/dsir_precision.py FOLDER paragraphs|chunks [--fasttext PYTHON] [--package PYTHON]

For each domain, half of its documents are the target; the other half lies in the pool with all other domains. A
selector sees the target (all of it, or 10 to 1,000 texts of it) and the pool without labels; its highest scores are
picked. k is the number of right texts in the pool, so that precision at k is recall as well; with a sample of the
target it is taken at k/4. KL reduction is the paper's (arXiv 2302.03169): towards the whole target, 10,000 buckets.

"official" is the method of `data-selection` 1.0.3 as this script computes it on its own (top-k; on documents its Gumbel
noise changes one pick in forty). --package is the Python of an environment with that package and nltk 3.9.1, whose
weights are then compared with these on one domain. --fasttext is the Python of one with fasttext-wheel; without it
that column is left out.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import show
from scipy.sparse import csr_matrix

from krontune.data_selection import Dsir

SIZES = (10, 50, 200, 1000, None)
BUCKETS, EPSILON = 10_000, 1e-8
VARIANTS: dict[str, dict[str, Any]] = {"krontune": {}, "2**20 buckets": {"buckets": 2**20}}


def official_counts(texts: list[str]) -> csr_matrix:
    """(N, 10,000) counts of uni- and bigrams, as the package hashes them."""
    known: dict[str, int] = {}
    rows, columns = [0], []
    for text in texts:
        tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
        for ngram in [*tokens, *map(" ".join, zip(tokens, islice(tokens, 1, None), strict=False))]:
            bucket = known.get(ngram)
            if bucket is None:
                bucket = known[ngram] = int.from_bytes(sha256(ngram.encode()).digest()) % BUCKETS
            columns.append(bucket)
        rows.append(len(columns))
    counts = csr_matrix((np.ones(len(columns)), columns, rows), shape=(len(texts), BUCKETS))
    counts.sum_duplicates()
    return counts


def share(counts: csr_matrix, rows: np.ndarray) -> np.ndarray:
    total = np.asarray(counts[rows].sum(axis=0))[0]
    return total / total.sum()


class Fasttext:
    """A supervised classifier, target against as many random texts of the pool (at least 5,000), in its own process."""

    code = r"""
import fasttext, json, math, random, sys
fasttext.FastText.eprint = lambda *a: None
texts = [" ".join(json.loads(line)["text"].lower().split()) for line in open(sys.argv[1])]
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    lines = [f"@@side@@{side} {texts[row]}\n" for side in ("yes", "no") for row in job[side]]
    random.Random(0).shuffle(lines)  # it learns in the order of the file
    with open(job["file"], "w") as file:
        file.writelines(lines)
    model = fasttext.train_supervised(job["file"], wordNgrams=2, dim=16, epoch=5, thread=1, bucket=500000,
                                      label="@@side@@", verbose=0)
    scores = []
    for row in job["pool"]:
        found = model.f.predict(texts[row] + "\n", 2, 0.0, "strict")
        found = {label: max(p, 1e-30) for p, label in found}
        scores.append(round(math.log(found["@@side@@yes"] / found["@@side@@no"]), 5))
    print(json.dumps(scores), flush=True)
"""

    def __init__(self, python: str, pool: Path) -> None:
        command = [python, "-c", self.code, str(pool)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline().strip() == "ready"

    def scores(self, target: np.ndarray, pool: np.ndarray) -> np.ndarray:
        raw = random.Random(0).sample(pool.tolist(), min(len(pool), max(5000, 2 * len(target))))
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            job = {"file": file.name, "yes": target.tolist(), "no": raw, "pool": pool.tolist()}
            assert self.process.stdin is not None and self.process.stdout is not None
            print(json.dumps(job), file=self.process.stdin, flush=True)
            return np.array(json.loads(self.process.stdout.readline()))


def package_weights(python: str, target: list[str], pool: list[str]) -> np.ndarray:
    """The log weights that the package gives."""
    code = """
import json, sys, numpy as np
from data_selection import HashedNgramDSIR
if __name__ == "__main__":
    folder = sys.argv[1]
    dsir = HashedNgramDSIR([folder + "/pool.jsonl"], [folder + "/target.jsonl"], cache_dir=folder + "/cache",
                           num_proc=1)
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    dsir.compute_importance_weights()
    np.save(folder + "/weights.npy", np.load(folder + "/cache/log_importance_weights/0.npy"))
"""
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in (("target", target), ("pool", pool)):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            Path(folder, f"{name}.jsonl").write_text(rows)
        Path(folder, "run.py").write_text(code)
        subprocess.run([python, folder + "/run.py", folder], check=True, capture_output=True)
        return np.load(Path(folder, "weights.npy"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["paragraphs", "chunks"])
    parser.add_argument("--fasttext")
    parser.add_argument("--package")
    parser.add_argument("--variants", help="JSON: names and settings of Dsir to try, instead of the defaults")
    parser.add_argument("--domains", nargs="*")
    parser.add_argument("--keep", type=Path, help="a jsonl file, a line a domain; domains that it holds are not redone")
    options = parser.parse_args()
    path = options.folder / f"{options.kind}.jsonl"
    rows = [json.loads(line) for line in path.open()]
    texts = [row["text"] for row in rows]
    labels = np.array([row["source"] for row in rows])
    documents = np.array([row["document"] for row in rows])
    counts = official_counts(texts)
    fasttext = Fasttext(options.fasttext, path) if options.fasttext else None
    variants = json.loads(options.variants) if options.variants else VARIANTS
    results: dict[tuple[str, int | None, str], tuple[float, float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    domains = options.domains or sorted(set(labels.tolist()))
    names = ["random", "official", *(["fastText"] if fasttext else []), *variants, "all right"]
    if options.keep and options.keep.exists():
        for line in options.keep.read_text().splitlines():
            kept = json.loads(line)
            sizes[kept["domain"]] = tuple(kept["sizes"])
            results |= {(kept["domain"], size, name): tuple(pair) for size, name, pair in kept["results"]}
    for domain in domains:
        if domain in sizes:
            continue
        own = sorted(set(documents[labels == domain].tolist()))
        chosen = set(random.Random(0).sample(own, len(own) // 2))
        is_target = np.isin(documents, list(chosen))
        target_rows, pool_rows = np.flatnonzero(is_target), np.flatnonzero(~is_target)
        right = labels[pool_rows] == domain
        sizes[domain] = (len(target_rows), int(right.sum()))
        pool, pool_counts = [texts[row] for row in pool_rows], counts[pool_rows]
        p, q = share(counts, target_rows), share(counts, pool_rows)

        def judge(scores: np.ndarray, k: int, p=p, q=q, right=right, pool_rows=pool_rows) -> tuple[float, float]:
            picked = np.argsort(-scores, kind="stable")[:k]
            near = share(counts, pool_rows[picked])
            return right[picked].mean(), float(np.sum(p * (np.log(near + EPSILON) - np.log(q + EPSILON))))

        shuffled = np.random.default_rng(0).permutation(target_rows)
        for size in SIZES:
            if size is not None and size > len(target_rows):
                continue
            sample = target_rows if size is None else shuffled[:size]
            k = int(right.sum()) if size is None else int(right.sum()) // 4
            ratios = np.log(share(counts, sample) + EPSILON) - np.log(q + EPSILON)
            scored = {"random": np.random.default_rng(1).random(len(pool)), "official": pool_counts @ ratios}
            if options.package and domain == domains[0] and size == 200:
                given = package_weights(options.package, [texts[row] for row in sample], pool[:20_000])
                near_q = np.asarray(pool_counts[:20_000].sum(axis=0))[0]
                logs = np.log(share(counts, sample) + EPSILON) - np.log(near_q / near_q.sum() + EPSILON)
                apart = np.abs(pool_counts[:20_000] @ logs - given).max()
                print("largest difference from the package's weights:", apart, flush=True)
            if fasttext:
                scored["fastText"] = fasttext.scores(sample, pool_rows)
            for name, settings in variants.items():
                dsir = Dsir(**settings).fit(target=[texts[row] for row in sample], raw=pool)
                scored[name] = dsir.log_weights(pool)
            scored["all right"] = right.astype(float)
            for name, scores in scored.items():
                results[domain, size, name] = judge(scores, k)
        print(domain, {name: round(float(results[domain, None, name][0]), 3) for name in names}, flush=True)
        if options.keep:
            found = [(size, name, pair) for (of, size, name), pair in results.items() if of == domain]
            with options.keep.open("a") as file:
                file.write(
                    json.dumps({"domain": domain, "sizes": sizes[domain], "results": found}, default=float) + "\n"
                )
    report(options.kind, domains, names, sizes, results)


def report(kind: str, domains: list[str], names: list[str], sizes: dict, results: dict) -> None:
    def mean(size: int | None, name: str, part: int) -> float:
        found = [results[domain, size, name][part] for domain in domains if (domain, size, name) in results]
        return float(np.mean(found)) if found else float("nan")

    for part, title in enumerate(("mean precision", "mean KL reduction (nats)")):
        lines = [
            ["all, at k" if size is None else f"{size}, at k/4", *(f"{mean(size, name, part):.3f}" for name in names)]
            for size in SIZES
        ]
        show(f"{kind}: {title} over {len(domains)} domains", ["target texts", *names], lines)
    for size, title in ((None, "all target texts, precision at k"), (10, "10 target texts, precision at k/4")):
        lines = []
        for domain in domains:
            found = [f"{results[domain, size, name][0]:.3f}" for name in names if name != "all right"]
            lines.append([domain, *map(str, sizes[domain]), *found])
        show(f"{kind}: {title}", ["domain", "target", "k", *(name for name in names if name != "all right")], lines)


main()
