"""Rows as token numbers and answer labels, and batches of them.

The answer is what fine-tuning would train on: the completion of a prompt, the turns of the assistant, or all of a text.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .texts import DataSelectionError

IGNORED = -100
# What processors return beside token numbers; a row may bring them ready-made.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "mm_token_type_ids")
# Of these with so many axes the second counts the images or tiles of a row.
TILED = {("pixel_values", 5), ("pixel_attention_mask", 4)}
# The numbers of tokens that stand for an image or its borders, in the config of a model.
IMAGE_TOKENS = (
    "image_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
)
# Those that only a processor knows: an image of SmolVLM stands between borders and is cut into named tiles.
TILE_TOKENS = ("fake_image_token_id", "global_image_token_id", "row_col_ids")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row.

    Args:
        input_ids: (T,) int64.
        labels: (T,) int64: the token where it belongs to the answer, else -100.
        images: what the model takes beside tokens, as a processor returns it for a batch of one.
        compact: tokens and labels of the row with one token for an image, before a processor made many of it; None for
            a row that came as tokens.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    compact: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def answers(self) -> int:
        """How many answer tokens a model predicts; the first token of a row has nothing before it."""
        return int((self.labels[1:] != IGNORED).sum())


def encode(tokenizer: Any, row: Any, where: str, max_length: int | None = None) -> Encoded:
    """One row as tokens and labels.

    - A string or `text`: all of it is the answer, and ends with the end-of-text token.
    - `prompt` and `completion`, both strings (the end-of-text token is added) or both lists of messages: the
      completion is the answer. It starts where the tokens of the prompt alone and of both together part ways.
    - `messages`: the turns of the assistant are the answer: what each turn adds to the turns before it.
    - `input_ids`, with `labels`, or with `completion_mask` or `assistant_masks`; without them all is answer.
    - `images` (or `image`) beside any of the first three, where `tokenizer` is a processor: PIL images, paths, or
      mappings with `bytes` or a `path`, as parquet files hold them. The text holds the processor's mark of an image as
      often as there are images, anywhere but inside an answer, and of a `text` all but images is answer. Where no
      message says where the images stand, that is before the first turn of the user. Beside `input_ids`, what the
      model takes (`pixel_values`, ...).

    Args:
        tokenizer: a tokenizer, or for rows with images a processor.
        row: as above.
        where: names the row in error messages.
        max_length: tokens to keep, from the start.

    Raises:
        DataSelectionError: the row is of no such form, the chat template is missing or rewrites earlier turns, an image
            cannot be read or has no place in the text, or a row with images is longer than `max_length`.
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, Mapping):
        raise DataSelectionError(f"{where}: {row!r} is a {type(row).__name__}; give strings or rows (mappings)")
    if row.get("input_ids") is not None:
        encoded = _ready_made(row, where, len(getattr(tokenizer, "tokenizer", tokenizer)))
    else:
        encoded = _from_text(tokenizer, row, where)
    if max_length is None or len(encoded) <= max_length:
        return encoded
    if encoded.images:
        raise DataSelectionError(
            f"{where}: {len(encoded)} tokens with images, and max_length={max_length} would cut images apart; raise "
            "max_length or leave the row out"
        )
    return Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length])


def prompt_tokens(tokenizer: Any, row: Any, where: str) -> list[int]:
    """The tokens of a row's `prompt`, a string or a list of messages, up to where its answer begins.

    Raises:
        DataSelectionError: the row has no prompt, or the chat template cannot render it.
    """
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    words = getattr(tokenizer, "tokenizer", tokenizer)
    if isinstance(prompt, str) and prompt:
        return words(prompt)["input_ids"]
    if isinstance(prompt, (list, tuple)) and prompt:
        return words(_rendered(tokenizer, list(prompt), True, where), add_special_tokens=False)["input_ids"]
    raise DataSelectionError(f"{where}: {row!r:.80} has no 'prompt', a text or a list of messages, to answer")


def without_images(row: Encoded, image_tokens: Sequence[int]) -> Encoded:
    """The row as a model without eyes reads it: the tokens that stand for images are removed, not blanked.

    Args:
        row: any.
        image_tokens: as of the function. Line breaks between the tiles of an image, which a few processors add, are
            removed too, but for rows that came as tokens.
    """
    ids, labels = row.compact or (row.input_ids, row.labels)
    kept = ~torch.isin(ids, torch.tensor(list(image_tokens), dtype=torch.int64))
    return Encoded(ids[kept], labels[kept])


def image_tokens(model: Any, processor: Any = None) -> list[int]:
    """The numbers of the tokens that stand for an image, its borders or its tiles; none for a model without images."""
    found = [number for name in IMAGE_TOKENS if isinstance(number := getattr(model.config, name, None), int)]
    words = getattr(processor, "tokenizer", None)
    if not found or words is None:
        return found
    for name in TILE_TOKENS:
        numbers = getattr(processor, name, None) or []
        found += numbers if isinstance(numbers, list) else [numbers]
    # A processor gives tiles that its tokenizer has no token for the number of the unknown token.
    return sorted({number for number in found if number not in (None, words.unk_token_id)})


def collate(rows: Sequence[Encoded], pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch, padded on the right: the model's inputs and the labels (B, T).

    Raises:
        DataSelectionError: the rows' images do not fit in one tensor.
    """
    length = max(len(row) for row in rows)
    inputs = {
        "input_ids": torch.stack([_padded(row.input_ids, length, pad) for row in rows]),
        "attention_mask": torch.stack([_padded(torch.ones_like(row.input_ids), length, 0) for row in rows]),
    }
    for name in dict.fromkeys(name for row in rows for name in row.images):
        parts = _same_tiles([row.images[name] for row in rows if name in row.images], name)
        if name == "mm_token_type_ids":
            types = [row.images.get(name, torch.zeros(len(row), dtype=torch.int64)).flatten() for row in rows]
            inputs[name] = torch.stack([_padded(part, length, 0) for part in types])
        elif len({part.shape[1:] for part in parts}) > 1:
            shapes = sorted({tuple(part.shape) for part in parts})
            raise DataSelectionError(f"{name} of shapes {shapes} do not go in one batch; use batch_size=1")
        else:
            inputs[name] = torch.cat(parts)
    return inputs, torch.stack([_padded(row.labels, length, IGNORED) for row in rows])


def _same_tiles(parts: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    """Images or tiles of a row on an axis of its own (SmolVLM, LLaVA-NeXT): rows with fewer get images of zeros, which
    these models leave out; others as they are."""
    if (name, parts[0].ndim) not in TILED:
        return parts
    most = max(part.shape[1] for part in parts)
    return [torch.cat([part, part.new_zeros(len(part), most - part.shape[1], *part.shape[2:])], 1) for part in parts]


def image_signature(row: Encoded) -> list[tuple[str, tuple[int, ...]]]:
    """What two rows must share for their images to go in one batch."""
    shapes = []
    for name, value in sorted(row.images.items()):
        if name != "mm_token_type_ids":
            shapes.append((name, tuple(value.shape[2 if (name, value.ndim) in TILED else 1 :])))
    return shapes


def _padded(values: torch.Tensor, length: int, filler: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, length - len(values)), value=filler)


def _ready_made(row: Mapping[str, Any], where: str, vocabulary: int) -> Encoded:
    ids = _numbers(row, "input_ids", where)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise DataSelectionError(
            f"{where}: input_ids run from {int(ids.min())} to {int(ids.max())}, and the tokenizer has {vocabulary} "
            "tokens; give those of this model's tokenizer"
        )
    if row.get("labels") is not None:
        labels = _numbers(row, "labels", where)
    else:
        labels = ids
        for mask in ("completion_mask", "assistant_masks"):
            if row.get(mask) is not None:
                kept = torch.as_tensor(row[mask], dtype=torch.bool)
                if kept.shape != ids.shape:
                    raise DataSelectionError(f"{where}: {mask} has {len(kept)} entries for {len(ids)} input_ids")
                labels = torch.where(kept, labels, IGNORED)
    if labels.shape != ids.shape:
        raise DataSelectionError(f"{where}: input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must be (T,)")
    images = {name: torch.as_tensor(row[name]) for name in IMAGE_INPUTS if row.get(name) is not None}
    return Encoded(ids, labels, images)


def _numbers(row: Mapping[str, Any], column: str, where: str) -> torch.Tensor:
    """(T,) a column of token numbers."""
    try:
        values = torch.as_tensor(row[column])
    except (ValueError, TypeError, RuntimeError):
        values = None
    if values is None or values.ndim != 1 or len(values) and (values.is_floating_point() or values.is_complex()):
        raise DataSelectionError(f"{where}: {column} is {row[column]!r:.80}; give one flat list of token numbers")
    return values.long()


def _from_text(tokenizer: Any, row: Mapping[str, Any], where: str) -> Encoded:
    images = images_of(row)
    words = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer
    if images and words is tokenizer:
        raise DataSelectionError(f"{where} has images; give score_samples the model's processor as tokenizer")
    if words is not tokenizer:
        row = _in_parts(row, len(images))
    whole, spans, special = _whole_and_spans(tokenizer, words, row, where)
    tokens = words(whole, add_special_tokens=special)["input_ids"]
    labels = [IGNORED] * len(tokens)
    for before, upto in spans:
        start = _shared(words(before, add_special_tokens=special)["input_ids"], tokens) if before else 0
        end = len(tokens) if upto == whole else _shared(words(upto, add_special_tokens=special)["input_ids"], tokens)
        labels[start:end] = tokens[start:end]
    image = getattr(tokenizer, "image_token_id", None)
    if not images:
        if image is not None and image in tokens:
            raise DataSelectionError(f"{where}: the text has a place for an image, and 'images' is empty; fill it")
        return Encoded(torch.tensor(tokens, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))
    if isinstance(row.get("text"), str):  # all of it is read as answer, but for the images
        labels = [IGNORED if token == image else label for token, label in zip(tokens, labels, strict=True)]
    return _with_images(tokenizer, whole, images, special, tokens, labels, where)


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """What stands under `images` or `image`, as a list."""
    images = row.get("images") if row.get("images") is not None else row.get("image")
    return list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]


def open_image(image: Any, where: str) -> Any:
    """A PIL image of a path or of a mapping with `bytes` or a `path`; anything else as it is.

    Raises:
        DataSelectionError: there is no such file, or it is no image.
    """
    held = image
    if isinstance(image, Mapping):
        held = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if not isinstance(held, (str, os.PathLike, io.BytesIO)):
        return image
    from PIL import Image

    try:
        with Image.open(held) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError) as error:
        name = "the bytes" if isinstance(held, io.BytesIO) else repr(str(held))
        raise DataSelectionError(f"{where}: {name} cannot be read as an image: {error}") from error


def _in_parts(row: Mapping[str, Any], images: int) -> Mapping[str, Any]:
    """The row with its messages' contents as lists of parts, as the templates of processors read them, and among them
    one for each image."""
    columns = [name for name in ("prompt", "completion", "messages") if isinstance(row.get(name), (list, tuple))]
    if not all(isinstance(message, Mapping) for name in columns for message in row[name]):
        return row  # which is said where it is rendered
    turns = {name: [_parts_of(message) for message in row[name]] for name in columns}
    every = [message for name in columns for message in turns[name]]
    placed = any(part.get("type") == "image" for message in every for part in message["content"])
    asker = next((message for message in every if message.get("role") == "user"), None)
    if images and not placed and asker is not None:
        asker["content"] = [{"type": "image"}] * images + asker["content"]
    return {**row, **turns}


def _parts_of(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content") or []
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else list(content)}


def _with_images(
    processor: Any, whole: str, images: Sequence[Any], special: bool, tokens: list[int], labels: list[int], where: str
) -> Encoded:
    """Each image grows to many tokens, and the answers behind it move on by as many."""

    def processed(text: str, shown: Sequence[Any], special: bool) -> Any:
        try:
            return processor(text=[text], images=list(shown), add_special_tokens=special, return_tensors="pt")
        except Exception as error:  # processors raise what they like where texts and images do not match
            raise DataSelectionError(f"{where}: the processor refuses the row with its images: {error}") from error

    opened = [open_image(image, where) for image in images]
    batch = processed(whole, opened, special)
    ids = batch["input_ids"][0]
    answers = [i for i, label in enumerate(labels) if label != IGNORED]
    places = [i for i, token in enumerate(tokens) if token == processor.image_token_id]
    if any(labels[place] != IGNORED for place in places):
        raise DataSelectionError(f"{where}: an image stands inside an answer; images must come before it")
    moved = np.full(len(answers), len(ids) - len(tokens))
    if answers and len(places) == len(images) and places[-1] > answers[0]:
        alone = (processed(processor.image_token, [image], False) for image in opened)
        grown = [len(one["input_ids"][0]) - 1 for one in alone]
        moved = np.array([sum(by for place, by in zip(places, grown, strict=True) if place < i) for i in answers])
    targets = torch.from_numpy(np.array(answers, np.int64) + moved)
    wanted = torch.tensor([labels[i] for i in answers], dtype=torch.int64)
    inside = bool(((targets >= 0) & (targets < len(ids))).all())
    if not inside or not torch.equal(ids[targets], wanted):
        raise DataSelectionError(f"{where}: the answer cannot be found behind its images; images must come before it")
    moved_labels = torch.full_like(ids, IGNORED)
    moved_labels[targets] = wanted
    compact = (torch.tensor(tokens, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))
    return Encoded(ids, moved_labels, {name: batch[name] for name in IMAGE_INPUTS if name in batch}, compact)


def _whole_and_spans(
    tokenizer: Any, words: Any, row: Mapping[str, Any], where: str
) -> tuple[str, list[tuple[str, str]], bool]:
    """The text of a row; for each answer the text before it and the text up to its end; and whether the tokenizer is to
    add its own special tokens, which a chat template writes itself."""
    end = words.eos_token or ""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("text"), str):
        whole = row["text"] + end
        return whole, [("", whole)], True
    if isinstance(prompt, str) and isinstance(completion, str):
        whole = prompt + completion + end
        return whole, [(prompt, whole)], True
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        messages = [*prompt, *completion]
        whole = _rendered(tokenizer, messages, False, where)
        return whole, [(_rendered(tokenizer, list(prompt), True, where), whole)], False
    messages = row.get("messages")
    if not isinstance(messages, (list, tuple)):
        raise DataSelectionError(
            f"{where}: no row to score in the columns {list(row)}; give 'text', 'messages', 'prompt' and 'completion' "
            "(two strings or two lists of messages), or 'input_ids'"
        )
    messages = list(messages)
    whole, spans = _rendered(tokenizer, messages, False, where), []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        upto = _rendered(tokenizer, messages[: i + 1], False, where)
        if not whole.startswith(upto.rstrip()):
            raise DataSelectionError(
                f"{where}: the chat template rewrites turn {i} once later turns follow, so its answer tokens cannot be "
                "told apart; give one row an answer, as 'prompt' and 'completion'"
            )
        spans.append((_rendered(tokenizer, messages[:i], True, where), upto))
    return whole, spans, False


def _rendered(tokenizer: Any, messages: list[Any], ask: bool, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises what it likes: ValueError, jinja2's errors, KeyError
        raise DataSelectionError(f"{where}: the chat template cannot render the row: {error}") from error


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    for i, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return i
    return min(len(first), len(second))
