"""Import of a gradient index that Bergson (github.com/EleutherAI/bergson) has built.

Two layouts of `gradients.bin` are read, told apart by the `info.json` beside it, and no other:

- flat (Bergson 0.13.1 to 2.5.1): `num_grads` rows of `sum(grad_sizes)` numbers of `base_dtype`, the modules in the
  order of `grad_sizes`; `attribute_tokens` is false and `num_items` equals `num_grads`;
- structured (up to 0.10): `dtype` holds `names` and `formats`, one field `(size,)type` a module, all of one type,
  without gaps. The bytes are those of the flat layout.

Beside it stand `processor_config.yaml` (the projection), `config.yaml` (what the index was built from) and `data.hf`
(the rows, with their `loss`); the first two go into the store's key, and an index that lacks them can be imported too.
Vectors are imported as they stand: where Bergson was told to normalise or precondition gradients, they are so, and the
key says by what. `normalizers.pth`, `hessians.pth` and their like are pickles and are not read.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from .store import NORM, Store
from .texts import DataSelectionError

ROWS_AT_ONCE, NUMBERS_AT_ONCE = 1024, 1 << 26
TYPES = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}  # numpy has no bfloat16
STRUCTURED = {"<f2": "float16", "<f4": "float32", "<f8": "float64", "<V2": "bfloat16"}
# What has to agree between two indexes whose vectors are compared, in processor_config.yaml.
PROJECTION = (
    "projection_dim",
    "projection_type",
    "projection_scale",
    "projection_seed",
    "projection_target",
    "projection_version",
    "include_bias",
    "reshape_to_square",
)
SCORE = {"mean": "nll", "sum": "loss"}


@dataclass(frozen=True)
class _Index:
    """An `info.json`: rows, numbers of each module in their order, and their type."""

    rows: int
    sizes: dict[str, int]
    type: str
    layout: str


def import_bergson(
    index: str | os.PathLike[str], *, out_dir: str | os.PathLike[str], modules: Sequence[str] | None = None
) -> Store:
    """Bergson's gradients as a store, into a folder where an interrupted import goes on.

    Args:
        index: the folder that Bergson built, with `gradients.bin` and `info.json`.
        out_dir: the folder of the store.
        modules: names of the modules whose gradients are taken, in the order of the index; None for all.

    Returns:
        The store, row i that of row i of the index and of its `data.hf`, to which a selection applies. `vectors` are
        of unit length, float16; `norms` those before. `scores` holds the loss that Bergson wrote, in nats, where there
        is a `data.hf`: "nll" for an index built with `loss_reduction: mean`, else "loss", the sum over the tokens.
        A row whose gradient is zero (Bergson skips documents of a single token) has NaN scores and is never picked.

    Raises:
        DataSelectionError: the folder holds no index, one in another layout, one of tokens or of aggregated gradients,
            or one whose sizes do not fit; a module is unknown; a gradient is not finite; `out_dir` belongs to
            something else.
    """
    folder = Path(index)
    found = _read_info(folder)
    names = list(found.sizes) if modules is None else list(dict.fromkeys(modules))
    unknown = [name for name in names if name not in found.sizes]
    if unknown or not names:
        raise DataSelectionError(
            f"modules={names}: {unknown or 'none'} of them are not in {folder}; it holds {', '.join(found.sizes)}"
        )
    names = [name for name in found.sizes if name in names]
    built = _settings(folder)
    index_settings, preparation = built.get("index_cfg", {}), built.get("preprocess_cfg", {})
    if preparation.get("aggregation", "none") != "none":
        raise DataSelectionError(
            f"{folder} holds one gradient aggregated over all rows ({preparation['aggregation']}), not one a row; "
            "build with aggregation: none"
        )
    losses = _losses(folder, found.rows)
    key = _key(folder, found, names, index_settings, preparation)
    columns = [NORM] if losses is None else [SCORE[index_settings.get("loss_reduction", "sum")], NORM]
    store = Store.prepare(out_dir, key, found.rows, columns, sum(found.sizes[name] for name in names))
    taken = _columns(found, names)
    raw = np.memmap(folder / "gradients.bin", TYPES[found.type], "r", shape=(found.rows, sum(found.sizes.values())))
    done = store.done
    step = max(1, min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // store.width))
    for first in range(0, found.rows, step):
        places = [row for row in range(first, min(first + step, found.rows)) if not done[row]]
        if not places:
            continue
        vectors = np.concatenate([_numbers(raw[places, start:stop], found.type) for start, stop in taken], axis=1)
        norms = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~np.isfinite(norms))
        if len(bad):
            raise DataSelectionError(f"{folder}: the gradient of row {places[bad[0]]} is not finite; build it again")
        vectors /= np.where(norms > 0, norms, 1.0)[:, None]
        scores = [norms] if losses is None else [losses[places], norms]
        table = np.where(norms > 0, np.stack(scores), np.nan).T
        store.write(places, table, vectors.astype(np.float16))
    store.finish()
    return store


def _read_info(folder: Path) -> _Index:
    path = folder / "info.json"
    try:
        info = json.loads(path.read_bytes())
    except OSError as error:
        shards = [child.name for child in sorted(folder.glob("*")) if (child / "info.json").is_file()]
        advice = f"import each of {', '.join(shards)}" if shards else "give the folder that Bergson built"
        raise DataSelectionError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise DataSelectionError(f"{path} is not JSON: {error}; build the index again") from error
    if not isinstance(info, dict) or not isinstance(info.get("grad_sizes"), dict):
        what = "one of scores" if isinstance(info, dict) and "num_scores" in info else "none of gradients"
        raise DataSelectionError(f"{path} describes an index of another kind, {what}: 'grad_sizes' is missing")
    if info.get("attribute_tokens"):
        raise DataSelectionError(
            f"{folder} holds a gradient for every token (attribute_tokens: true), and a selection is of rows; build "
            "it without attribute_tokens"
        )
    sizes = {str(name): int(size) for name, size in info["grad_sizes"].items()}
    if "dtype" in info:
        layout, kind = "structured", _structured_type(path, info["dtype"], sizes)
    elif "attribute_tokens" in info and info.get("num_items") == info.get("num_grads"):
        layout, kind = "flat", info.get("base_dtype")
    else:
        raise DataSelectionError(
            f"{path} has the keys {sorted(info)}, which is neither the flat layout of Bergson 0.13.1 to 2.5.1 nor the "
            "structured one up to 0.10; build the index with one of these"
        )
    if kind not in TYPES:
        raise DataSelectionError(f"{path}: numbers of type {kind!r}; known are {', '.join(TYPES)}")
    found = _Index(int(info["num_grads"]), sizes, kind, layout)
    _check_size(folder, found)
    return found


def _structured_type(path: Path, dtype: Any, sizes: dict[str, int]) -> str:
    """The one type of a structured layout's fields, whose names and sizes must be those of the modules."""
    fields = [re.fullmatch(r"\((\d+),\)(.+)", text) for text in dtype.get("formats", [])]
    parts = [(int(field[1]), field[2]) for field in fields if field]
    types = {kind for _, kind in parts}
    if list(dtype.get("names", [])) != list(sizes) or [n for n, _ in parts] != list(sizes.values()) or len(types) != 1:
        raise DataSelectionError(f"{path}: the fields of its dtype are not the modules of grad_sizes; build it again")
    [kind] = types
    width = 8 if kind == "<f8" else 4 if kind == "<f4" else 2
    if kind not in STRUCTURED or dtype.get("itemsize", width * sum(sizes.values())) != width * sum(sizes.values()):
        raise DataSelectionError(f"{path}: fields of {kind!r} in rows of {dtype.get('itemsize')} bytes are not known")
    return STRUCTURED[kind]


def _check_size(folder: Path, found: _Index) -> None:
    wanted = found.rows * sum(found.sizes.values()) * np.dtype(TYPES[found.type]).itemsize
    try:
        size = (folder / "gradients.bin").stat().st_size
    except OSError as error:
        raise DataSelectionError(f"cannot read {folder / 'gradients.bin'}: {error.strerror}; build again") from error
    if not wanted or size != wanted:
        raise DataSelectionError(
            f"{folder / 'gradients.bin'} has {size} bytes, and {found.rows} rows of {sum(found.sizes.values())} "
            f"numbers of {found.type} are {wanted}; was it cut short? Build it again"
        )


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of the command that built the index; {} where it wrote none, as in training."""
    document = _yaml(folder / "config.yaml")
    steps = document.get("steps") or [{}]
    return next((dict(settings) for settings in steps[-1].values() if isinstance(settings, dict)), {})


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataSelectionError(f"{path} is not YAML: {error}; build the index again") from error
    return found if isinstance(found, dict) else {}


def _losses(folder: Path, rows: int) -> NDArray[np.float64] | None:
    if not (folder / "data.hf").is_dir():
        return None
    from datasets import Dataset

    data = Dataset.load_from_disk(str(folder / "data.hf"))
    if len(data) != rows:
        raise DataSelectionError(f"{folder / 'data.hf'} has {len(data)} rows, and there are {rows} gradients")
    return np.array(data["loss"], np.float64) if "loss" in data.column_names else None


def _key(
    folder: Path, found: _Index, names: list[str], settings: dict[str, Any], preparation: dict[str, Any]
) -> dict[str, Any]:
    """What the store says it is. `model`, `adapter`, `layers`, `projection` and `seed` tell comparable vectors."""
    fingerprint = _fingerprint(folder)
    processor = _yaml(folder / "processor_config.yaml")
    model = settings.get("model")
    unknown = f"unknown, of index {fingerprint}"  # so that it equals that of no other
    projection = {name: processor.get(name) for name in PROJECTION} if processor else {"settings": unknown}
    changed = {name: settings.get(name) for name in ("optimizer_state", "loss_fn", "loss_reduction", "label_smoothing")}
    return {
        "model": unknown if model is None else f"bergson:{model}@{settings.get('revision') or 'main'}",
        "adapter": settings.get("peft_init_kwargs") or "as the model names",
        "layers": names,
        "projection": {"kind": "bergson", **projection, **changed, "preprocess": preparation},
        "seed": processor.get("projection_seed"),
        "data": {name: settings.get("data", {}).get(name) for name in ("dataset", "split", "subset")},
        "source": {
            "format": "bergson",
            "layout": found.layout,
            "version": _yaml(folder / "config.yaml").get("metadata", {}).get("bergson_version"),
            "index": fingerprint,
        },
    }


def _fingerprint(folder: Path) -> str:
    """A hash of the description and of a sample of the gradients, 64 pieces of 4 KiB."""
    digest = hashlib.sha256((folder / "info.json").read_bytes())
    path = folder / "gradients.bin"
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _columns(found: _Index, names: list[str]) -> list[tuple[int, int]]:
    """Where each module's numbers begin and end in a row."""
    ends = np.cumsum(list(found.sizes.values())).tolist()
    return [(end - found.sizes[name], end) for name, end in zip(found.sizes, ends, strict=True) if name in names]


def _numbers(raw: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """Numbers as they stand in the file, as float32."""
    if kind == "bfloat16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # what float32 has no room for is refused as not finite
        return raw.astype(np.float32)
