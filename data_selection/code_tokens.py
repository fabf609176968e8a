"""Source code to tokens that do not change when names, comments, layout and the values of literals do.

Two lexers: tree-sitter, where its grammar of the language is installed (`pip install krontune[dedup]`), and one regular
expression a language family. They cut code a little differently, so that a whole pool must go through one of them.
"""

import keyword
import re
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np

from .shingles import Shingles, shingles
from .texts import DataSelectionError

# Tokens and whether each is a name that a programmer chose.
Lexed: TypeAlias = tuple[list[str], list[bool]]
Lexer: TypeAlias = Callable[[str], Lexed]

_HASH, _SLASH = r"#[^\n]*", r"//[^\n]*|/\*.*?(?:\*/|\Z)"
_COMMENTS = {
    "python": _HASH,
    "ruby": _HASH,
    "bash": _HASH,
    **dict.fromkeys(("c", "cpp", "java", "javascript", "typescript", "go", "rust", "c_sharp", "kotlin"), _SLASH),
}
LANGUAGES = tuple(_COMMENTS)
# Of all these languages but Python in one set: a name that is a keyword elsewhere is rare.
_KEYWORDS = frozenset(
    """abstract and as assert async await auto begin bool boolean break byte case catch chan char class const constexpr
    continue crate debugger def default defer delete do done double elif else elsif end ensure enum esac except export
    extends extern false fi final finally float fn for foreach from fun func function global go goto if impl implements
    import in inline instanceof int interface internal is lambda let local long loop map match mod module move mut
    namespace native new nil not null of operator or out override package pass private protected pub public raise range
    readonly ref register rescue return select self short signed sizeof static string struct super switch synchronized
    template then this throw throws trait transient true try type typedef typename typeof undefined union unless unsafe
    unsigned until use using val var virtual void volatile when where while with yield""".split()
)
_PYTHON = frozenset(keyword.kwlist)


def code_lexer(language: str, kind: str = "auto") -> tuple[str, Lexer]:
    """The lexer of a language and its name: "tree-sitter" or "regex".

    Args:
        language: one of LANGUAGES.
        kind: "tree-sitter", "regex", or "auto" for the first that is there.

    Raises:
        DataSelectionError: an unknown language or kind, or a grammar that is not installed.
    """
    if language not in _COMMENTS:
        raise DataSelectionError(f"language={language!r}: must be one of {', '.join(LANGUAGES)}")
    if kind not in ("auto", "tree-sitter", "regex"):
        raise DataSelectionError(f"lexer={kind!r}: must be 'auto', 'tree-sitter' or 'regex'")
    grammar = f"tree_sitter_{language}"
    there = find_spec("tree_sitter") is not None and find_spec(grammar) is not None
    if kind == "regex" or (kind == "auto" and not there):
        return "regex", lambda text: regex_tokens(text, language)
    if not there:
        package = grammar.replace("_", "-")
        raise DataSelectionError(f"lexer='tree-sitter': pip install tree-sitter {package}, or pass lexer='regex'")
    parser = _parser(grammar)
    return "tree-sitter", lambda text: tree_tokens(text, parser)


def code_shingles(texts: Sequence[str], width: int, lexer: Lexer) -> Shingles:
    """Shingles of code in which names count as the place of their first occurrence, see `shingles.shingles`."""
    numbers: dict[str, int] = {}
    tokens: list[int] = []
    names: list[bool] = []
    counts = []
    for text in texts:
        found, named = lexer(text)
        for token in found:
            number = numbers.get(token)
            if number is None:
                number = int.from_bytes(blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest())
                numbers[token] = number
            tokens.append(number)
        names += named
        counts.append(len(found))
    return shingles(np.array(tokens, np.uint64), np.array(counts, np.int64), width, np.array(names, bool))


def regex_tokens(text: str, language: str) -> Lexed:
    """The tokens of a text in one of LANGUAGES: comments left out, numbers as `0`, strings as `""`."""
    keywords = _PYTHON if language == "python" else _KEYWORDS
    tokens, names = [], []
    for match in _pattern(_COMMENTS[language]).finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "comment":
            continue
        is_name = kind == "word" and token not in keywords
        tokens.append({"string": '""', "number": "0"}.get(kind or "", token))
        names.append(is_name)
    return tokens, names


@cache
def _pattern(comment: str) -> re.Pattern[str]:
    triple = r'[bfruBFRU]{0,2}(?:"""(?:\\.|[^\\])*?(?:"""|\Z)|\'\'\'(?:\\.|[^\\])*?(?:\'\'\'|\Z))|'
    quoted = r'[bfruBFRUL]{0,2}"(?:\\.|[^"\\\n])*(?:"|$)|[bfruBFRUL]{0,2}\'(?:\\.|[^\'\\\n])*(?:\'|$)|`(?:\\.|[^`\\])*`'
    string = (triple if comment == _HASH else "") + quoted
    number = r"\d(?:[\w.]|(?<=[eE])[+-])*"
    return re.compile(
        f"(?P<comment>{comment})|(?P<string>{string})|(?P<number>{number})|(?P<word>\\w+)|(?P<sign>[^\\w\\s])",
        re.DOTALL | re.MULTILINE,
    )


def tree_tokens(text: str, parser: Any) -> Lexed:
    """The leaves of the syntax tree: names as they are, keywords and signs as they are, other leaves (numbers) as the
    name of their kind; comments left out, strings as `""`. Code that does not parse gives the leaves of what does."""
    content = text.encode("utf-8", "replace")
    tokens, names = [], []
    stack = [parser.parse(content).root_node]
    while stack:
        node = stack.pop()
        kind = node.type
        if "comment" in kind:
            continue
        if "string" in kind and node.is_named:
            tokens.append('""')
            names.append(False)
        elif node.child_count:
            stack.extend(reversed(node.children))
        elif node.end_byte > node.start_byte:
            is_name = kind.endswith("identifier")
            tokens.append(content[node.start_byte : node.end_byte].decode("utf-8", "replace") if is_name else kind)
            names.append(is_name)
    return tokens, names


@cache
def _parser(grammar: str) -> Any:
    from tree_sitter import Language, Parser  # pyright: ignore[reportMissingImports]

    return Parser(Language(import_module(grammar).language()))
