"""Overrides from the command line, `path.to.key=value`, put into a recipe as read."""

import copy
import difflib
import re
from collections.abc import Iterable
from typing import Any

import yaml

from .faults import Fault, RecipeError
from .names import numbered
from .yaml12 import MAX_DEPTH, Document, Path, kind_of, parse, shorten


def apply_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """A copy of the document with each `path.to.key=value` put in, in order; a later one wins.

    The value is a YAML 1.2 scalar or a flow value (`[1, 2]`, `{a: 1}`). A list item is picked by its number
    from 0, or, where the items are mappings with a `stage` key, by the name of the stage (`sft`, and a second `sft-2`).
    A mapping takes new
    keys, and missing mappings on the way are made: validation judges their names. Keys that contain a dot
    cannot be reached; give the mapping that holds them as a flow value.

    Raises RecipeError with the faults of all overrides.
    """
    data, marks, faults = copy.deepcopy(document.data), dict(document.marks), []
    for override in overrides:
        where = "override " + shorten(override)
        try:
            path, value = _override(override, where)
            path = _put(data, path, value, where)
        except RecipeError as error:
            faults += error.faults
            continue
        marks = {at: mark for at, mark in marks.items() if at[: len(path)] != path}
        # A mapping that the override had to make is its doing as well.
        marks |= {path[:n]: where for n in range(1, len(path) + 1) if path[:n] not in marks}
    if faults:
        raise RecipeError(faults)
    return Document(document.name, data, marks)


def _override(override: str, where: str) -> tuple[list[str], Any]:
    target, equals, text = override.partition("=")
    steps = target.strip().split(".")
    if not equals or not all(steps):
        raise _refused(where, "an override is written path.to.key=value")
    if len(steps) > MAX_DEPTH:
        raise _refused(where, f"a path has at most {MAX_DEPTH} steps, this one has {len(steps)}")
    root, value, _ = parse(text, lambda line, column: where)
    start, end = (root.start_mark.index, root.end_mark.index) if root else (0, 0)
    # A comment or a document marker would be dropped silently: `color=#fff` would become null.
    if text[:start].strip() or text[end:].strip():
        raise _refused(where, f"not all of {shorten(text)} is a value; put it in YAML quotes")
    if isinstance(root, yaml.CollectionNode) and not root.flow_style:
        raise _refused(where, f"{shorten(text)} must be written {{key: value}} or [item], or in quotes")
    return steps, value


def _put(data: Any, steps: list[str], value: Any, where: str) -> Path:
    """Set the value in place; returns the path in the data, with list items by number."""
    path: Path = ()
    for n, step in enumerate(steps):
        here = ".".join(steps[:n])
        last = n == len(steps) - 1
        key: Any = step
        if isinstance(data, list):
            key = _item(data, step, here, where)
        elif not isinstance(data, dict):
            kind = shorten(data) if isinstance(data, str) else kind_of(data)
            raise _refused(where, f"{here} is {kind} and has no key {shorten(step)}")
        elif not last and data.get(key) is None:
            data[key] = {}
        path = (*path, key)
        if last:
            data[key] = value
        else:
            data = data[key]
    return path


def _item(items: list[Any], step: str, here: str, where: str) -> int:
    """The number of the list item that a step of an override names."""
    stages = {number: item.get("stage") for number, item in enumerate(items) if isinstance(item, dict)}
    stages = {number: kind for number, kind in stages.items() if isinstance(kind, str)}
    places = dict(zip(numbered(stages.values()), stages, strict=True))
    if step in places:
        return places[step]
    if re.fullmatch("[0-9]{1,9}", step) and int(step) < len(items):
        return int(step)
    count = f"{here} has {len(items)} items, numbered from 0" if items else f"{here} is an empty list"
    names = list(places)
    if re.fullmatch("[-+]?[0-9]+", step) or not names:
        raise _refused(where, f"no item {shorten(step)}: {count}")
    close = difflib.get_close_matches(step, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise _refused(where, f"no item {shorten(step)}: {count}, with the stages {', '.join(names)}{hint}")


def _refused(where: str, message: str) -> RecipeError:
    return RecipeError([Fault(where, message)])
