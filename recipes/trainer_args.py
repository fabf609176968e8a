"""The sections made of dataclasses, typed, without instantiating them: `trainer:` of every field of TRL's SFTConfig
and GRPOConfig, `credit:` and `risk:` of TokenCredit and Risk, `guard:` of Guarded's options.

The classes themselves cannot check a recipe: they start the accelerator, and stop at the first fault.
Values are taken as they stand: `max_steps: true` is not 1. A whole number is fine where a number is asked for.
"""

import dataclasses
import enum
import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from trl import GRPOConfig, SFTConfig

from ..rl import Guarded, Risk, TokenCredit

PREPARED = "krontune tokenises the rows: a text is learned whole, of a chat or a prompt and completion only the answer"

# What krontune decides from elsewhere in the recipe or from the machine, so that one setting has one place.
SET_BY_KRONTUNE = {
    "output_dir": "the run folder is given with --out",
    "seed": "the key 'seed' of the recipe sets it",
    "data_seed": "the key 'seed' of the recipe sets it",
    "use_cpu": "the machine decides: an accelerator is used where there is one",
    "disable_tqdm": "krontune prints its own progress line",
    "model_init_kwargs": "the section 'base' of the recipe says how the model is loaded",
    "push_to_hub": "nothing is pushed during training; hub: {repo: owner/name} pushes the run when it is done",
    "resume_from_checkpoint": "a stage that was cut goes on from its last checkpoint by itself",
    "remove_unused_columns": "krontune prepares the columns",
    "assistant_only_loss": PREPARED,
    "completion_only_loss": PREPARED,
    "dataset_text_field": PREPARED,
    "dataset_num_proc": PREPARED,
    "eos_token": PREPARED,
    "eval_strategy": "the verify stage measures; no data is held out during training",
    "load_best_model_at_end": "the verify stage measures; no data is held out during training",
}


def set_by_krontune(key: str) -> str | None:
    """Why a field of TRL's cannot be set under `trainer:`; None where it can, or is no field."""
    return SET_BY_KRONTUNE.get("push_to_hub" if key.startswith("hub_") else key)


def _section(name: str, config_class: Any, doc: str) -> type[BaseModel]:
    hints = get_type_hints(config_class)
    fields: dict[str, Any] = {
        f.name: (_plain(hints[f.name]), Field(None, description=f.metadata.get("help")))
        for f in dataclasses.fields(config_class)
        if f.init and not set_by_krontune(f.name)
    }
    config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    return create_model(name, __config__=config, __doc__=doc, **fields)


def _plain(hint: Any) -> Any:
    """The same type without classes that YAML cannot hold: enums are given by their value, objects not at all."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return str
    if get_origin(hint) in (Union, types.UnionType):
        members = [_plain(member) for member in get_args(hint)]
        return Union[tuple(m for m in members if m is not None)]  # noqa: UP007 - built at run time
    if get_origin(hint) in (list, tuple):  # YAML has lists alone
        return list[_plain(get_args(hint)[0])]
    if hint in (bool, int, float, str, type(None), Any) or get_origin(hint) is not None or hint in (dict, list):
        return hint
    return None


SftTrainerArgs = _section("SftTrainerArgs", SFTConfig, "Any field of trl.SFTConfig.")
GrpoTrainerArgs = _section("GrpoTrainerArgs", GRPOConfig, "Any field of trl.GRPOConfig.")
_Credit = _section("_Credit", TokenCredit, "Any field of krontune.rl.TokenCredit.")


class CreditArgs(_Credit):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
    """Any field of krontune.rl.TokenCredit, and a preset that the others change."""

    preset: Literal["v1", "v2"] = Field("v2", description="The settings of one version of arXiv 2510.13554.")


RiskArgs = _section("RiskArgs", Risk, "Any field of krontune.rl.Risk.")


def _options(name: str, function: Any, doc: str, left_out: tuple[str, ...]) -> type[BaseModel]:
    """A section of a function's arguments that have a default."""
    hints = get_type_hints(function)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    fields: dict[str, Any] = {n: (_plain(hints[n]), Field(None)) for n in names if n not in left_out}
    return create_model(name, __config__=ConfigDict(extra="forbid", frozen=True, strict=True), __doc__=doc, **fields)


GuardArgs = _options("GuardArgs", Guarded.__init__, "Options of krontune.rl.Guarded.", left_out=("failed",))


def given(section: BaseModel) -> dict[str, Any]:
    """The keys that the recipe states, as keyword arguments of the configuration class."""
    return section.model_dump(exclude_unset=True)


def value_of(section: BaseModel, key: str) -> Any:
    """What a field of a trainer section is: as given, else TRL's default."""
    config_class: Any = SFTConfig if isinstance(section, SftTrainerArgs) else GRPOConfig
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    return given(section).get(key, defaults[key])
