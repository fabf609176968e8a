"""`extends:` a recipe that takes another one over and changes some of its keys."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .faults import Fault, RecipeError
from .names import KINDS
from .yaml12 import Document, kind_of, read
from .yaml12 import Path as Place

KEY = "extends"
OWN = ("name", "description", "sweep", "hub")  # of each recipe: two would share a run folder, or a repository
WHOLE = ("raw", "target", "data")  # replaced as they stand: two kinds of source do not mix


class Node(NamedTuple):
    """A value of a recipe and where it was written; a mapping or a list holds nodes."""

    place: str
    value: Any


def inherited(document: Document, folder: Path | None, shipped_text: Callable[[str], str]) -> Document:
    """The document with what it extends put under it, and no `extends` left.

    Mappings are merged key by key, and `stages` stage by stage, the first sft with the first, the second with the
    second. Of a kind that the parent lacks, a stage is put where the kind belongs: dedup, select, sft, rl, verify; one
    more of a kind stands after the one that it follows here. All else is replaced. Every key keeps the place where it
    stands.

    folder: of the document's file, where its parent is looked for; None for a recipe that comes with krontune.

    Raises:
        RecipeError: a parent is missing, cannot be read, or comes back to a recipe that extends it.
    """
    if KEY not in document.data:
        return document
    found = _resolved(document, folder, shipped_text, (document.name,))
    marks: dict[Place, str] = {}
    return Document(document.name, _plain(found, (), marks), marks)


def _resolved(
    document: Document, folder: Path | None, shipped_text: Callable[[str], str], above: tuple[str, ...]
) -> Node:
    own = _tree(document, (), document.data)
    if KEY not in own.value:
        return own
    where, named = own.value.pop(KEY)
    if not isinstance(named, str) or not named:
        kind = "empty" if named == "" else kind_of(named)
        raise _refused(where, f"{KEY} is the file of a recipe or the name of a shipped one, not {kind}")
    file = None if folder is None else folder / named
    if file is not None and file.is_file():
        name, text, folder = str(file), file.read_bytes(), file.parent
    elif Path(named).suffix in (".yaml", ".yml") or len(Path(named).parts) > 1:
        raise _refused(where, f"{KEY} {named!r}: there is no such file (looked in {(folder or Path()).resolve()})")
    else:
        try:
            name, text, folder = f"{named}.yaml", shipped_text(named), None
        except RecipeError as error:
            raise _refused(where, f"{KEY} {named!r}: {error.faults[0].message}") from None
    if any(_same(name, other) for other in above):
        raise _refused(where, f"{KEY} goes in a circle: {' extends '.join((*above, name))}; take one of them out")
    parent = _resolved(read(text, name), folder, shipped_text, (*above, name))
    for key in OWN:
        parent.value.pop(key, None)
    return _merged(parent, own, ())


def _refused(where: str, message: str) -> RecipeError:
    return RecipeError([Fault(where, message)])


def _same(name: str, other: str) -> bool:
    return name == other or (Path(name).exists() and Path(other).exists() and Path(name).samefile(other))


def _merged(below: Node, over: Node, at: tuple[str, ...]) -> Node:
    if isinstance(below.value, dict) and isinstance(over.value, dict) and at[-1:] not in [(key,) for key in WHOLE]:
        both = {key: _merged(below.value[key], over.value[key], (*at, key)) for key in below.value if key in over.value}
        return Node(over.place, {**below.value, **over.value, **both})
    if at == ("stages",) and _are_stages(below) and _are_stages(over):
        found = list(below.value)
        free = list(below.value)  # not merged with any yet
        place = -1  # of the stage before
        for number, new in enumerate(over.value):
            old = next((one for one in free if _kind(one) == _kind(new)), None)
            if old is not None:
                free = [one for one in free if one is not old]
                place = next(spot for spot, one in enumerate(found) if one is old)
                found[place] = _merged(old, new, (*at, _kind(new)))
                continue
            later = [number for number, one in enumerate(found) if _rank(_kind(one)) > _rank(_kind(new))]
            if any(_kind(one) == _kind(new) for one in over.value[:number]):
                place += 1
            else:
                place = later[0] if later else len(found)
            found.insert(place, new)
        return Node(over.place, found)
    return over


def _are_stages(node: Node) -> bool:
    return isinstance(node.value, list) and all(
        isinstance(one.value, dict) and "stage" in one.value and isinstance(_kind(one), str) for one in node.value
    )


def _kind(stage: Node) -> Any:
    return stage.value["stage"].value


def _rank(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _tree(document: Document, at: Place, value: Any) -> Node:
    if isinstance(value, dict):
        value = {key: _tree(document, (*at, key), item) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_tree(document, (*at, number), item) for number, item in enumerate(value)]
    return Node(document.marks[at], value)


def _plain(node: Node, at: Place, marks: dict[Place, str]) -> Any:
    """The value without places, which go to `marks`."""
    marks[at] = node.place
    if isinstance(node.value, dict):
        return {key: _plain(item, (*at, key), marks) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(item, (*at, number), marks) for number, item in enumerate(node.value)]
    return node.value
