"""Builds the shipped text: `python -m krontune.recipes.data.build OUT_DIR --debs DEB_DIR`.

Two kinds of sources go in. The documentation half is read from the docstrings of Python packages installed beside
krontune; the books come from Debian packages, which `apt-get download PACKAGE...` puts into DEB_DIR (`dpkg-deb`
reads them; nothing is installed). Out come `prose.jsonl.gz`, one `{"text": ..., "source": ...}` a line, and
`PROVENANCE.md`, one table row a source. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.metadata
import importlib.util
import inspect
import io
import json
import platform
import random
import re
import struct
import subprocess
import sysconfig
import tarfile
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 0
MIN_WORDS, MAX_WORDS = 20, 120


class BuildError(RuntimeError):
    """A source of the shipped text is missing or unreadable; the message says which one and how to get it."""


@dataclass(frozen=True)
class Source:
    """One source of paragraphs: its name in the rows, where it comes from, and on what terms."""

    name: str
    kind: str  # "python": `package` is an installed distribution; "debian": a binary package
    package: str
    licence: str
    holders: str
    cap: int  # most paragraphs taken
    path: str = ""  # debian only: the file inside the package


BSD, APACHE = "BSD-3-Clause", "Apache-2.0"
SOURCES = [
    Source("austen", "debian", "r-cran-janeaustenr", "public domain (novels), MIT (package)",
           "Jane Austen (1775-1817); package (c) 2016-2017 Julia Silge", 1300,
           "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
    Source("jargon", "debian", "jargon-text", "public domain",
           "none claimed; please cite as Jargon File 4.4.7, edited by Eric S. Raymond", 1300,
           "usr/share/doc/jargon-text/jargon.txt.gz"),
    Source("bierce", "debian", "dict-devil", "public domain",
           "none: The Devil's Dictionary, Ambrose Bierce, 1911, copyright expired", 1300,
           "usr/share/dictd/devil.dict.dz"),
    Source("newton", "debian", "golang-1.19-src", "public domain",
           "none: Opticks, Isaac Newton, fourth edition, 1730", 1300,
           "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"),
    Source("cpython", "python", "", "PSF-2.0", "(c) 2001 Python Software Foundation", 700),
    Source("numpy", "python", "numpy", BSD, "(c) 2005-2025 NumPy Developers", 700),
    Source("scipy", "python", "scipy", BSD, "(c) 2001-2002 Enthought, Inc.; 2003 SciPy Developers", 700),
    Source("sklearn", "python", "scikit-learn", BSD, "(c) 2007-2026 The scikit-learn developers", 700),
    Source("pandas", "python", "pandas", BSD, "(c) 2008-2011 AQR Capital Management, LLC, ...", 700),
    Source("torch", "python", "torch", BSD, "(c) 2016- Facebook, Inc. and the PyTorch contributors", 700),
    Source("transformers", "python", "transformers", APACHE, "The HuggingFace Team", 700),
    Source("datasets", "python", "datasets", APACHE, "The HuggingFace Team", 700),
    Source("accelerate", "python", "accelerate", APACHE, "The HuggingFace Team", 700),
    Source("peft", "python", "peft", APACHE, "The HuggingFace Team", 700),
    Source("trl", "python", "trl", APACHE, "The HuggingFace Team", 700),
    Source("huggingface_hub", "python", "huggingface_hub", APACHE, "The HuggingFace Team", 700),
]

# --- prose out of marked-up text ---

NOT_PROSE = re.compile(r"[-*+|#:@>=~^!\[\]<{}]|\.\. |\d+[.)]\s|```|Copyright|Args?:|Returns?:|Note:|TODO")
UNDERLINE = re.compile(r"([=\-~^*#\"'`+.])\1{2,}")
CODE_SIGNS = re.compile(r"://|==|\)\.|\(\)\.|->|=>|>>>|::|[{}\\|<>=]|_\w+_\w+_|\.py\b|[^\x20-\x7e\u00a0-\u024f\u2010-\u2026]")
MARKUP = [
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r":[a-z:+-]+:`~?(?:[\w.]*\.)?([^`<]+?)(?:\s*<[^`]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `text <address>`_
    (re.compile(r"\[`([^`]+)`\]"), r"\1"),
    (re.compile(r"`+([^`]+)`+_?"), r"\1"),
    (re.compile(r"\s?\[\d+\]_"), ""),  # footnote marks
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<!\w)[*_]([^*_]+)[*_](?!\w)"), r"\1"),
]


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of a dedented text that read as prose, each on one line, without markup.

    A paragraph is a block between blank lines. Blocks with an indented line (code, parameter lists, verse), with
    prompts, bullets, tables or directives, in a code fence, or outside 20 to 120 words are dropped whole.
    """
    kept = []
    fenced = False
    for block in re.split(r"\n[ \t]*\n", text):
        fences = len(re.findall(r"^\s*```", block, re.M))
        inside, fenced = fenced or fences > 0, fenced ^ (fences % 2 == 1)
        lines = [line.rstrip() for line in block.strip("\n").split("\n")]
        if len(lines) > 1 and UNDERLINE.fullmatch(lines[1]):
            lines = lines[2:]  # a section title and its underline
        if inside or any(line[:1].isspace() or NOT_PROSE.match(line) for line in lines):
            continue
        paragraph = plain(" ".join(lines))
        if is_prose(paragraph):
            kept.append(paragraph)
    return kept


def plain(paragraph: str) -> str:
    """The paragraph with reStructuredText and Markdown inline markup taken off and spaces made single."""
    for pattern, by in MARKUP:
        paragraph = pattern.sub(by, paragraph)
    return " ".join(paragraph.split())


def is_prose(paragraph: str) -> bool:
    """Whether it has 20 to 120 words, starts and ends like a sentence, and is made of words rather than code."""
    if not MIN_WORDS <= len(paragraph.split()) <= MAX_WORDS:
        return False
    if not re.match(r"[\"'(“‘]?[A-Z]", paragraph) or not re.search(r"[.!?][\"')”’]?$", paragraph):
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.9 * len(paragraph) and not CODE_SIGNS.search(paragraph)


# --- Python packages: docstrings ---

VENDORED = re.compile(r"(^|/)(tests?|testing|_vendor\w*|vendored?|externals?|_external|third_party|extern|"
                      r"site-packages|idlelib|lib2to3|ensurepip|turtledemo|msvccompiler)(/|$)")
OTHER_LICENCE = re.compile(r"permission is hereby granted|permission to use, copy|general public licen|MIT licen", re.I)


def python_source(source: Source) -> tuple[str, Iterator[str]]:
    """The version of an installed package (or of CPython itself) and its docstrings in the order of its files."""
    if not source.package:
        return platform.python_version(), docstrings_under(Path(sysconfig.get_path("stdlib")))
    module = importlib.util.find_spec(source.name)
    if module is None or module.origin is None:
        raise BuildError(f"source {source.name!r} needs the Python package {source.package}: "
                         f"pip install {source.package}")
    return importlib.metadata.version(source.package), docstrings_under(Path(module.origin).parent)


def docstrings_under(root: Path) -> Iterator[str]:
    """Docstrings of all modules under a folder, vendored code and files under other licences left out."""
    for file in sorted(root.rglob("*.py")):
        if VENDORED.search(file.relative_to(root).as_posix()):
            continue
        code = file.read_text(encoding="utf-8", errors="replace")
        if not OTHER_LICENCE.search(code):
            yield from docstrings(code)


def docstrings(code: str) -> Iterator[str]:
    """The docstrings of a module's source, of its classes and of its functions, dedented; none if it does not parse."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


# --- Debian packages: books ---


def debian_source(source: Source, debs: Path) -> tuple[str, Iterator[str]]:
    """The version of a downloaded Debian package and the text of its one book."""
    found = sorted(debs.glob(f"{source.package}_*.deb"))
    if len(found) != 1:
        raise BuildError(f"source {source.name!r} needs one {source.package}_*.deb in {debs}, found {len(found)}: "
                         f"run 'apt-get download {source.package}' there")
    version = dpkg_deb("--field", str(found[0]), "Version").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(dpkg_deb("--fsys-tarfile", str(found[0])))) as tar:
        member = tar.extractfile("./" + source.path)
        if member is None:
            raise BuildError(f"{found[0].name} has no file {source.path}; the tested version is in PROVENANCE.md")
        return version, iter([BOOKS[source.name](member.read())])


def dpkg_deb(*arguments: str) -> bytes:
    try:
        return subprocess.run(["dpkg-deb", *arguments], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"dpkg-deb {' '.join(arguments)} failed ({error}); the books need a Debian or Ubuntu") from error


def austen(raw: bytes) -> str:
    """The lines of the novels in an R lazy-load file: zlib chunks, each one serialised R character vector."""
    lines: list[str] = []
    while raw:
        chunk = zlib.decompressobj()
        body = chunk.decompress(raw[4:])
        raw = chunk.unused_data
        at = 2 + 4 * 3
        if body[2 + 3] == 3:  # serialisation version 3 also names the encoding
            at += 4 + struct.unpack_from(">i", body, at)[0]
        _, count = struct.unpack_from(">ii", body, at)
        at += 8
        for _ in range(count):
            length = struct.unpack_from(">i", body, at + 4)[0]
            lines.append(body[at + 8 : at + 8 + length].decode())
            at += 8 + length
        lines.append("")
    return "\n".join(lines)


def jargon(raw: bytes) -> str:
    """Introduction and lexicon; the appendices quote stories by other authors and stay out."""
    text = gzip.decompress(raw).decode().replace("\u00a0", " ")
    text = text[text.index("\nChapter 1. ") : text.index("\nAppendix A. ")]
    text = re.sub(r"^\[(?:common|very common|[^\]\n]{0,60})\]\s+", "", re.sub(r"^ {3}", "", text, flags=re.M), flags=re.M)
    return re.sub(r"\{([^}]+)\}", r"\1", text).translate(str.maketrans("‘’", "''"))


def bierce(raw: bytes) -> str:
    text = gzip.decompress(raw).decode("latin-1")
    return text[text.index("\nABASEMENT") :]


def newton(raw: bytes) -> str:
    return raw.decode().replace("--", " - ")


BOOKS = {"austen": austen, "jargon": jargon, "bierce": bierce, "newton": newton}
