"""What a recipe may say of the base model and of its adapter."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..adapters.precision import budget_fault, levels_fault
from .schema_sources import Section

Shapes = (
    Literal["balanced", "ladder"]
    | Annotated[
        list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ]
)


class Precision(Section):
    """Bits for each transformer layer, by how important it is; see docs/mixed_precision.md."""

    scorer: Literal["lim", "zd", "nll"] = "nll"
    """lim: how much a layer changes its input; zd: how its weights are distributed; nll: the measured rise of the loss
    with this layer alone at the lowest level."""
    levels: list[Literal[16, 8, 4]] = [16, 8, 4]
    """Bits that a layer may have: 16 as loaded, 8 int8, 4 nf4."""
    avg_bits: float = Field(default=5.0, validate_default=True)
    """The most bits a weight on average over the linear weights of the transformer layers, without the scales."""
    tokens: int = Field(default=1024, ge=2)
    """Of the shipped prose, which lim and nll read."""

    @field_validator("levels")
    @classmethod
    def _several_levels(cls, levels: list[int]) -> list[int]:
        if fault := levels_fault(levels):
            raise ValueError(fault)
        return levels

    @field_validator("avg_bits")
    @classmethod
    def _within_the_levels(cls, avg_bits: float, info: ValidationInfo) -> float:
        levels = info.data.get("levels")  # missing where they are at fault themselves
        if levels is not None and (fault := budget_fault(levels, avg_bits)):
            raise ValueError(fault)
        return avg_bits


class BaseModelSection(Section):
    model: str = Field(min_length=1)
    """A Hub id, a folder, or smollm2-135m, the embedded model."""
    quantization: Literal["nf4", "fp4", "int8"] | None = "nf4"
    """Of the linear layers, by bitsandbytes; null for none, and with precision."""
    precision: Precision | None = None
    """In place of one quantization for all layers: how many bits they have on average, and which have more."""
    revision: str | None = None
    """Of a Hub model."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository brings along; allow has to list the model."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2...; null takes the choice of transformers."""
    dense_generation: bool = False
    """Generate on de-quantised, merged weights: several times faster, for 2 bytes a weight more memory."""

    @model_validator(mode="before")
    @classmethod
    def _precision_takes_the_place_of_quantization(cls, data: Any) -> Any:
        mixed = isinstance(data, dict) and data.get("precision") is not None
        return {"quantization": None, **data} if mixed else data

    @field_validator("precision")
    @classmethod
    def _one_of_both(cls, precision: Precision | None, info: ValidationInfo) -> Precision | None:
        if precision is not None and (given := info.data.get("quantization")) is not None:
            raise ValueError(
                f"precision takes the place of quantization, which is {given!r}: leave quantization out, or precision"
            )
        return precision


class Adapter(Section):
    method: Literal["moka"] = "moka"
    """MoKA, a gated mixture of Kronecker products (arXiv 2508.03527)."""
    r: int = Field(default=10, ge=1)
    """Kronecker products a layer."""
    n_shapes: int = Field(default=5, ge=1)
    """Over how many shapes they are spread."""
    shapes: Shapes = "balanced"
    """Those of fewest parameters, nearest to square, or from LoRA's rank one upwards, or a list of [a_out, a_in]."""
    shapes_pattern: dict[str, Shapes] = {}
    """Other shapes for modules whose name ends in a match of the key, a regular expression, e.g. down_proj: ladder."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update; null stands for 2 r on a ladder, and else for r."""
    gate: Literal["softmax", "none"] = "softmax"
    """Learned mixture weights, or none: 1 / r each."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input."""
    target_modules: str | list[str] | None = None
    """Names of the adapted modules, a regular expression, or all-linear; null takes PEFT's choice."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out."""
