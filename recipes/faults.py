"""What is wrong with a recipe, in words for the person who wrote it, each with the place in the file.

`RecipeError` carries all of them at once. `faults_from_validation` turns pydantic's complaints into such sentences.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .masking import hidden, hide
from .model_walk import (
    Path,
    Spot,
    choices_of,
    description_of,
    fields_below,
    inner_types,
    keys_of,
    options_of,
    origin_of,
    walk,
)

if TYPE_CHECKING:
    from .yaml12 import Document


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: `where` is "file:line:column", "override 'key=value'" or "recipe"."""

    where: str
    message: str

    def __str__(self) -> str:
        return hide(f"{self.where}: {self.message}")

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


def faults_from_validation(error: ValidationError, document: "Document", model: type[BaseModel]) -> list[Fault]:
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
        if finding.alone and len(rivals) == 1 and finding.path not in deeper:
            finding = _Finding(finding.path, finding.alone)
        elif finding.wrong and finding.labelled:
            if finding.path in deeper or not all(rival.wrong for rival in rivals):
                continue  # another member of the union takes such a value, and says what is wrong in it
            names = dict.fromkeys(rival.wrong for rival in rivals)
            if "a number" in names:
                names.pop("a whole number", None)
            wrong = " or ".join(names)
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
    alone: str = ""  # the sentence where no other member of the union complains

    def sentence(self) -> str:
        return f"{self.text} is not {self.wrong}{self.hint}" if self.wrong else self.text


def _finding(item: ErrorDetails, model: type[BaseModel], data: Any) -> _Finding:
    kind, loc, value, context = item["type"], item["loc"], item["input"], item.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        spot, key = walk(model, data, loc[:-1]), loc[-1]
        return _Finding((*spot.path, key), f"unknown key {key!r}" + _unknown_key(spot, str(key)))
    if kind == "missing":
        spot = walk(model, data, loc[:-1])
        return _Finding(spot.path, _missing(spot, loc[-1]), labelled=spot.labelled)
    spot = walk(model, data, loc)
    shown = f"{_name(spot.path)}: {_show(value)}"
    if kind == "union_tag_not_found":
        return _Finding(spot.path, _missing_tag(spot, _unquoted(context["discriminator"])[0]))
    if kind == "union_tag_invalid":
        key, tag = _unquoted(context["discriminator"])[0], str(context["tag"])
        path = (*spot.path, key) if isinstance(spot.value, dict) and key in spot.value else spot.path
        allowed = _unquoted(context["expected_tags"])
        return _Finding(path, f"{key} {_show(tag)} is unknown" + _allowed(tag, allowed))
    if kind in ("literal_error", "enum"):
        allowed = choices_of(spot.options) or _unquoted(context["expected"])
        if spot.labelled:
            alone = f"{shown} is unknown" + _allowed(value, allowed)
            return _Finding(spot.path, shown, wrong=_one_of(allowed), labelled=True, alone=alone)
        return _Finding(spot.path, f"{shown} is unknown" + _allowed(value, allowed))
    for start, wrong in _WRONG.items():
        if kind.startswith(start):
            quotes = wrong == "text" and isinstance(value, int | float)
            hint = "; put it in quotes" if quotes else ""
            return _Finding(spot.path, shown, wrong, spot.labelled, hint)
    return _Finding(spot.path, _other(spot, item["msg"], value), labelled=spot.labelled)


def _missing(spot: Spot, key: str | int) -> str:
    if isinstance(key, int):
        return f"{_name(spot.path)}: item {key} is missing"
    options = inner_types(spot.options, key) or []
    description = next((text for o in spot.options if (text := description_of(o, key))), "")
    what = description or " or ".join(dict.fromkeys(word for option in options if (word := _word(option))))
    return f"missing key {key!r}" + (f" ({what})" if what else "")


def _missing_tag(spot: Spot, key: str) -> str:
    choices = [choice for option in spot.options for choice in choices_of(options_of(keys_of(option).get(key)))]
    given = spot.value if isinstance(spot.value, dict) else {}
    close = difflib.get_close_matches(key, given, 1)
    hint = f"; is {close[0]!r} meant to be {key!r}?" if close else ""
    return f"missing key {key!r}" + (f" ({_one_of(choices)})" if choices else "") + hint


def _other(spot: Spot, message: str, value: Any) -> str:
    message = re.sub(r"^(Value error|Assertion failed), ", "", message)
    message = re.sub(r"^[A-Z][a-z]+ should ", "must ", message)
    shown = _show(value)
    # A check of a whole mapping names what it means; the mapping itself would only be noise.
    got = "" if isinstance(value, dict) or shown in message else f", got {shown}"
    return f"{_name(spot.path)}: {message}{got}"


def _unknown_key(spot: Spot, key: str) -> str:
    """What to do: a name almost equal goes before the same name elsewhere, and that before a similar one."""
    known = list(dict.fromkeys(name for option in spot.options for name in keys_of(option)))
    if key in known:
        return "; it does not go together with the other keys here"  # a member of the union that was not chosen has it
    own = difflib.get_close_matches(key, known, 1)
    near = difflib.get_close_matches(key, known, 1, cutoff=0.85)
    home = "" if near else _home(spot, key)
    if home:
        return home
    if own:
        return f"; did you mean {own[0]!r}?"
    below = {".".join(path): path[-1] for path in fields_below(spot.options) if len(path) > 1}
    for path, name in below.items():
        if difflib.get_close_matches(key, [name], 1, cutoff=0.8):
            return f"; did you mean {path!r}?"
    return f"; allowed: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def _home(spot: Spot, key: str) -> str:
    """Where else in the recipe the key is allowed: below, in another member of the union, or around."""
    for path in fields_below(spot.options):
        if len(path) > 1 and path[-1] == key:
            return f"; it belongs under {_dotted(path[:-1])}"
    for other in spot.others:
        tags = {name: choices_of(options_of(kind)) for name, kind in keys_of(other).items() if name in spot.value}
        tag = next((name for name, choices in tags.items() if choices), "")
        if key in keys_of(other) and tag:
            return f"; it is a key of {tag} {_one_of(tags[tag])}"
    for around, options in reversed(spot.parents):
        if any(key in keys_of(option) for option in options):
            return f"; it belongs in {_dotted(around)}" if around else "; it belongs at the top level"
        for path in fields_below(options):
            # The branch that leads back to the mapping at hand was searched already.
            if path[-1] == key and path[0].removesuffix("[]") != spot.path[len(around)]:
                return f"; it belongs under {_dotted((*around, *path[:-1]))}"
    return ""


# ---------------------------------------------------------------- words


def _allowed(value: Any, allowed: Iterable[Any]) -> str:
    names = [choice for choice in allowed if isinstance(choice, str)]
    close = difflib.get_close_matches(str(value), names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"; allowed: {', '.join(map(_show, allowed))}{hint}"


def _one_of(choices: list[Any]) -> str:
    return ("one of " if len(choices) > 1 else "") + ", ".join(map(_show, choices))


def _word(option: Any) -> str:
    choices = choices_of([option])
    if choices:
        return _one_of(choices)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin = origin_of(option)
    if origin in words:
        return words[origin]
    if keys_of(option) or issubclass(origin, Mapping):
        return "a mapping"
    return "a list" if issubclass(origin, Collection) else ""


def _name(path: Path) -> str:
    """The last key of a path, with the numbers that follow it: `stages.1`."""
    start = max((n for n, segment in enumerate(path) if isinstance(segment, str)), default=0)
    return _dotted(path[start:]) or "the recipe"


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _show(value: Any) -> str:
    value = hidden(value)  # before it is cut, or a part of a key would be left
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unquoted(text: str) -> list[str]:
    """The names in pydantic's "'sft', 'rl' or 'verify'"."""
    return re.findall(r"'([^']*)'", text) or [text]
