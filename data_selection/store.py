"""A folder of sample scores and gradient vectors that a killed run goes on with and several processes fill together.

The folder holds

- `store.json`, what the numbers belong to: model, adapter, data, template, layers, projection, batches;
- `vectors.f16` (of unit length) or, for whole gradients, `vectors.f32` (as they are): one row a sample;
- `scores.rows`, float64, one row a sample, while the store is filled; `scores.arrow` once every row is there;
- `done.map`, one byte a row (bits of one byte could not be set by two processes at once), written and flushed after the
  row's numbers have reached the disk.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import read_header, write_atomic
from .texts import DataSelectionError

FORMAT = "krontune.store"
HEADER, ROWS, ARROW, DONE = "store.json", "scores.rows", "scores.arrow", "done.map"
NORM = "gradient_norm"


class Store:
    """Scores and vectors of N samples in a folder.

    Raises:
        DataSelectionError: the folder holds no store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        header = read_header(self.folder / HEADER, FORMAT)
        self.key: Mapping[str, Any] = header["key"]
        self.rows: int = header["rows"]
        self.columns: list[str] = header["columns"]
        self.width: int = header["width"]

    @classmethod
    def prepare(
        cls, folder: str | os.PathLike[str], key: Mapping[str, Any], rows: int, columns: Sequence[str], width: int
    ) -> "Store":
        """Make a store, or open the one that is there.

        Args:
            folder: where.
            key: what the numbers depend on; plain values.
            rows: how many samples.
            columns: names of the scores.
            width: numbers in a vector; 0 for no vectors.

        Raises:
            DataSelectionError: the folder holds a store with another key, or other files, or is damaged.
        """
        folder = Path(folder)
        content = {"rows": rows, "columns": list(columns), "width": width, "key": dict(key)}
        header = {"format": FORMAT, "version": 1, **content}
        if (folder / HEADER).exists():
            _check_same(folder, read_header(folder / HEADER, FORMAT), header)
        elif any(folder.glob("[!.]*")):
            raise DataSelectionError(f"{folder} holds other files; give a new folder, or that of an earlier run")
        else:
            write_atomic(folder / HEADER, json.dumps(header, indent=2).encode())
        store = cls(folder)
        store._check_whole()
        store._reserve(DONE, rows)
        if width:
            store._reserve(store._vector_file, rows * width * store.dtype.itemsize)
        if not (folder / ARROW).exists():
            store._reserve(ROWS, rows * len(columns) * 8)
        return store

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the vectors: float16 where they are projected, float32 where they are whole gradients."""
        return np.dtype(np.float32 if self.key.get("projection") is None else np.float16)

    @property
    def _vector_file(self) -> str:
        return "vectors.f32" if self.dtype == np.float32 else "vectors.f16"

    def _check_whole(self) -> None:
        """Refuse a folder some of whose files are gone or too short (a copy that was cut?): what is missing would be
        read as zeros."""
        begun = (self.folder / ARROW).exists() or bool(self.done.any())
        sizes = {DONE: self.rows, ROWS: self.rows * len(self.columns) * 8}
        if self.width:
            sizes[self._vector_file] = self.rows * self.width * self.dtype.itemsize
        lost = [name for name, size in sizes.items() if _size(self.folder / name) < size]
        # Looked for last: another process may be turning the one into the other, and takes the old one away last.
        if ROWS in lost and (self.folder / ARROW).exists():
            lost.remove(ROWS)
        if begun and lost:
            raise DataSelectionError(
                f"{self.folder} is damaged: {', '.join(lost)} is gone or too short; delete the folder to begin again, "
                "or bring back a whole copy"
            )

    def _reserve(self, name: str, size: int) -> None:
        """Make a file of `size` zeros; one that is there keeps its content."""
        with (self.folder / name).open("ab") as file:
            if file.tell() < size:
                file.truncate(size)

    def __len__(self) -> int:
        return self.rows

    @property
    def done(self) -> NDArray[np.bool_]:
        """(N,) whether the row's numbers are on the disk, read anew each time."""
        if _size(self.folder / DONE) < 0:  # cut before anything was done
            return np.zeros(self.rows, bool)
        return np.fromfile(self.folder / DONE, np.uint8).astype(bool)

    @property
    def complete(self) -> bool:
        """Whether every row is done."""
        return bool(self.done.all())

    def write(self, rows: Sequence[int], scores: NDArray[np.float64], vectors: NDArray[Any] | None) -> None:
        """Put down the numbers of some rows, then mark them done; each on the disk before the next.

        Args:
            rows: (n,) row numbers.
            scores: (n, columns).
            vectors: (n, width), or None where the store holds none.
        """
        with (self.folder / ROWS).open("r+b", buffering=0) as file:
            _write_rows(file, rows, np.ascontiguousarray(scores, np.float64))
        if vectors is not None:
            with (self.folder / self._vector_file).open("r+b", buffering=0) as file:
                _write_rows(file, rows, np.ascontiguousarray(vectors, self.dtype))
        with (self.folder / DONE).open("r+b", buffering=0) as file:
            _write_rows(file, rows, np.ones((len(rows), 1), np.uint8))

    def finish(self) -> None:
        """Where every row is done, turn the scores into `scores.arrow`. Any process may, and twice does no harm."""
        if not self.complete or (self.folder / ARROW).exists():
            return
        import pyarrow

        try:
            values = np.fromfile(self.folder / ROWS, np.float64).reshape(self.rows, len(self.columns))
        except FileNotFoundError:
            return  # another process was faster
        table = pyarrow.table({name: values[:, i] for i, name in enumerate(self.columns)})
        content = io.BytesIO()
        with pyarrow.ipc.new_file(content, table.schema) as writer:
            writer.write_table(table)
        write_atomic(self.folder / ARROW, content.getvalue())
        (self.folder / ROWS).unlink(missing_ok=True)

    @cached_property
    def _table(self) -> dict[str, NDArray[np.float64]]:
        self._check_complete()
        import pyarrow

        self.finish()
        try:
            with pyarrow.OSFile(str(self.folder / ARROW)) as file:
                table = pyarrow.ipc.open_file(file).read_all()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataSelectionError(
                f"{self.folder / ARROW} cannot be read: {error}; delete the folder to begin again, or bring back a "
                "whole copy"
            ) from error
        return {name: table[name].to_numpy() for name in table.column_names}

    def _check_complete(self) -> None:
        self._check_whole()
        if not self.complete:
            raise DataSelectionError(
                f"{self.folder} holds {int(self.done.sum())} of {self.rows} rows; call score_samples again with the "
                "same arguments, which does the rest (each process of a launch its part)"
            )

    @property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Name -> (N,) float64; NaN where a row has no answer token.

        Raises:
            DataSelectionError: rows are missing.
        """
        return {name: values for name, values in self._table.items() if name != NORM}

    @property
    def norms(self) -> NDArray[np.float64]:
        """(N,) the norm of each whole gradient.

        Raises:
            DataSelectionError: rows are missing, or the store was made without gradients.
        """
        self._check_vectors()
        return self._table[NORM]

    @property
    def vectors(self) -> NDArray[Any]:
        """(N, d), mapped from the disk: the gradient of each sample's mean answer NLL, zero for a row without answer.

        Projected ones are float16 of unit length, since float16 has no room for their own scale; `norms` has it. Whole
        ones (`projection=None`) are float32 as they are.

        Raises:
            DataSelectionError: rows are missing, or the store was made without gradients.
        """
        self._check_vectors()
        self._check_complete()
        return np.memmap(self.folder / self._vector_file, self.dtype, "r", shape=(self.rows, self.width))

    def _check_vectors(self) -> None:
        if not self.width:
            raise DataSelectionError(f"{self.folder} holds no vectors; score with gradients='last' in a new folder")


def _size(path: Path) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _write_rows(file: Any, rows: Sequence[int], values: NDArray[Any]) -> None:
    """Write each row of `values` at its place, and flush to the disk."""
    for row, value in zip(rows, values, strict=True):
        file.seek(row * value.nbytes)
        written = file.write(value.tobytes())
        if written != value.nbytes:
            raise OSError(f"{file.name}: only {written} of {value.nbytes} bytes could be written; is the disk full?")
    os.fsync(file.fileno())


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def entries(header: Mapping[str, Any]) -> dict[str, Any]:
        return {**header["key"], **{name: header[name] for name in ("rows", "columns", "width")}}

    # JSON turns tuples into lists, so that both sides have to be through it.
    old, new = entries(found), entries(json.loads(json.dumps(wanted)))
    other = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if other:
        listed = "; ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in other)
        raise DataSelectionError(f"{folder} belongs to other numbers ({listed}); give another folder, or delete it")
