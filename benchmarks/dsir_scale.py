"""DSIR on a pool that one would not hold in memory: seconds, memory and files of scoring into a folder, and of picking.

    python benchmarks/dsir_scale.py [MEGABYTES]

The pool is the prose that krontune ships, over and over, in files of 200 MB (jsonl) and as Parquet.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import pyarrow
from measure import show
from pyarrow import parquet

from krontune.data_selection import Dsir

RUN = """
import sys, time
from pathlib import Path
from krontune.data_selection import Dsir
from krontune.data_selection.kernels import kernel
what, dsir, scores, num_proc, *pool = sys.argv[1:]
dsir, pool = Dsir.load(dsir), [Path(path) for path in pool]
dsir.log_weights(["compiled now"])
start = time.perf_counter()
if what == "score":
    dsir.score(pool, scores, int(num_proc))
else:
    dsir.select(pool, k=10_000, out_dir=scores)
seconds = time.perf_counter() - start
# Not ru_maxrss, which a process takes over from the one that started it.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) / 1024)
"""


def main() -> None:
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 1000.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pools = {
            "jsonl, a tenth": write_jsonl(folder / "small", size / 10),
            "jsonl": write_jsonl(folder / "large", size),
        }
        pools["parquet"] = [write_parquet(folder, pools["jsonl"])]
        target = pools["jsonl"][0].with_name("target.jsonl")
        target.write_text("".join(line for _, line in zip(range(500), pools["jsonl"][0].open(), strict=False)))
        Dsir().fit(target=target, raw=pools["jsonl"][0]).save(folder / "dsir")
        table = []
        for pool, num_proc in (("jsonl, a tenth", 1), ("jsonl", 1), ("jsonl", 2), ("parquet", 1)):
            scores = folder / f"scores {pool} {num_proc}"
            seconds, memory = run("score", folder / "dsir", scores, num_proc, pools[pool])
            read = sum(path.stat().st_size for path in pools[pool]) / 1e6
            rows = sum(parquet.read_metadata(path).num_rows for path in (scores / "shards").iterdir())
            kept = sum(path.stat().st_size for path in (scores / "shards").iterdir())
            name = f"{pool}, {num_proc} process{'es' * (num_proc > 1)}"
            bytes_a_row = f"{kept / rows:.1f}"
            table.append(
                [
                    name,
                    f"{read:.0f}",
                    f"{rows:,}",
                    f"{seconds:.1f}",
                    f"{read / seconds:.0f}",
                    f"{memory:.0f}",
                    bytes_a_row,
                ]
            )
            if num_proc == 1:
                seconds, memory = run("select", folder / "dsir", scores, 1, pools[pool])
                table.append([f"{pool}, picking", "", f"{rows:,}", f"{seconds:.1f}", "", f"{memory:.0f}", ""])
        columns = ["", "MB", "texts", "s", "MB/s", "peak MB", "bytes a text"]
        show("Scoring into a folder, shards of 64 MB", columns, table)


def run(what: str, dsir: Path, scores: Path, num_proc: int, pool: list[Path]) -> tuple[float, float]:
    command = [sys.executable, "-c", RUN, what, dsir, scores, str(num_proc), *pool]
    seconds, memory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), float(memory)


def write_jsonl(folder: Path, megabytes: float) -> list[Path]:
    folder.mkdir()
    with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
        lines = [json.dumps({"text": json.loads(line)["text"]}).encode() + b"\n" for line in gzip.open(file)]
    once = b"".join(lines)
    paths = []
    while megabytes > 0:
        paths.append(folder / f"part-{len(paths):03d}.jsonl")
        with paths[-1].open("wb") as file:
            for _ in range(max(1, round(min(megabytes, 200) * 1e6 / len(once)))):
                file.write(once)
        megabytes -= 200
    return paths


def write_parquet(folder: Path, pool: list[Path]) -> Path:
    path = folder / "pool.parquet"
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())]), compression="zstd") as writer:
        for part in pool:
            rows = [json.loads(line) for line in part.open()]
            writer.write_table(pyarrow.Table.from_pylist(rows), row_group_size=50_000)
    return path


main()
