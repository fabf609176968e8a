"""Scores of a pool, shard by shard: in memory, or in a folder where a killed run goes on and machines share the work.

The folder holds

- `scores.json`, the manifest: the fingerprint of the pool, the hash of the estimator, and the list of shards;
- `dsir/`, the estimator;
- `shards/00000000.parquet`, ..., one a shard: `tokens`, `copy` (of a target text), `log_weight` or, for several
  targets, `log_weight:NAME`, and `source` where rows have one.

A file appears whole or not at all, so that the files that are there are the state: whoever comes later does the rest.
"""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import kernels
from .chunks import cut_batch
from .files import read_header, write_atomic
from .importance import Counts, Floats, normalised
from .ngrams import ngram_counts
from .sampling import ShardScores
from .shards import Shard, fingerprint, plan, read_batches
from .texts import DataSelectionError, TextSource, file_paths

if TYPE_CHECKING:
    from .dsir import Dsir

FORMAT = "krontune.scores"
MANIFEST, ESTIMATOR, SHARDS = "scores.json", "dsir", "shards"
DIGEST = b"krontune.scores"
WORKER = "from krontune.data_selection.scoring import work; work()"


class Scorer(NamedTuple):
    """What is needed of a fitted `Dsir` to weigh texts."""

    ngrams: int
    buckets: int
    normalize: str
    official: bool
    chunk_words: int | None
    table: Floats  # (buckets, targets)
    prints: Any  # (P,) uint64, sorted: those of the target texts
    names: tuple[str, ...]  # of the targets


def score_shard(scorer: Scorer, source: TextSource, shard: Shard, file: str, name: str = "raw") -> ShardScores:
    """Weigh the texts of one shard. Memory holds one batch and some ten bytes a row."""
    weights, tokens, prints, sources = [np.empty((0, len(scorer.names)))], [np.empty(0, np.int64)], [], []
    prints = [np.empty(0, np.uint64)]
    for batch in read_batches(source, shard, name):
        if scorer.chunk_words:
            batch = cut_batch(batch, scorer.chunk_words)
        found = kernels.score(batch.texts, scorer.ngrams, scorer.buckets, scorer.table, scorer.official)
        weights.append(normalised(found.sums, ngram_counts(found.tokens, scorer.ngrams), scorer.normalize))
        tokens.append(found.tokens)
        prints.append(found.prints)
        sources.append((batch.sources, len(found.tokens)))
    named = None
    if any(part is not None for part, _ in sources):
        named = [source for part, rows in sources for source in (part or [""] * rows)]
    copies = np.isin(np.concatenate(prints), scorer.prints)
    return ShardScores(np.concatenate(weights), np.concatenate(tokens), copies, named, file, shard.path or "")


def score_in_memory(scorer: Scorer, source: TextSource) -> Iterator[ShardScores]:
    """The scores of all shards, in order."""
    shards = plan(source, "raw")
    for shard in shards:
        yield score_shard(scorer, source, shard, shard.file if several_files(shards) else "")


def several_files(shards: Sequence[Shard]) -> bool:
    """Whether the shards are of more than one file."""
    return len({shard.file for shard in shards}) > 1


@dataclass(frozen=True)
class ScoreFolder:
    """A folder of scores, complete or not."""

    path: Path
    shards: tuple[Shard, ...]
    names: tuple[str, ...]
    digest: str

    def file(self, number: int) -> Path:
        """Where the scores of a shard stand."""
        return self.path / SHARDS / _shard_name(number)

    def missing(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """The shards without scores; of part (i, n) those whose number is i modulo n."""
        present = set(os.listdir(self.path / SHARDS)) if (self.path / SHARDS).is_dir() else set()
        numbers = range(part[0], len(self.shards), part[1])
        return [number for number in numbers if _shard_name(number) not in present]

    def write(self, number: int, scores: ShardScores) -> None:
        """Write the scores of one shard."""
        write_atomic(self.file(number), _to_parquet(scores, self.names, self.digest))

    def read(self) -> Iterator[ShardScores]:
        """The scores of all shards, in order.

        Raises:
            DataSelectionError: a shard is missing, damaged, or of other scores.
        """
        missing = self.missing()
        if missing:
            raise DataSelectionError(
                f"{self.path}: {len(missing)} of {len(self.shards)} shards are not scored yet (the first is "
                f"{missing[0]}); run the parts that are missing"
            )
        named = several_files(self.shards)
        for shard in self.shards:
            found = _from_parquet(self.file(shard.number), self.names, self.digest)
            yield replace(found, file=shard.file if named else "", path=shard.path or "")


def _shard_name(number: int) -> str:
    return f"{number:08d}.parquet"


def open_folder(dsir: "Dsir", raw: TextSource, out_dir: str | os.PathLike[str]) -> ScoreFolder:
    """The folder for the scores of `raw` by `dsir`, made where it is new.

    Raises:
        DataSelectionError: it holds the scores of another pool or estimator.
    """
    path = Path(out_dir)
    shards = tuple(plan(raw, "raw"))
    content = {
        "format": FORMAT,
        "version": 1,
        "input": fingerprint(raw, "raw"),
        "estimator": dsir.digest(),
        "targets": list(dsir.target_names),
        "shards": [[shard.file, shard.unit, shard.start, shard.stop] for shard in shards],
    }
    if (path / MANIFEST).exists():
        _check_manifest(path, content)
    else:
        dsir.save(path / ESTIMATOR)
        write_atomic(path / MANIFEST, json.dumps(content).encode())
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return ScoreFolder(path, shards, dsir.target_names, digest)


def _check_manifest(path: Path, content: dict[str, Any]) -> None:
    found = read_header(path / MANIFEST, FORMAT)
    for key, what in (("input", "another pool, or files changed since"), ("estimator", "another estimator")):
        if found.get(key) != content[key]:
            raise DataSelectionError(
                f"{path} holds the scores of {what}; give a new folder, or delete this one to score again"
            )
    if found != content:
        raise DataSelectionError(f"{path} was cut in other shards by another version; delete it to score again")


def score_to_folder(
    dsir: "Dsir", raw: TextSource, out_dir: str | os.PathLike[str], num_proc: int = 1, part: tuple[int, int] = (0, 1)
) -> ScoreFolder:
    """Score what is missing in the folder, of part (i, n) alone, in `num_proc` processes.

    Raises:
        DataSelectionError: a shard cannot be read (those that can are kept), the folder belongs to something else, or
            the files changed while they were read.
    """
    index, count = part
    if not (isinstance(index, int) and isinstance(count, int) and 0 <= index < count):
        raise DataSelectionError(f"part={part!r}: must be (i, n) with 0 <= i < n, machine i of n")
    folder = open_folder(dsir, raw, out_dir)
    missing = folder.missing(part)
    if min(num_proc, len(missing)) > 1:
        _in_processes(folder, raw, missing, min(num_proc, len(missing)))
    else:
        scorer = dsir.scorer()
        for number in missing:
            folder.write(number, score_shard(scorer, raw, folder.shards[number], ""))
    if file_paths(raw):
        open_folder(dsir, raw, out_dir)  # refuses where a file changed meanwhile
    return folder


def _in_processes(folder: ScoreFolder, raw: TextSource, numbers: Sequence[int], num_proc: int) -> None:
    """Each worker is a new interpreter that takes the next shard when it has done one: neither a fork of a process
    with threads, nor a second import of the caller's script."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in numbers:
        waiting.put(number)
    task = pickle.dumps((folder, raw))
    with ThreadPoolExecutor(num_proc) as threads:
        runs = [threads.submit(_feed, task, waiting) for _ in range(num_proc)]
    for run in runs:
        run.result()


def _feed(task: bytes, waiting: "SimpleQueue[int]") -> None:
    command = [sys.executable, "-c", WORKER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(len(task).to_bytes(8) + task)
            while True:
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                worker.stdin.write(number.to_bytes(8))
                worker.stdin.flush()
                answer = worker.stdout.readline()
                if not answer:
                    raise DataSelectionError(
                        f"the process that scored shard {number} died (out of memory?); run again to go on with what "
                        "is missing"
                    )
                fault = json.loads(answer)
                if fault:
                    raise DataSelectionError(fault)
        except BrokenPipeError as error:
            raise DataSelectionError("a scoring process died at its start; run again to go on") from error
        finally:
            worker.stdin.close()


def work() -> None:
    """A worker: the task and the numbers of shards come in, a line of JSON goes out for each, null or the fault."""
    from .dsir import Dsir

    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    folder, raw = pickle.loads(tasks.read(int.from_bytes(tasks.read(8))))
    scorer = Dsir.load(folder.path / ESTIMATOR).scorer()
    while number := tasks.read(8):
        fault = None
        try:
            shard = folder.shards[int.from_bytes(number)]
            folder.write(shard.number, score_shard(scorer, raw, shard, ""))
        except (DataSelectionError, OSError) as error:
            fault = str(error)
        answers.write(json.dumps(fault) + "\n")
        answers.flush()


def _columns(names: Sequence[str]) -> list[str]:
    return ["log_weight"] if len(names) == 1 else [f"log_weight:{name}" for name in names]


def _to_parquet(scores: ShardScores, names: Sequence[str], digest: str) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {"tokens": scores.tokens, "copy": scores.copies}
    for number, column in enumerate(_columns(names)):
        columns[column] = scores.log_weights[:, number]
    if scores.sources is not None:
        columns["source"] = pyarrow.array(scores.sources, pyarrow.string()).dictionary_encode()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata({DIGEST: digest.encode()}), buffer)
    return buffer.getvalue()


def _from_parquet(path: Path, names: Sequence[str], digest: str) -> ShardScores:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path, use_threads=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataSelectionError(f"{path}: cannot be read: {error}; delete it and score again") from error
    if (rows.schema.metadata or {}).get(DIGEST) != digest.encode():
        raise DataSelectionError(f"{path} belongs to other scores; delete it and score again")
    weights = np.stack([rows.column(column).to_numpy() for column in _columns(names)], axis=1)
    sources = rows.column("source").to_pylist() if "source" in rows.column_names else None
    return ShardScores(weights, rows.column("tokens").to_numpy(), rows.column("copy").to_numpy(), sources)


def count_source(
    source: TextSource, name: str, dsir: "Dsir", shards: Sequence[Shard] | None = None, limit: int | None = None
) -> tuple[Counts, int]:
    """(buckets,) n-grams of the source, or of some of its shards until `limit` texts; and how many texts."""
    counts, documents = np.zeros(dsir.buckets, np.int64), 0
    for shard in plan(source, name) if shards is None else shards:
        if limit is not None and documents >= limit:
            break
        for batch in read_batches(source, shard, name):
            if dsir.chunk_words:
                batch = cut_batch(batch, dsir.chunk_words)
            kernels.count(batch.texts, dsir.ngrams, dsir.buckets, counts, dsir.compat is not None)
            documents += len(batch.texts)
    return counts, documents
