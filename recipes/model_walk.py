"""Follow the `loc` of a pydantic error through the models: only they know which of its segments are keys, which
are tags of a union, and which names would have been allowed.
"""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Path = tuple[str | int, ...]


@dataclass
class Spot:
    """Where a `loc` leads: the path in the data, the value and the types allowed there."""

    path: Path
    value: Any
    options: list[Any]
    others: list[Any] = field(default_factory=list)  # members of a union that were not chosen here
    labelled: bool = False  # whether the loc named a member of a union here
    parents: list[tuple[Path, list[Any]]] = field(default_factory=list)  # outermost first, with their types


def walk(model: type[BaseModel], data: Any, loc: Iterable[str | int]) -> Spot:
    """Where `loc` leads in `data`, which failed to validate as `model`."""
    spot = Spot((), data, [model])
    for segment in loc:
        tags = spot.labelled and isinstance(spot.value, dict) and segment in spot.value.values()
        if len(spot.options) > 1 and (tags or not spot.labelled):
            # After a union comes the tag or the name of a member, never a key; after a union of unions two tags.
            members = [option for option in spot.options if _is_member(option, segment, spot.value)]
            spot.others = [option for option in spot.options if option not in members] if members else []
            spot.options, spot.labelled = members or spot.options, True
            continue
        inner, value = inner_types(spot.options, segment), _child(spot.value, segment)
        if inner is None and (value is None or any(keys_of(option) for option in spot.options)):
            continue  # the name of a validator or of an inner union
        parents = [*spot.parents, (spot.path, spot.options)]
        spot = Spot((*spot.path, segment), value, inner or [], parents=parents)
    return spot


def _child(value: Any, segment: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(segment)
    if isinstance(value, list) and isinstance(segment, int) and segment < len(value):
        return value[segment]
    return None


def _is_member(option: Any, label: str | int, value: Any) -> bool:
    if label == getattr(option, "__name__", None) or str(label).startswith(f"{origin_of(option).__name__}["):
        return True
    given = value if isinstance(value, dict) else {}
    literals = {key: choices_of(options_of(kind)) for key, kind in keys_of(option).items() if given.get(key) == label}
    return any(label in choices for choices in literals.values())


def options_of(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None; `Annotated` is taken off."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return options_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        members = [option for member in typing.get_args(annotation) for option in options_of(member)]
        return list(dict.fromkeys(members))
    return [] if annotation in (None, type(None), Any) else [annotation]


def origin_of(option: Any) -> Any:
    """The class behind a type such as `list[int]`; object for what is none, such as a Literal."""
    origin = typing.get_origin(option) or option
    return origin if isinstance(origin, type) else object


def keys_of(option: Any) -> Mapping[str, Any]:
    """The keys that a model or dataclass allows, with their annotations; empty for any other type."""
    if not isinstance(option, type):
        return {}
    if issubclass(option, BaseModel):
        return {_key(name, info): info.annotation for name, info in option.model_fields.items()}
    return typing.get_type_hints(option) if dataclasses.is_dataclass(option) else {}


def _key(name: str, info: FieldInfo) -> str:
    return info.validation_alias if isinstance(info.validation_alias, str) else name


def description_of(option: Any, key: str) -> str:
    """The first sentence of what a model says about one of its keys; "" where it says nothing."""
    if not (isinstance(option, type) and issubclass(option, BaseModel)):
        return ""
    found = [info.description for name, info in option.model_fields.items() if _key(name, info) == key]
    text = found[0] if found and found[0] else ""
    return " ".join(re.split(r"\.\s+(?=[A-Z])|\.$|\n\n", text.strip(), maxsplit=1)[0].split())


def inner_types(options: Iterable[Any], segment: str | int) -> list[Any] | None:
    """The types allowed one step further in; None where no option knows such a step."""
    found: list[Any] | None = None
    for option in options:
        keys, arguments, origin = keys_of(option), typing.get_args(option), origin_of(option)
        many = issubclass(origin, Collection) and not issubclass(origin, str | Mapping)
        if segment in keys:
            step = options_of(keys[str(segment)])
        elif isinstance(segment, str) and issubclass(origin, Mapping):
            step = options_of(arguments[1]) if len(arguments) == 2 else []
        elif isinstance(segment, int) and many:
            several = origin is tuple and len(arguments) > 1 and arguments[1] is not ...
            step = options_of(arguments[segment if several else 0]) if arguments else []
        else:
            continue
        found = [*(found or []), *(new for new in step if new not in (found or []))]
    return found


def fields_below(options: Iterable[Any], depth: int = 4) -> Iterator[tuple[str, ...]]:
    """The paths of all fields below, nearest first; `[]` after a name stands for the items of a list."""
    level = [((), option) for option in options]
    for _ in range(depth):
        deeper: list[tuple[tuple[str, ...], Any]] = []
        for path, option in level:
            for name, annotation in keys_of(option).items():
                yield (*path, name)
                for inner in options_of(annotation):
                    items = (inner_types([inner], 0) or []) if origin_of(inner) is list else []
                    deeper += [((*path, name + "[]"), item) for item in items] or [((*path, name), inner)]
        level = deeper


def choices_of(options: Iterable[Any]) -> list[Any]:
    """The values that literals and enums among the options allow."""
    choices: list[Any] = []
    for option in options:
        if typing.get_origin(option) is Literal:
            choices += typing.get_args(option)
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            choices += [member.value for member in option]
    return choices
