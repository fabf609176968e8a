"""The configuration of a MoKA adapter."""

import re
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from .embedded import from_hub_id, to_hub_id
from .registration import moka_type

Shape = tuple[int, int]
Shapes = str | list[Shape]  # "balanced", "ladder", or (a_out, a_in) each


class AdapterError(ValueError):
    """A MoKA adapter or its base cannot be built as asked; the message says what to change."""


@dataclass
class MokaConfig(PeftConfig):
    """MoKA, a gated mixture of Kronecker products (arXiv 2508.03527): for each adapted linear layer

        delta W = alpha * sum_i softmax(g)_i  A_i (x) B_i,        i = 1..r

    with A_i uniform, B_i zero and g zero at the start, so that training begins at the base model and every product at
    weight alpha / r. The gates g are one static vector a layer: a trained adapter merges.

    The paper does not state initialisation, alpha or dropout; those here are this library's choice. Parameters are kept
    in float32 even where a trainer casts them to bfloat16, in which small steps are lost (in several processes by
    `keep_float32`); they compute in the dtype of the activations. `get_peft_model(..., autocast_adapter_dtype=False)`
    gives them the dtype of the base instead.

    Args:
        r: how many Kronecker products a layer. They differ in rank as their shapes do; r does not bound it.
        n_shapes: over how many shapes the products are spread, as evenly as r allows (paper: 5 shapes, r = 10).
        shapes: "balanced" (see `kronecker.balanced_shapes`), "ladder", which begins at LoRA's rank one and rises (see
            `ladder.py`), or a list of (a_out, a_in) used for every adapted layer; a_out must divide the layer's
            out_features and a_in its in_features.
        alpha: scale of the update; None stands for twice the layer's r on a ladder, as LoRA's usual lora_alpha = 2 r,
            and else for r, so that every product begins at weight 1.
        gate: "softmax", or "none" for the fixed weight 1 / r (the ablation).
        identity: None, or the factor that is fixed to the identity: "A" or "B" (MoKA_s, see `identity.py`). The trained
            factor starts at zero, and equal shapes add up to one product, so take n_shapes = r.
        dropout: dropout on the adapter's input.
        target_modules: names, a regular expression, or "all-linear"; None takes PEFT's choice for the architecture
            (q_proj and v_proj for most).
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: adapt only the layers of these indices.
        layers_pattern: name of the list of layers, where it is not a usual one.
        rank_pattern: r for modules whose name matches, e.g. {"down_proj": 4}.
        alpha_pattern: alpha for modules whose name matches.
        shapes_pattern: shapes for modules whose name matches, each as `shapes` takes them, e.g. {"down_proj": "ladder",
            "layers.0.self_attn.q_proj": [[24, 12]]}. The keys of the three patterns are regular expressions for the end
            of a module's dotted name, as in PEFT, and the first one that matches counts. A key of shapes_pattern
            must match some adapted module.
        modules_to_save: modules trained in full and saved with the adapter.
        bias: "none"; "moka_only" trains the biases of the adapted layers, "all" every bias of the model, and saves them
            with the adapter. Then only one adapter is allowed, and disabling it does not give the base's output again.
        init_weights: True as above: A within 1 / sqrt(in_features) on a ladder, as LoRA's, and else Kaiming-uniform
            (1 / sqrt(a_in)). False draws B as A, so that the adapter is not the identity (for tests). "nearest"
            points the A_i where the weight's own nearest Kronecker sum has them (Van Loan and Pitsianis, 1993), B zero:
            the update starts at zero and the base weight stays as it is, quantised or not.
        resolved_shapes: written by the tuner: the shapes in use for each (outputs, inputs, n_shapes), e.g.
            {"576x192:5": [[24, 12], ...]}, "576x192:5-ladder" on a ladder and "576x192:5-A" with an identity, and for
            each key of shapes_pattern, e.g. "576x192:5:q_proj". It is saved, so that a later version with another
            choice of balanced shapes loads today's adapters.

    Raises:
        AdapterError: a value is out of range; the message names it.
    """

    r: int = 10
    n_shapes: int = 5
    shapes: Shapes = "balanced"
    alpha: float | None = None
    gate: Literal["softmax", "none"] = "softmax"
    identity: Literal["A", "B"] | None = None
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    shapes_pattern: dict[str, Shapes] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "moka_only"] = "none"
    init_weights: bool | Literal["nearest"] = True
    resolved_shapes: dict[str, list[Shape]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = moka_type()
        if self.revision is None:
            self.base_model_name_or_path = from_hub_id(self.base_model_name_or_path)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        self._check()
        self.shapes_pattern = {  # JSON makes lists of the pairs
            key: shapes if isinstance(shapes, str) else [(o, i) for o, i in shapes]
            for key, shapes in self.shapes_pattern.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """As saved: the embedded base goes by its Hub id, as a folder of a cache means nothing elsewhere."""
        found = {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}
        return {**found, "base_model_name_or_path": to_hub_id(self.base_model_name_or_path)}

    def alpha_of(self, r: int, pattern: str | None = None) -> float:
        """The scale of a layer of r products where neither `alpha` nor `alpha_pattern` names one."""
        if self.alpha is not None:
            return float(self.alpha)
        return 2.0 * r if self.is_ladder(pattern) else float(r)

    def is_ladder(self, pattern: str | None = None) -> bool:
        """Whether the layers under a key of `shapes_pattern`, or under none, begin at LoRA's rank one."""
        return self.shapes_of(pattern) == "ladder" and self.identity is None

    def shapes_of(self, pattern: str | None = None) -> Shapes:
        """The shapes asked for by a key of `shapes_pattern`, or for layers that none of them matches."""
        return self.shapes if pattern is None else self.shapes_pattern[pattern]

    def _check(self) -> None:
        for name, value in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AdapterError(f"{name} must be a positive whole number of Kronecker products, got {value!r}")
        if not isinstance(self.n_shapes, int) or isinstance(self.n_shapes, bool) or self.n_shapes < 1:
            raise AdapterError(f"n_shapes must be a whole number of at least 1, got {self.n_shapes!r}")
        alphas = {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        for name, value in {**({} if self.alpha is None else {"alpha": self.alpha}), **alphas}.items():
            if not isinstance(value, (int, float)) or not 0.0 < value < inf:
                raise AdapterError(f"{name} must be a positive number, got {value!r}")
        if self.gate not in ("softmax", "none"):
            raise AdapterError(f"gate must be 'softmax' or 'none', got {self.gate!r}")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.identity not in (None, "A", "B"):
            raise AdapterError(f"identity must be None, 'A' or 'B', got {self.identity!r}")
        if self.bias not in ("none", "all", "moka_only"):
            raise AdapterError(f"bias must be 'none', 'all' or 'moka_only', got {self.bias!r}")
        if not isinstance(self.init_weights, bool) and self.init_weights != "nearest":
            raise AdapterError(f"init_weights must be True, False or 'nearest', got {self.init_weights!r}")
        if self.init_weights == "nearest" and self.identity is not None:
            raise AdapterError(
                "init_weights='nearest' sets the factors A, and identity leaves one factor only; use one of the two"
            )
        self._check_shapes("shapes", self.shapes)
        if not isinstance(self.shapes, str) and len(self.shapes) > self.r:
            n, r = len(self.shapes), self.r
            raise AdapterError(f"shapes lists {n} shapes, and r={r} products cannot fill them; raise r or list fewer")
        if not isinstance(self.shapes_pattern, dict):
            raise AdapterError(f"shapes_pattern must map patterns to shapes, got {self.shapes_pattern!r}")
        for key, shapes in self.shapes_pattern.items():
            self._check_shapes(f"shapes_pattern[{key!r}]", shapes)
            try:
                re.compile(key)
            except re.error as error:
                raise AdapterError(f"shapes_pattern: {key!r} is no regular expression: {error}") from None
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern is used with layers_to_transform, which is not set")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            if self.layers_to_transform is not None:
                raise AdapterError(
                    "layers_to_transform works with a list of target_modules, not with the regular expression "
                    f"{self.target_modules!r}; name the layers in the expression instead"
                )

    def _check_shapes(self, name: str, shapes: object) -> None:
        if shapes in ("balanced", "ladder"):
            return
        pairs = list(shapes) if isinstance(shapes, (list, tuple)) else []
        fit = [isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs]
        if not pairs or not all(fit) or not all(isinstance(n, int) and n > 0 for pair in pairs for n in pair):
            raise AdapterError(f"{name} must be 'ladder', 'balanced' or a list of (a_out, a_in) pairs, got {shapes!r}")


def pattern_of(patterns: dict[str, Any], name: str, module: str) -> str | None:
    """The pattern of a mapping that matches the end of the dotted name of a module, by PEFT's rule: the first one.

    Of several that say the same it is the first in the alphabet, as it is where the saved adapter is read: PEFT sorts.

    Raises:
        AdapterError: the first one there says something else.
    """
    found = [pattern for pattern in patterns if get_pattern_key([pattern], module) == pattern]
    if not found:
        return None
    first, sorted_first = found[0], min(found)
    if patterns[first] != patterns[sorted_first]:
        raise AdapterError(
            f"{module!r} matches {first!r} and {sorted_first!r} of {name}, which differ. The first one counts, and "
            "PEFT saves them in alphabetical order, so that the second one would count where the adapter is read; "
            "write them so that only one matches"
        )
    return sorted_first
