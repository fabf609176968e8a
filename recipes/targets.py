"""Which modules of the base an adapter would adapt, found out on a model without weights, in PEFT's own way."""

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists, inspect_matched_modules
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from ..adapters import AdapterError, MokaConfig
from ..adapters.base import resolve_model, takes_pictures
from ..adapters.layer import MokaLayer
from . import needs
from .schema_model import Adapter, BaseModelSection
from .training import moka_config

Size = tuple[int, int]


class ConfigError(AdapterError):
    """A model's configuration is none that a language model, or one that reads pictures, can be built from."""


@dataclass(frozen=True)
class Targets:
    """What an adapter adapts."""

    modules: dict[str, Size]  # dotted names, as the model has them, each with its outputs and inputs
    trainable: int  # parameters of the adapter
    parameters: int  # of the base
    shapes: dict[Size, list[Size]]  # of the factors A of a layer of such a size
    r: int

    @property
    def counts(self) -> dict[Size, int]:
        """How many layers there are of each size."""
        return dict(Counter(self.modules.values()))

    def lines(self) -> Iterator[str]:
        share = self.trainable / self.parameters
        yield f"{len(self.modules)} modules, {self.trainable:,} trainable parameters ({share:.2%} of the base's)"
        for (n_out, n_in), count in self.counts.items():
            products = (f"{o}x{i} (x) {n_out // o}x{n_in // i}" for o, i in self.shapes[n_out, n_in])
            yield f"  {count} of {n_out} x {n_in}: {', '.join(products)}"


def base_config(base: BaseModelSection) -> Any:
    """The model's configuration; None where it is on the Hub, and neither in the cache nor to be had.

    Raises:
        ConfigError: a folder holds a configuration that transformers cannot read.
    """
    source = resolve_model(base.model, base.revision)
    folder = Path(source).is_dir()
    try:
        return AutoConfig.from_pretrained(
            source,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            local_files_only=not folder and not needs.hub_answers(),
        )
    except (OSError, ValueError) as error:
        if not folder:
            return None
        reason = " ".join(str(error).split())
        raise ConfigError(f"model folder {source!r} has a config.json that cannot be used: {reason[:300]}") from error


def context_of(base: BaseModelSection) -> int | None:
    """Positions that the model was made for; None where it knows no bound, or its configuration is not to be had."""
    try:
        config = base_config(base)
    except ConfigError:
        return None
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def skeleton(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a configuration on the meta device: all its modules and no weights, in no time.

    Raises:
        ConfigError: there is no causal language model of such a configuration, nor one that reads pictures.
    """
    try:
        with torch.device("meta"):
            kind: Any = AutoModelForImageTextToText if takes_pictures(config) else AutoModelForCausalLM
            model = kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"no causal language model can be built from its config.json: {reason[:300]}") from error
    return model.requires_grad_(False)


def meta_model(base: BaseModelSection) -> Any:
    """The skeleton of the recipe's base; None where its configuration is not to be had.

    Raises:
        ConfigError: as of `base_config` and `skeleton`.
    """
    config = base_config(base)
    return None if config is None else skeleton(config, base.trust_remote_code)


def targets_of(base: BaseModelSection, adapter: Adapter) -> Targets | None:
    """What the adapter adapts in the recipe's base; None where the base's configuration is not to be had.

    Raises:
        AdapterError: as of `match`; a ConfigError for what is wrong with the base.
    """
    config = base_config(base)
    if config is None:
        return None
    return _targets_of(base.model_dump_json(), config.to_json_string(use_diff=False), adapter.model_dump_json())


@lru_cache(maxsize=16)
def _targets_of(base: str, config: str, adapter: str) -> Targets:
    """By the texts of the sections: `check`, `plan` and `run` ask the same several times. `config` is of the key
    alone, as the file that the base names may change."""
    return match(meta_model(BaseModelSection.model_validate_json(base)), Adapter.model_validate_json(adapter))


def match(model: Any, adapter: Adapter) -> Targets:
    """Put the adapter on a skeleton, which is changed by it.

    Raises:
        AdapterError: it adapts nothing, names a module that the model lacks or that cannot be adapted, or a layer's
            sizes have no factors.
    """
    parameters = sum(p.numel() for p in model.parameters())  # tied ones once
    names, linear = [name for name, _ in model.named_modules()], linear_names(model)
    for fault in unmatched(names, linear, adapter):
        raise AdapterError(fault)
    config = moka_config(adapter)
    try:
        tuned: Any = get_peft_model(model, config)
    except AdapterError:
        raise
    except ValueError as error:  # PEFT has no choice for the architecture, or all that matched was excluded
        raise AdapterError(f"{' '.join(str(error).split())} {_known(linear)}") from error
    matched = inspect_matched_modules(tuned.base_model)["matched"]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MokaLayer)}
    sizes = {name: (layers[name].out_features, layers[name].in_features) for name in matched}
    stacks = {sizes[name]: layers[name].stacks("default")[0] for name in matched}
    shapes = {size: [(a.shape[1], a.shape[2]) for a in some] for size, some in stacks.items()}
    trainable, _ = tuned.get_nb_trainable_parameters()
    found = Targets(sizes, trainable, parameters, shapes, config.r)
    if config.shapes == "balanced":
        _refuse_rank_one(found, layers)
    return found


def linear_names(model: Any) -> list[str]:
    """The linear layers that may be adapted."""
    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output
    ]


def unmatched(names: Sequence[str], linear: Sequence[str], adapter: Adapter) -> Iterator[str]:
    """The names, and the regular expressions, that no module of the model goes by."""
    for key in ("target_modules", "exclude_modules"):
        value = getattr(adapter, key)
        if value is None or value == "all-linear":
            continue
        for wanted in [value] if isinstance(value, str) else value:
            alone = MokaConfig(target_modules=wanted if isinstance(value, str) else [wanted])
            if not any(check_target_module_exists(alone, name) for name in names):
                yield f"{key}: {wanted!r} matches no module of the model; {_hint(wanted, value, names, linear)}"


def _hint(wanted: str, value: str | list[str], names: Sequence[str], linear: Sequence[str]) -> str:
    if isinstance(value, str) and any(name == value or name.endswith(f".{value}") for name in names):
        return f"a text is a regular expression over whole names, such as {linear[0]!r}; give a list: [{value}]"
    depth = wanted.count(".") + 1
    ends = dict.fromkeys(".".join(name.split(".")[-depth:]) for name in [*linear, *names])
    close = difflib.get_close_matches(wanted, ends, 1)
    return f"did you mean {close[0]!r}?" if close and not isinstance(value, str) else _known(linear)


def _known(linear: Sequence[str]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    return f"its linear ones are {', '.join(list(ends)[:20])}, each a name such as {linear[0]!r}" if linear else ""


def _refuse_rank_one(found: Targets, layers: dict[str, MokaLayer]) -> None:
    for (n_out, n_in), shapes in found.shapes.items():
        if all(min(o, i) * min(n_out // o, n_in // i) == 1 for o, i in shapes):
            name = next(
                name for name, layer in layers.items() if (layer.out_features, layer.in_features) == (n_out, n_in)
            )
            raise AdapterError(
                f"{name!r} has {n_out} outputs and {n_in} inputs, and these have no factors to make Kronecker products "
                f"of ({n_out} = {_factors(n_out)}, {n_in} = {_factors(n_in)}): all would be of rank one; take shapes: "
                "ladder, which begins there, or leave such layers out with exclude_modules"
            )


def _factors(number: int) -> str:
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return " * ".join(map(str, [*found, number] if number > 1 or not found else found))
