"""What was picked from a pool, why, and the random control; and how to pick by score."""

import json
import operator
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import read_checked, read_header, write_atomic
from .ngrams import mix64
from .texts import DataSelectionError, TextSource, checked_source, file_paths, is_dataset_dict

FORMAT = "krontune.selection"
HEADER, PICKS = "selection.json", "picks.jsonl"
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, eq=False)
class Selection:
    """k rows picked from a pool of `pool_size` rows.

    Args:
        indices: (k,) int64, increasing: row numbers in the pool.
        reasons: one mapping of plain values a pick, in the order of `indices`: why it was chosen.
        pool_size: how many rows the pool has.
        seed: the seed of the pick; `control` is drawn from it too.
        method: how the rows were picked ("gumbel", "topk", "random", ...).
        pool: the texts that were picked from, where they can be read again. It is not saved.
        details: plain values on the pick as a whole, such as how many rows were left out and why.

    Raises:
        DataSelectionError: the indices are not increasing row numbers of the pool, or reasons not as many.
    """

    indices: NDArray[np.int64]
    reasons: Sequence[Mapping[str, Any]]
    pool_size: int
    seed: int
    method: str
    pool: TextSource | None = field(default=None, repr=False)
    details: Mapping[str, Any] = field(default_factory=dict)
    _pool_state: list[tuple[str, int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checked_int(self.pool_size, "pool_size", 0, 2**62, "it is the number of rows that were picked from")
        checked_int(self.seed, "seed", 0, MAX_SEED, "any such number does")
        indices = np.asarray(self.indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataSelectionError(
                f"indices must be one list of integers, not shape {indices.shape} of {indices.dtype}"
            )
        indices = indices.astype(np.int64)
        if np.any(np.diff(indices) <= 0):
            raise DataSelectionError("indices must increase, each row once; sort them and drop the repeats")
        if indices.size and (indices[0] < 0 or indices[-1] >= self.pool_size):
            raise DataSelectionError(
                f"indices run from {indices[0]} to {indices[-1]}; give row numbers of the pool, 0 to "
                f"{self.pool_size - 1}"
            )
        if len(self.reasons) != len(indices):
            raise DataSelectionError(f"{len(self.reasons)} reasons for {len(indices)} picks; give one a pick")
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "_pool_state", files_state(self.pool))

    def __len__(self) -> int:
        return len(self.indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        mine = (self.pool_size, self.seed, self.method, list(self.reasons), dict(self.details))
        theirs = (other.pool_size, other.seed, other.method, list(other.reasons), dict(other.details))
        return mine == theirs and np.array_equal(self.indices, other.indices)

    @cached_property
    def control(self) -> "Selection":
        """As many rows, drawn from the same pool uniformly without replacement, from the same seed: what a
        selection has to beat. It may share rows with the selection, as any random draw may."""
        noise = uniform_noise(self.seed, self.pool_size, stream=1)
        indices = top_k(noise, len(self))
        reasons = [{"selector": "random"} for _ in indices]
        control = Selection(indices, reasons, self.pool_size, self.seed, "random", self.pool)
        object.__setattr__(control, "_pool_state", self._pool_state)
        return control

    def apply(self, dataset: Any) -> Any:
        """The picked rows of `dataset`: of a `datasets.Dataset` a Dataset, of a list or tuple a list; of a
        `DatasetDict` those of the split that `texts.read_texts` reads.

        Raises:
            DataSelectionError: the dataset is of another kind, or has not `pool_size` rows.
        """
        if not isinstance(dataset, (list, tuple)):
            from datasets import Dataset

            dataset = checked_source(dataset, "dataset") if is_dataset_dict(dataset) else dataset
            if not isinstance(dataset, Dataset):
                raise DataSelectionError(
                    f"a selection applies to a datasets.Dataset or a list, not to {type(dataset).__name__}; "
                    "load files with datasets.load_dataset(..., split='train') first"
                )
        if len(dataset) != self.pool_size:
            raise DataSelectionError(
                f"the dataset has {len(dataset)} rows, the pool had {self.pool_size}; apply it to "
                "the pool that was scored, whole and in the same order"
            )
        if isinstance(dataset, (list, tuple)):
            return [dataset[i] for i in self.indices.tolist()]
        return dataset.select(self.indices)

    def rows(self, pool: TextSource | None = None) -> Iterator[dict[str, Any]]:
        """The picked rows with all their columns, read from `pool`, or from the pool that the selection holds; a string
        is a row with `text`.

        Raises:
            DataSelectionError: there is no pool, it cannot be read, it has another size by now, or a file of it was
                changed after the selection was made. Of a selection that was loaded only the size is compared.
        """
        from .outputs import picked_rows

        return picked_rows(self, pool)

    def write(self, path: str | os.PathLike[str], pool: TextSource | None = None) -> None:
        """Write the picked rows as `.jsonl` or `.parquet`, whole or not at all.

        Raises:
            DataSelectionError: as of `rows`, or the path ends otherwise.
        """
        from .outputs import write_picked

        write_picked(self, Path(path), pool)

    def push_to_hub(self, repo_id: str, pool: TextSource | None = None, **options: Any) -> str:
        """Put the picked rows on the Hugging Face Hub; see `outputs.push`. Returns the address."""
        from .outputs import push

        return push(self, repo_id, pool, **options)

    def summary(self) -> dict[str, Any]:
        """Counts and, of every reason that is a float (DSIR: log_weight), mean, min and max.

        A reason that is not finite (the log weight of an empty text) is left out of the three.
        """
        report: dict[str, Any] = {
            "method": self.method,
            "seed": self.seed,
            "n": len(self),
            "pool": self.pool_size,
            "share": len(self) / self.pool_size if self.pool_size else 0.0,
            **self.details,
        }
        for name in dict.fromkeys(key for reason in self.reasons for key in reason):
            values = [reason[name] for reason in self.reasons if isinstance(reason.get(name), float)]
            finite = np.array(values)[np.isfinite(values)] if values else np.empty(0)
            if finite.size:
                report[name] = {
                    "mean": float(finite.mean()),
                    "min": float(finite.min()),
                    "max": float(finite.max()),
                }
        return report

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `picks.jsonl` (one object a pick: its `index` and reason) and `selection.json` (the rest).

        Each file appears whole or not at all, `selection.json` last; it holds the checksum of the picks. A
        weight of minus infinity is written as -Infinity, which Python reads and stricter readers refuse.

        Raises:
            DataSelectionError: a reason holds a value that JSON has no form for, or a key "index".
        """
        folder = Path(folder)
        lines = []
        for index, reason in zip(self.indices.tolist(), self.reasons, strict=True):
            if "index" in reason:
                raise DataSelectionError(f"the reason of row {index} has a key 'index', which names the row itself")
            try:
                lines.append(json.dumps({"index": index, **reason}) + "\n")
            except TypeError as error:
                raise DataSelectionError(f"the reason of row {index}, {reason!r}, is not plain: {error}") from error
        picks = "".join(lines).encode()
        header = {
            "format": FORMAT,
            "version": 1,
            "method": self.method,
            "seed": self.seed,
            "pool_size": self.pool_size,
            "picks": len(self),
            "details": dict(self.details),
            "picks_crc32": zlib.crc32(picks),
        }
        write_atomic(folder / PICKS, picks)
        write_atomic(folder / HEADER, json.dumps(header, indent=2).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Selection":
        """Read a selection that `save` wrote.

        Raises:
            DataSelectionError: a file is missing, of another kind or version, or they do not belong together.
        """
        header = read_header(Path(folder) / HEADER, FORMAT)
        picks = read_checked(Path(folder) / PICKS, header["picks_crc32"])
        rows = [json.loads(line) for line in picks.splitlines()]
        indices = np.array([row.pop("index") for row in rows], np.int64)
        details = header.get("details", {})
        return cls(indices, rows, header["pool_size"], header["seed"], header["method"], details=details)


def files_state(pool: TextSource | None) -> list[tuple[str, int, int]]:
    """Of the files of a pool name, size and time of change, which tell one content from another; none of a pool in
    memory, or of files that are gone."""
    if pool is None:
        return []
    try:
        return [(str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in file_paths(pool)]
    except OSError:
        return []


def top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The positions of the k highest scores, increasing; of equal scores the earlier position is taken."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def uniform_noise(seed: int, rows: int, stream: int = 0, first: int = 0) -> NDArray[np.float64]:
    """(rows,) numbers in (0, 1) for the rows from `first` on: row i's depends on seed, stream and i alone, whatever is
    drawn beside it.

    splitmix64 started at a hash of (seed, stream) and read at position i.
    """
    # An array of one, since numpy warns when a scalar wraps.
    start = mix64(mix64(np.array([seed], np.uint64)) + np.uint64(stream))
    places = np.arange(rows, dtype=np.uint64) + np.uint64(first + 1)
    # 52 bits: with 53, the half that keeps 0 out would round the highest number to 1.
    return (
        (mix64(start + places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(12)).astype(np.float64) + 0.5
    ) * 2.0**-52


def gumbel_noise(seed: int, rows: int, stream: int = 0, first: int = 0) -> NDArray[np.float64]:
    """(rows,) draws of the standard Gumbel distribution; arguments as of `uniform_noise`."""
    return -np.log(-np.log(uniform_noise(seed, rows, stream, first)))


def checked_int(value: Any, name: str, low: int, high: int, advice: str) -> int:
    """`value` as an int in [low, high].

    Raises:
        DataSelectionError: it is no integer or out of range; the message ends with `advice`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise DataSelectionError(f"{name}={value!r}: must be an integer from {low} to {high}; {advice}")
    return number
