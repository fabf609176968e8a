"""Strict reading of recipe files: YAML 1.2 core values, and a line and column for everything.

PyYAML does the scanning and parsing; the values, the refusals and the positions are decided here.
What differs from `yaml.safe_load`, and why:

- scalars follow the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-5` is a number,
  `012` is 12, `0o17` is 15, and `on`, `off`, `yes`, `no`, `1_000` and dates stay text;
- a key that stands twice in one mapping is refused, because the first value would be lost silently;
- keys are text, tags beyond the core ones are refused, a file holds one document;
- the tree is capped, counted after aliases are expanded, so a short file cannot fill the memory.

Anchors, aliases and merge keys (`<<: *defaults`) work; merge keys come from YAML 1.1 and are kept because
recipes share trainer settings with them. A mapping's own keys win over merged ones.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.reader import Reader

from .faults import Fault, RecipeError
from .masking import hide
from .syntax_words import plain_words

MAX_NODES = 100_000
MAX_DEPTH = 64
MAX_DIGITS = 400

Path = tuple[str | int, ...]
Place = Callable[[int, int], str]


@dataclass(frozen=True)
class Document:
    """A recipe as read: plain mappings, lists and scalars in `data`, and where each of them was written.

    `marks` maps a path in `data` to a place, "name:line:column" (both from 1) or "override 'key=value'".
    """

    name: str
    data: dict[str, Any]
    marks: dict[Path, str] = field(repr=False)

    def where(self, path: Sequence[str | int]) -> str:
        """Where `path` was written: the key of a mapping entry, the first character of a list item.

        `path` may be a pydantic `loc`: segments that the data does not have (tags of a union, names of
        validators, a missing key) are passed over, and the nearest parent that exists answers.
        """
        found = _existing(self.data, path)
        while found not in self.marks:
            found = found[:-1]
        return self.marks[found]


def read(text: str | bytes, name: str) -> Document:
    """Read a recipe; `name` is what the positions begin with, usually the path of the file.

    Raises RecipeError with every fault that can be found (after a syntax error, reading stops there).
    """
    if isinstance(text, bytes):
        text = _decoded(text, name)
    text = text.removeprefix("\ufeff")

    def place(line: int, column: int) -> str:
        return f"{name}:{line + 1}:{column + 1}"

    root, data, marks = parse(text, place)
    if root is None or data is None:
        raise RecipeError([Fault(place(0, 0), "the recipe is empty; it must be a mapping of keys")])
    if not isinstance(data, dict):
        raise RecipeError([Fault(marks[()], f"a recipe must be a mapping of keys, not {kind_of(data)}")])
    return Document(name, data, marks)


# ---------------------------------------------------------------- text to nodes


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", "replace")
        line, column = _line_column(before)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        raise RecipeError([Fault(f"{name}:{line + 1}:{column + 1}", message)]) from None


def _line_column(before: str) -> tuple[int, int]:
    # The line breaks that PyYAML counts, so that all positions agree.
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", before)
    return len(lines) - 1, len(lines[-1])


def parse(text: str, place: Place) -> tuple[yaml.Node | None, Any, dict[Path, str]]:
    """The root node, its plain value and the place of every path; raises RecipeError with all faults."""
    bad = Reader.NON_PRINTABLE.search(text)
    if bad:
        message = f"character U+{ord(bad.group()):04X} is not allowed in YAML"
        raise RecipeError([Fault(place(*_line_column(text[: bad.start()])), message)])
    loader = _Loader(text, place)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None, {}
        tree = _Tree(loader, place)
        data = tree.value(root, ())
    except yaml.MarkedYAMLError as error:
        mark, words = plain_words(error, loader.get_mark())
        fault = Fault(place(mark.line, mark.column), words)
        raise RecipeError([*loader.faults, fault]) from None
    except (ValueError, OverflowError):  # PyYAML hands "\UFFFFFFFF" to chr() unchecked
        mark = loader.get_mark()
        fault = Fault(place(mark.line, mark.column), "the number in this escape or directive is out of range")
        raise RecipeError([*loader.faults, fault]) from None
    if loader.faults:
        raise RecipeError(loader.faults)
    tree.marks[()] = place(root.start_mark.line, root.start_mark.column)
    return root, data, tree.marks


# ---------------------------------------------------------------- nodes to values

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "str": re.compile(r"(?s:.*)"),
}
_COLLECTIONS = {"seq": yaml.SequenceNode, "map": yaml.MappingNode}


def is_plain_text(text: str) -> bool:
    """Whether `text`, written without quotes, is read as text and not as a number, a truth value or null."""
    return _kind_of_plain(text) == "str"


def _kind_of_plain(text: str) -> str:
    return next(name for name, form in _SCALARS.items() if form.fullmatch(text))


class _Loader(yaml.SafeLoader):
    """Composes nodes with 1.2 core tags; keeps the place of list items, which an alias node would hide."""

    def __init__(self, text: str, place: Place) -> None:
        super().__init__(text)
        self.place = place
        self.faults: list[Fault] = []
        self.item_marks: dict[tuple[int, int], yaml.Mark] = {}
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        self.nodes += 1
        _refuse_size(self.depth, self.nodes, event.start_mark)
        if isinstance(index, int):
            self.item_marks[id(parent), index] = event.start_mark
        node = super().compose_node(parent, index)
        self.depth -= 1
        tag = getattr(event, "tag", None)  # an alias event has none
        if tag is not None and not (tag.startswith(_TAG) and _fits(tag.removeprefix(_TAG), node)):
            shown = tag.replace(_TAG, "!!")
            message = f"the tag {shorten(shown)} is not allowed here; remove it"
            self.faults.append(Fault(self.place(event.start_mark.line, event.start_mark.column), message))
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is not yaml.ScalarNode:
            return super().resolve(kind, value, implicit)
        # Quoted text is text; the first pattern that takes all of a plain scalar names its type.
        return _TAG + (_kind_of_plain(value) if implicit[0] else "str")


def _fits(tag: str, node: yaml.Node | None) -> bool:
    if isinstance(node, yaml.ScalarNode):
        return tag in _SCALARS
    return tag in _COLLECTIONS and isinstance(node, _COLLECTIONS[tag])


def _refuse_size(depth: int, nodes: int, mark: yaml.Mark) -> None:
    if depth > MAX_DEPTH:
        message = f"values are nested more than {MAX_DEPTH} deep; flatten the recipe"
        raise ComposerError(None, None, message, mark)
    if nodes > MAX_NODES:
        message = f"more than {MAX_NODES} values, aliases counted each time they are used; shorten the recipe"
        raise ComposerError(None, None, message, mark)


class _Tree:
    """Turns nodes into plain values, expanding aliases, and collects marks and faults on the way."""

    def __init__(self, loader: _Loader, place: Place) -> None:
        self.place = place
        self.item_marks = loader.item_marks
        self.faults = loader.faults
        self.marks: dict[Path, str] = {}
        self.nodes = 0
        self.open: set[int] = set()  # the collections being built, so its size is the depth

    def at(self, mark: yaml.Mark) -> str:
        return self.place(mark.line, mark.column)

    def fault(self, node: yaml.Node, message: str) -> None:
        self.faults.append(Fault(self.at(node.start_mark), message))

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        _refuse_size(len(self.open) + 1, self.nodes, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            return self.fault(node, "this value contains an alias to itself")
        self.open.add(id(node))
        value = self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        self.open.discard(id(node))
        return value

    def sequence(self, node: yaml.Node, path: Path) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.marks[(*path, index)] = self.at(self.item_marks[id(node), index])
            values.append(self.value(item, (*path, index)))
        return values

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values = {}
        for key, (key_node, value_node) in self.entries(node).items():
            self.marks[(*path, key)] = self.at(key_node.start_mark)
            values[key] = self.value(value_node, (*path, key))
        return values

    def entries(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value node of each entry, its own first, then the merged ones it does not give itself."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        sources: list[yaml.Node] = []
        for key_node, value_node in node.value:
            self.nodes += 1
            _refuse_size(len(self.open), self.nodes, key_node.start_mark)
            key = self.key(key_node)
            if key in own:
                first = self.at(own[key][0].start_mark)
                self.fault(key_node, f"key {shorten(key)} is given twice; the first stands at {first}")
            if key is None or key in own:
                self.value(value_node, ())  # what it holds may have faults of its own
            else:
                own[key] = key_node, value_node
        merge = own.get("<<")
        if merge and getattr(merge[0], "style", "") is None:
            del own["<<"]
            sources = merge[1].value if isinstance(merge[1], yaml.SequenceNode) else [merge[1]]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                self.fault(merge[0] if merge else node, "'<<' takes an alias to a mapping, or a list of them")
            elif id(source) in self.open:
                self.fault(source, "this value contains an alias to itself")
            else:
                self.open.add(id(source))
                own = self.entries(source) | own
                self.open.discard(id(source))
        return own

    def key(self, node: yaml.Node) -> str | None:
        value = self.scalar(node) if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(value, str):
            return value
        if isinstance(node, yaml.ScalarNode):
            hint = f"; put it in quotes: '{shorten(node.value)[1:-1]}'" if node.value else ""
            self.fault(node, f"a key must be text, and this is {kind_of(value)}{hint}")
        else:
            self.fault(node, "a key must be text, not a list or a mapping")
        return None

    def scalar(self, node: yaml.ScalarNode) -> Any:
        name, text = node.tag.removeprefix(_TAG), node.value
        if name not in _SCALARS:
            return text  # its tag is a fault already
        if not _SCALARS[name].fullmatch(text):
            return self.fault(node, f"{shorten(text)} is not what its tag !!{name} says")
        if name == "str" and re.search("[\ud800-\udfff]", text):
            return self.fault(node, "an escape here is half of a character; write the character itself")
        if name == "int" and len(text) > MAX_DIGITS:
            return self.fault(node, f"a number of {len(text)} digits is too long; {MAX_DIGITS} are allowed")
        number = _CONVERT[name](text)
        if name == "float" and abs(number) == float("inf") and "inf" not in text.lower():
            return self.fault(node, f"{shorten(text)} is too large for a number; write .inf for infinity")
        return number


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base) if base != 10 else int(text)


_CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())),
    "str": str,
}


# ---------------------------------------------------------------- places and words


def _existing(data: Any, path: Sequence[str | int]) -> Path:
    """The longest path in the data that is made of segments of `path` in order; the first of several."""
    reached: dict[Path, Any] = {(): data}
    for segment in path:
        for at, value in list(reached.items()):
            if isinstance(value, dict) and segment in value:
                reached.setdefault((*at, segment), value[segment])
            elif isinstance(value, list) and type(segment) is int and 0 <= segment < len(value):
                reached.setdefault((*at, segment), value[segment])
    return max(reached, key=len)


def kind_of(value: Any) -> str:
    words = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return words.get(type(value), "a list" if isinstance(value, list) else "a mapping")


def shorten(text: str) -> str:
    text = hide(text)  # before it is cut, or a part of a key would be left
    return repr(text if len(text) <= 60 else text[:57] + "...")
