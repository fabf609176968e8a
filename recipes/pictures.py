"""Rows with pictures: where they stand, and how models that read them are trained.

A row names its pictures under `images` or `image`: the paths of files, relative to the file that holds the row, or, in
data of the Hub and in parquet files, the pictures themselves. These are kept as files beside the rows that the run
writes, once each.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import ProcessorMixin

from ..adapters.base import takes_pictures
from ..data_selection.encoding import collate, encode, images_of, open_image
from ..data_selection.selection import write_atomic
from .run_folder import RunError
from .schema_model import BaseModelSection

Row = dict[str, Any]
PICTURES = "pictures"


def reads_pictures(base: BaseModelSection) -> bool:
    """Whether the base reads pictures; False where its configuration is not to be had."""
    from .targets import ConfigError, base_config

    try:
        config = base_config(base)
    except ConfigError:
        return False
    return config is not None and takes_pictures(config)


def missing_pictures(row: Row) -> list[str]:
    """Paths of the row under which there is no file."""
    return [one for one in images_of(row) if isinstance(one, str) and not Path(one).is_file()]


def holds_pictures(row: Row) -> bool:
    """Whether `images` or `image` are pictures: texts that name no file here, and other values, are not."""
    return any(isinstance(one, str) and Path(one).is_file() or _is_picture(one) for one in images_of(row))


def located(row: Row, folder: Path) -> Row:
    """The row as it is read from a file in `folder`, with its pictures' paths relative to the working folder."""

    def place(picture: Any) -> Any:
        path = os.path.normpath(folder / picture) if isinstance(picture, str) else ""
        return path if Path(path).is_file() else picture

    return _with_pictures(row, place)


def kept(row: Row, folder: Path) -> Row:
    """The row as it is written to a file in `folder`: its pictures as paths from there, those that are no files yet
    written to PICTURES in it.

    Raises:
        DataSelectionError: a picture cannot be read.
    """

    def place(picture: Any) -> Any:
        if isinstance(picture, str) and Path(picture).is_file():
            return os.path.relpath(picture, folder)
        return os.path.relpath(_written(picture, folder), folder) if _is_picture(picture) else picture

    return _with_pictures(row, place)


def as_paths(row: Row, folder: Path) -> Row:
    """The row as it is used: pictures that are no files are written to PICTURES in `folder`."""
    return located(kept(row, folder), folder)


def _with_pictures(row: Row, place: Callable[[Any], Any]) -> Row:
    if not images_of(row):
        return row
    key = "images" if row.get("images") is not None else "image"
    value = row[key]
    return {**row, key: [place(one) for one in value] if isinstance(value, list | tuple) else place(value)}


def _is_picture(value: Any) -> bool:
    """An image of PIL, as `datasets` reads them, or the bytes of one, as parquet files hold them."""
    held = isinstance(value, dict) and isinstance(value.get("bytes"), bytes)
    return held or type(value).__module__.startswith("PIL.")


def _written(picture: Any, folder: Path) -> Path:
    buffer = io.BytesIO()
    open_image(picture, "a row with a picture").convert("RGB").save(buffer, "PNG")
    path = folder / PICTURES / f"{hashlib.sha256(buffer.getvalue()).hexdigest()}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue())
    return path


# ---------------------------------------------------------------- training


class PictureCollator:
    """Turns lines of `picture_lines` into a batch: the model's inputs, and labels (B, T) that are -100 but for the
    answers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, lines: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [encode(self.processor, json.loads(line["row"]), "a row to train on") for line in lines]
        inputs, labels = collate(rows, self.processor.tokenizer.pad_token_id or 0)
        return {**inputs, "labels": labels}


def picture_lines(rows: Sequence[Row]) -> Dataset:
    """Rows as TRL's SFTTrainer takes them unread where its collator is ours: pictures become numbers batch by batch."""
    return Dataset.from_list([{"images": [], "row": json.dumps(row, default=str)} for row in rows])


def picture_training(rows: Sequence[Row], processor: Any) -> dict[str, Any]:
    """Arguments of SFTTrainer for rows of a model that reads pictures."""
    return {"train_dataset": picture_lines(rows), "data_collator": PictureCollator(processor)}


def is_processor(tokenizer: Any) -> bool:
    """Whether what `load_base` gave belongs to a model that reads pictures."""
    return isinstance(tokenizer, ProcessorMixin)


def fitting(rows: Sequence[Row], processor: Any, name: str, longest: int | None, aloud: bool) -> list[Row]:
    """The rows that have something to learn and, as pictures cannot be cut, no more than `longest` tokens.

    Raises:
        RunError: none is left.
        DataSelectionError: a row cannot be read.
    """
    kept_rows = []
    for number, row in enumerate(rows, start=1):
        found = encode(processor, row, f"row {number}")
        if found.answers and (longest is None or len(found) <= longest):
            kept_rows.append(row)
    left_out = (
        f"{name}: {len(rows) - len(kept_rows)} of {len(rows)} rows do not fit in max_length {longest} with their "
        "pictures, or have nothing to learn"
    )
    if not kept_rows:
        raise RunError(f"{left_out}; give a larger max_length under trainer, or null")
    if len(kept_rows) < len(rows) and aloud:
        print(f"{left_out}, and are left out", file=sys.stderr)
    return kept_rows
