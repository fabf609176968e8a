"""What is wrong with a recipe, in words for the person who wrote it, each with the place in the file.

`faults_from_validation` walks the pydantic models along the `loc` of every error, because only the models know
which segments are keys, which are tags of a union, and which names would have been allowed.
"""

import dataclasses
import difflib
import enum
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

from pydantic import BaseModel, ValidationError

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


def faults_from_validation(error: ValidationError, document: "Document", model: type[BaseModel]) -> list[Fault]:
    """Each error of `model.model_validate(document.data)` as a sentence with its place, in pydantic's order.

    Unknown keys get the nearest allowed name, or the place where the key would be allowed. The complaints of
    the members of a plain union (`int | list[int]`) about one value become one sentence.
    """
    findings = [_finding(item, _walk(model, document.data, item["loc"])) for item in error.errors(include_url=False)]
    faults = []
    for number, finding in enumerate(findings):
        union = finding.at.union
        if finding.wrong and union == finding.at.path:
            if any(_inside(other.at.path, union) for other in findings if other.at.union == union):
                continue  # another member of the union fits better, its fault lies deeper
            same = [n for n, other in enumerate(findings) if other.wrong and other.at.path == union]
            if number != same[0]:
                continue
            finding.wrong = " or ".join(dict.fromkeys(findings[n].wrong for n in same))
        faults.append(Fault(document.where(finding.place), finding.sentence()))
    return faults


# ---------------------------------------------------------------- following a loc through the models


@dataclass
class _At:
    """Where a `loc` leads: the path in the data, the types allowed there, and how one got there."""

    path: Path
    options: list[Any]
    owners: list[tuple[Path, list[Any]]]  # every mapping on the way, outermost first, with its types
    others: list[Any]  # members of the nearest union that were not chosen
    union: Path | None  # where the nearest union stands
    rest: list[str | int]  # last segments that no type knows: an unknown key


def _walk(model: type, data: Any, loc: Sequence[str | int]) -> _At:
    at = _At((), _options(model), [], [], None, [])
    chosen = True
    for segment in loc:
        if len(at.options) > 1 and not chosen:
            # In a union the next segment is always the tag or the name of the member.
            members = [option for option in at.options if _is_member(option, segment)]
            at.others = [option for option in at.options if option not in members]
            at.options, at.union, chosen = members or at.options, at.path, True
            continue
        if any(_keys(option) for option in at.options) and (not at.owners or at.owners[-1][0] != at.path):
            at.owners.append((at.path, at.options))
        inner = _inner(at.options, segment)
        if inner is None:
            at.rest.append(segment)
            continue
        at.path, at.options, chosen, at.rest = (*at.path, segment), inner, False, []
        at.union = at.union if _is_scalar_union(inner) else None
    if at.options and not at.rest and any(_keys(option) for option in at.options):
        at.owners.append((at.path, at.options))
    return at
