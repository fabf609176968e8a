"""What is wrong with a recipe, in words for the person who wrote it, each with the place in the file.

`faults_from_validation` walks the pydantic models along the `loc` of every error, because only the models
know which segments are keys, which are tags of a union, and which names would have been allowed.
"""

import dataclasses
import difflib
import enum
import json
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

if TYPE_CHECKING:
    from .yaml12 import Document

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `where` is "file:line:column", "override 'key=value'" or "recipe"."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"

    def order(self) -> tuple[int, str, int, int, str]:
        """Sorts the recipe as a whole first, then by file, line and column, then the overrides."""
        place = re.fullmatch(r"(.*):([0-9]+):([0-9]+)", self.where, re.DOTALL)
        if place:
            return 1, place[1], int(place[2]), int(place[3]), self.message
        return (2 if self.where.startswith("override") else 0), self.where, 0, 0, self.message


class RecipeError(ValueError):
    """A recipe cannot be used; `faults` holds all reasons found, in order of position and each once."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = sorted(set(faults), key=Fault.order)
        super().__init__("\n".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return RecipeError, (self.faults,)


def faults_from_validation(
    error: ValidationError, document: "Document", model: type[BaseModel]
) -> list[Fault]:
    """Each error of `model.model_validate(document.data)` as a sentence with its place, in pydantic's order.

    An unknown key gets the nearest allowed name, or the place where the key would be allowed. The complaints
    of the members of a union such as `int | list[int]` about one value become one sentence.
    """
    findings = [_finding(item, model, document.data) for item in error.errors(include_url=False)]
    deeper = {finding.path[:n] for finding in findings for n in range(len(finding.path))}
    members: dict[Path, list[_Finding]] = {}
    for finding in findings:
        if finding.labelled:
            members.setdefault(finding.path, []).append(finding)
    faults = []
    for finding in findings:
        rivals = members[finding.path] if finding.labelled else [finding]
        if finding.wrong and finding.labelled:
            if finding.path in deeper or not all(rival.wrong for rival in rivals):
                continue  # another member of the union takes such a value, and says what is wrong in it
            wrong = " or ".join(dict.fromkeys(rival.wrong for rival in rivals))
            finding = dataclasses.replace(finding, wrong=wrong, hint="")
        faults.append(Fault(document.where(finding.path), finding.sentence()))
    return list(dict.fromkeys(faults))


# ---------------------------------------------------------------- one error, one sentence

_WRONG = {  # the beginning of a pydantic error type -> what the value is not
    "int_": "a whole number",
    "float_": "a number",
    "decimal_type": "a number",
    "decimal_parsing": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "iterable_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
}


@dataclass(frozen=True)
class _Finding:
    path: Path  # in the data; for a missing key, that of the mapping that lacks it
    text: str
    wrong: str = ""  # for a value of the wrong type: what it should be
    labelled: bool = False  # whether a member of a union says it
    hint: str = ""

    def sentence(self) -> str:
        return f"{self.text} is not {self.wrong}{self.hint}" if self.wrong else self.text


def _finding(item: ErrorDetails, model: type[BaseModel], data: Any) -> _Finding:
    kind, loc, value, context = item["type"], item["loc"], item["input"], item.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        spot, key = _walk(model, data, loc[:-1]), loc[-1]
        return _Finding((*spot.path, key), f"unknown key {key!r}" + _unknown_key(spot, str(key)))
    if kind == "missing":
        spot = _walk(model, data, loc[:-1])
        return _Finding(spot.path, _missing(spot, loc[-1]), labelled=spot.labelled)
    spot = _walk(model, data, loc)
    shown = f"{_name(spot.path)}: {_show(value)}"
    if kind == "union_tag_not_found":
        return _Finding(spot.path, _missing_tag(spot, _unquoted(context["discriminator"])[0]))
    if kind == "union_tag_invalid":
        key, tag = _unquoted(context["discriminator"])[0], str(context["tag"])
        path = (*spot.path, key) if isinstance(spot.value, dict) and key in spot.value else spot.path
        allowed = _unquoted(context["expected_tags"])
        return _Finding(path, f"{key} {_show(tag)} is unknown" + _allowed(tag, allowed))
    if kind in ("literal_error", "enum"):
        allowed = _choices(spot.options) or _unquoted(context["expected"])
        if spot.labelled:
            return _Finding(spot.path, shown, wrong=_one_of(allowed), labelled=True)
        return _Finding(spot.path, f"{shown} is unknown" + _allowed(value, allowed))
    for start, wrong in _WRONG.items():
        if kind.startswith(start):
            quotes = wrong == "text" and isinstance(value, int | float)
            hint = "; put it in quotes" if quotes else ""
            return _Finding(spot.path, shown, wrong, spot.labelled, hint)
    return _Finding(spot.path, _other(spot, item["msg"], value), labelled=spot.labelled)


def _missing(spot: "_Spot", key: str | int) -> str:
    if isinstance(key, int):
        return f"{_name(spot.path)}: item {key} is missing"
    options = _inner(spot.options, key) or []
    description = next((text for o in spot.options if (text := _description(o, key))), "")
    what = description or " or ".join(dict.fromkeys(word for option in options if (word := _word(option))))
    return f"missing key {key!r}" + (f" ({what})" if what else "")


def _missing_tag(spot: "_Spot", key: str) -> str:
    choices = [choice for option in spot.options for choice in _choices(_options(_keys(option).get(key)))]
    given = spot.value if isinstance(spot.value, dict) else {}
    close = difflib.get_close_matches(key, given, 1)
    hint = f"; is {close[0]!r} meant to be {key!r}?" if close else ""
    return f"missing key {key!r}" + (f" ({_one_of(choices)})" if choices else "") + hint


def _other(spot: "_Spot", message: str, value: Any) -> str:
    message = re.sub(r"^(Value error|Assertion failed), ", "", message)
    message = re.sub(r"^[A-Z][a-z]+ should ", "must ", message)
    shown = _show(value)
    # A check of a whole mapping names what it means; the mapping itself would only be noise.
    got = "" if isinstance(value, dict) or shown in message else f", got {shown}"
    return f"{_name(spot.path)}: {message}{got}"


def _unknown_key(spot: "_Spot", key: str) -> str:
    """What to do: a name almost equal goes before the same name elsewhere, and that before a similar one."""
    known = list(dict.fromkeys(name for option in spot.options for name in _keys(option)))
    own = difflib.get_close_matches(key, known, 1)
    near = difflib.get_close_matches(key, known, 1, cutoff=0.85)
    home = "" if near else _home(spot, key)
    if home:
        return home
    if own:
        return f"; did you mean {own[0]!r}?"
    below = {".".join(path): path[-1] for path in _fields_below(spot.options) if len(path) > 1}
    for path, name in below.items():
        if difflib.get_close_matches(key, [name], 1, cutoff=0.8):
            return f"; did you mean {path!r}?"
    return f"; allowed: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def _home(spot: "_Spot", key: str) -> str:
    """Where else in the recipe the key is allowed: below, in another member of the union, or around."""
    for path in _fields_below(spot.options):
        if len(path) > 1 and path[-1] == key:
            return f"; it belongs under {_dotted(path[:-1])}"
    for other in spot.others:
        tags = {name: _choices(_options(kind)) for name, kind in _keys(other).items() if name in spot.value}
        tag = next((name for name, choices in tags.items() if choices), "")
        if key in _keys(other) and tag:
            return f"; it is a key of {tag} {_one_of(tags[tag])}"
    for around, options in reversed(spot.parents):
        if any(key in _keys(option) for option in options):
            return f"; it belongs in {_dotted(around)}" if around else "; it belongs at the top level"
        for path in _fields_below(options):
            # The branch that leads back to the mapping at hand was searched already.
            if path[-1] == key and path[0].removesuffix("[]") != spot.path[len(around)]:
                return f"; it belongs under {_dotted((*around, *path[:-1]))}"
    return ""


# ---------------------------------------------------------------- following a loc through the models


@dataclass
class _Spot:
    """Where a `loc` leads: the path in the data, the value and the types allowed there."""

    path: Path
    value: Any
    options: list[Any]
    others: list[Any] = field(default_factory=list)  # members of a union that were not chosen here
    labelled: bool = False  # whether the loc named a member of a union here
    parents: list[tuple[Path, list[Any]]] = field(default_factory=list)  # outermost first, with their types


def _walk(model: type[BaseModel], data: Any, loc: Iterable[str | int]) -> _Spot:
    spot = _Spot((), data, [model])
    for segment in loc:
        if len(spot.options) > 1 and not spot.labelled:
            # After a union comes the tag or the name of a member, never a key.
            members = [option for option in spot.options if _is_member(option, segment, spot.value)]
            spot.others = [option for option in spot.options if option not in members] if members else []
            spot.options, spot.labelled = members or spot.options, True
            continue
        inner, value = _inner(spot.options, segment), _child(spot.value, segment)
        if inner is None and (value is None or any(_keys(option) for option in spot.options)):
            continue  # the name of a validator or of an inner union
        parents = [*spot.parents, (spot.path, spot.options)]
        spot = _Spot((*spot.path, segment), value, inner or [], parents=parents)
    return spot


def _child(value: Any, segment: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(segment)
    if isinstance(value, list) and isinstance(segment, int) and segment < len(value):
        return value[segment]
    return None


def _is_member(option: Any, label: str | int, value: Any) -> bool:
    if label == getattr(option, "__name__", None) or str(label).startswith(f"{_origin(option).__name__}["):
        return True
    given = value if isinstance(value, dict) else {}
    literals = {
        key: _choices(_options(kind)) for key, kind in _keys(option).items() if given.get(key) == label
    }
    return any(label in choices for choices in literals.values())


def _options(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None; `Annotated` is taken off."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _options(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        members = [option for member in typing.get_args(annotation) for option in _options(member)]
        return list(dict.fromkeys(members))
    return [] if annotation in (None, type(None), Any) else [annotation]


def _origin(option: Any) -> Any:
    origin = typing.get_origin(option) or option
    return origin if isinstance(origin, type) else object


def _keys(option: Any) -> Mapping[str, Any]:
    """The keys that a model or dataclass allows, with their annotations; empty for any other type."""
    if not isinstance(option, type):
        return {}
    if issubclass(option, BaseModel):
        return {_key(name, info): info.annotation for name, info in option.model_fields.items()}
    return typing.get_type_hints(option) if dataclasses.is_dataclass(option) else {}


def _key(name: str, info: FieldInfo) -> str:
    return info.validation_alias if isinstance(info.validation_alias, str) else name


def _description(option: Any, key: str) -> str:
    if not (isinstance(option, type) and issubclass(option, BaseModel)):
        return ""
    found = [info.description for name, info in option.model_fields.items() if _key(name, info) == key]
    text = found[0] if found and found[0] else ""
    return " ".join(re.split(r"\.\s+(?=[A-Z])|\.$|\n\n", text.strip(), maxsplit=1)[0].split())


def _inner(options: Iterable[Any], segment: str | int) -> list[Any] | None:
    """The types allowed one step further in; None where no option knows such a step."""
    found: list[Any] | None = None
    for option in options:
        keys, arguments, origin = _keys(option), typing.get_args(option), _origin(option)
        many = issubclass(origin, Collection) and not issubclass(origin, str | Mapping)
        if segment in keys:
            step = _options(keys[str(segment)])
        elif isinstance(segment, str) and issubclass(origin, Mapping):
            step = _options(arguments[1]) if len(arguments) == 2 else []
        elif isinstance(segment, int) and many:
            several = origin is tuple and len(arguments) > 1 and arguments[1] is not ...
            step = _options(arguments[segment if several else 0]) if arguments else []
        else:
            continue
        found = [*(found or []), *(new for new in step if new not in (found or []))]
    return found


def _fields_below(options: Iterable[Any], depth: int = 4) -> Iterator[tuple[str, ...]]:
    """The paths of all fields below, nearest first; `[]` after a name stands for the items of a list."""
    level = [((), option) for option in options]
    for _ in range(depth):
        deeper: list[tuple[tuple[str, ...], Any]] = []
        for path, option in level:
            for name, annotation in _keys(option).items():
                yield (*path, name)
                for inner in _options(annotation):
                    items = (_inner([inner], 0) or []) if _origin(inner) is list else []
                    deeper += [((*path, name + "[]"), item) for item in items] or [((*path, name), inner)]
        level = deeper


# ---------------------------------------------------------------- words


def _choices(options: Iterable[Any]) -> list[Any]:
    choices: list[Any] = []
    for option in options:
        if typing.get_origin(option) is Literal:
            choices += typing.get_args(option)
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            choices += [member.value for member in option]
    return choices


def _allowed(value: Any, allowed: Iterable[Any]) -> str:
    names = [choice for choice in allowed if isinstance(choice, str)]
    close = difflib.get_close_matches(str(value), names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"; allowed: {', '.join(map(_show, allowed))}{hint}"


def _one_of(choices: list[Any]) -> str:
    return ("one of " if len(choices) > 1 else "") + ", ".join(map(_show, choices))


def _word(option: Any) -> str:
    choices = _choices([option])
    if choices:
        return _one_of(choices)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin = _origin(option)
    if origin in words:
        return words[origin]
    if _keys(option) or issubclass(origin, Mapping):
        return "a mapping"
    return "a list" if issubclass(origin, Collection) else ""


def _name(path: Path) -> str:
    """The last key of a path, with the numbers that follow it: `stages.1`."""
    start = max((n for n, segment in enumerate(path) if isinstance(segment, str)), default=0)
    return _dotted(path[start:]) or "the recipe"


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unquoted(text: str) -> list[str]:
    """The names in pydantic's "'sft', 'rl' or 'verify'"."""
    return re.findall(r"'([^']*)'", text) or [text]
