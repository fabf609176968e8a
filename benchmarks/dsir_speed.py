"""DSIR beside the official package `data-selection` 1.0.3, which runs in an environment of its own, on one core.

    python benchmarks/dsir_speed.py [PYTHON]

PYTHON is an interpreter with data-selection==1.0.3 and nltk==3.9.1 (with NLTK 3.10 the package breaks); without it such
an environment is made in a temporary folder. The pool is real text: the prose that krontune ships, then paragraphs of
the Python files that are installed, 70 MB of jsonl.
"""

import gzip
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from statistics import median

import numpy as np
from measure import show

from krontune.data_selection import Dsir, kernels
from krontune.data_selection.shards import read_all

POOL_BYTES, OFFICIAL_BYTES, ROUNDS = 70e6, 4e6, 5
OFFICIAL = """
import json, sys, time
import numpy as np
from data_selection import HashedNgramDSIR
path, folder = sys.argv[1:]
dsir = HashedNgramDSIR(raw_datasets=[path], target_datasets=[path], cache_dir=folder, num_proc=1, min_example_length=0)
texts = [json.loads(line)["text"] for line in open(path)]
ratios = np.random.default_rng(0).normal(size=10000)
for line in sys.stdin:
    start = time.perf_counter()
    for text in texts:
        np.dot(dsir.featurizer(text), ratios)
    print(time.perf_counter() - start, flush=True)
"""
WHOLE = """
import sys, time
from data_selection import HashedNgramDSIR
path, target, folder = sys.argv[1:]
dsir = HashedNgramDSIR([path], [target], folder, num_proc=1, min_example_length=0)
dsir.fit_importance_estimator(num_tokens_to_fit="all")
start = time.perf_counter()
dsir.compute_importance_weights()
print(time.perf_counter() - start)
"""  # the weights stand in FOLDER/log_importance_weights/0.npy


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = sys.argv[1] if len(sys.argv) > 1 else make_environment(folder / "official")
        texts = write_pools(folder)
        kernel_table(folder, python, texts)
        end_to_end(folder, python)
        weights(folder, python)


def make_environment(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = ["data-selection==1.0.3", "nltk==3.9.1", "numpy"]
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return str(folder / "bin" / "python")


def paragraphs():
    with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
        for line in gzip.open(file):
            yield json.loads(line)["text"]
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        for text in path.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
            if len(text) > 100:
                yield text


def write_pools(folder: Path) -> list[str]:
    """`pool.jsonl`; every n-th of its rows in `part.jsonl`, for the package; the first 2,000 rows as target."""
    texts, size = [], 0
    for text in paragraphs():
        texts.append(text)
        size += len(json.dumps({"text": text})) + 1
        if size >= POOL_BYTES:
            break
    np.random.default_rng(0).shuffle(texts)
    parts = {"pool": texts, "part": texts[:: round(size / OFFICIAL_BYTES)], "target": texts[:2000]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return texts


def megabytes(texts) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def use(kernel: str) -> None:
    os.environ["KRONTUNE_KERNEL"] = kernel
    kernels.kernel.cache_clear()


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def kernel_table(folder: Path, python: str, texts: list[str]) -> None:
    """Texts that are in memory, to log weights: megabytes of text a second."""
    columns = [batch.texts for batch in read_all(folder / "pool.jsonl", "raw")]
    tables = {targets: np.random.default_rng(0).normal(size=(2**17, targets)) for targets in (1, 8)}
    runs = {}
    for kernel in ("numpy", "numba"):
        for targets, table in tables.items():
            runs[f"{kernel}, {targets} target{'s' * (targets > 1)}"] = (
                kernel,
                lambda table=table: [kernels.score(column, 2, 2**17, table) for column in columns],
            )
        runs[f"{kernel}, Python strings"] = (kernel, lambda: kernels.score(texts, 2, 2**17, tables[1]))
    seconds: dict[str, list[float]] = {name: [] for name in ["official", *runs]}
    command = [python, "-c", OFFICIAL, folder / "part.jsonl", folder / "cache"]
    part = [json.loads(line)["text"] for line in (folder / "part.jsonl").open()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as official:
        assert official.stdin and official.stdout
        for number in range(ROUNDS + 1):
            official.stdin.write("\n")
            official.stdin.flush()
            took = {"official": float(official.stdout.readline())}
            for name, (kernel, run) in runs.items():
                use(kernel)
                took[name] = timed(run)
            if number:  # the first round compiles
                for name, value in took.items():
                    seconds[name].append(value)
        official.stdin.close()
    sizes = {name: megabytes(part if name == "official" else texts) for name in seconds}
    rates = {name: sizes[name] / median(values) for name, values in seconds.items()}
    # A ratio within each round: whatever else the machine did then, it did to both.
    ratios = {
        name: median(
            sizes[name] / ours / (sizes["official"] / theirs)
            for ours, theirs in zip(values, seconds["official"], strict=True)
        )
        for name, values in seconds.items()
    }
    rows = [[name, f"{rate:.1f}", f"{ratios[name]:.0f}"] for name, rate in rates.items()]
    title = (
        f"Texts in memory to log weights, {megabytes(texts):.0f} MB in {len(texts)} texts, one core, median of {ROUNDS}"
    )
    show(title, ["", "MB/s", "times official"], rows)
    for kernel in ("numpy", "numba"):
        one, eight = (seconds[f"{kernel}, {name}"] for name in ("1 target", "8 targets"))
        times = median(b / a for a, b in zip(one, eight, strict=True))
        print(f"{kernel}: eight targets take {times:.2f} times as long as one")


def end_to_end(folder: Path, python: str) -> None:
    """From the file to log weights."""
    command = [python, "-c", WHOLE, folder / "pool.jsonl", folder / "target.jsonl", folder / "cache2"]
    whole = float(
        subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout.splitlines()[-1]
    )
    rows = [["official", f"{whole:.2f}", "1"]]
    pool = folder / "pool.jsonl"
    for kernel in ("numpy", "numba"):
        use(kernel)
        dsir = Dsir().fit(target=folder / "target.jsonl", raw=pool)
        seconds = median(timed(lambda dsir=dsir: dsir.log_weights(pool)) for _ in range(ROUNDS))
        rows.append([f"krontune, {kernel}", f"{seconds:.2f}", f"{whole / seconds:.0f}"])
    show(f"{pool.stat().st_size / 1e6:.0f} MB of jsonl to log weights, one core", ["", "s", "times official"], rows)


def weights(folder: Path, python: str) -> None:
    """The package's own weights beside those of `Dsir(compat=...)`."""
    part, target = folder / "part.jsonl", folder / "target.jsonl"
    command = [python, "-c", WHOLE, part, target, folder / "cache3"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    theirs = np.load(folder / "cache3" / "log_importance_weights" / "0.npy")
    ours = Dsir(compat="dsir-1.0.3").fit(target=target, raw=part).log_weights(part)
    apart, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    print(f"compat: {len(theirs)} weights, the largest {largest:.0f}; the largest difference {apart:.1e}")


main()
