"""What scores belong to: short hashes of model, adapter, template and data, which tell one from another."""

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .encoding import images_of
from .texts import DataSelectionError, is_dataset

# Numbers of each weight of the base that are looked at; all of a 7 B model would take minutes.
SAMPLED = 256
# What a configuration says that does not change the numbers, or changes when an adapter is saved and loaded.
NOT_IN_KEY = {"inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "peft_version"}


def store_identity(model: Any, tokenizer: Any, rows: Sequence[Any], adapters: Sequence[str]) -> dict[str, Any]:
    """What every store belongs to: base, adapters, data and template. Arguments as of the functions below."""
    base, adapter = model_identity(model, adapters)
    return {
        "model": base,
        "model_name": str(model.config._name_or_path),
        "model_revision": getattr(model.config, "_commit_hash", None),
        "adapter": adapter,
        "data": data_identity(rows),
        "template": template_identity(tokenizer),
    }


def model_identity(model: Any, adapters: Sequence[str]) -> tuple[str, str]:
    """Hashes of the base and of some adapters; of the base a sample of every weight, of adapters all numbers.

    Args:
        model: a transformers model, or a `peft.PeftModel` around one.
        adapters: names of the adapters that are used; none for a model without.

    Returns:
        Two hexadecimal strings; "none" for no adapter.
    """
    base, adapter = hashlib.sha256(), hashlib.sha256()
    prefix = getattr(model.base_model, "prefix", None) if adapters else None
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        own = adapters and ("modules_to_save" in parts or (prefix and any(part.startswith(prefix) for part in parts)))
        if not own:
            # PEFT's names of a base weight hold its wrappers' names, which a model without adapter lacks.
            short = name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", "")
            _add(base, short, parameter, SAMPLED)
        elif any(f".{used}." in f"{name}." for used in adapters):
            _add(adapter, name, parameter, None)
    for used in adapters:
        settings = {k: v for k, v in model.peft_config[used].to_dict().items() if k not in NOT_IN_KEY}
        adapter.update(json.dumps(settings, sort_keys=True, default=_plain).encode())
    return base.hexdigest()[:16], adapter.hexdigest()[:16] if adapters else "none"


def _add(digest: Any, name: str, parameter: torch.Tensor, sample: int | None) -> None:
    values = parameter.detach().flatten()
    if sample is not None and len(values) > sample:
        values = values[:: len(values) // sample]
    digest.update(f"{name}\0{tuple(parameter.shape)}\0{parameter.dtype}\0".encode())
    digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())


def template_identity(tokenizer: Any) -> str:
    """A hash of how rows become tokens and pixels: the chat template, the tokens of a probe text, and the settings of a
    processor's images."""
    words = getattr(tokenizer, "tokenizer", tokenizer)
    probe = words("The 12 quick-brown foxes\n\tsaid: \u00fcber!")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    content = json.dumps([template, probe, len(words), words.eos_token], sort_keys=True, default=_plain)
    pixels = getattr(tokenizer, "image_processor", None)
    if pixels is not None:
        content += pixels.to_json_string()
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def data_identity(rows: Any) -> str:
    """A hash of a pool: of a Dataset its fingerprint, of a list its rows, and of images that they name by path the
    sizes of the files, since to read them all would take long."""
    digest = hashlib.sha256()
    if is_dataset(rows):
        digest.update(f"{rows._fingerprint}\0{len(rows)}".encode())
    else:
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode() + b"\n")
            for image in images_of(row) if isinstance(row, Mapping) else ():
                path = image.get("path") if isinstance(image, Mapping) and not image.get("bytes") else image
                if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
                    digest.update(f"{os.path.getsize(path)}\n".encode())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value that JSON has no form for, as one that it has and that says what is in it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if type(value).__module__.startswith("PIL."):
        return [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, (torch.dtype, torch.device)) or type(value).__module__.startswith(("peft.", "krontune.")):
        return str(value)
    raise DataSelectionError(f"{value!r} in a row is a {type(value).__name__}, which cannot be told from others; give "
                             "rows of plain values, images or arrays")  # fmt: skip
