"""Builds the shipped text: `python -m krontune.recipes.data.build OUT_DIR --debs DEB_DIR`.

The documentation half is read from the docstrings of Python packages, installed beside krontune. The books
come from Debian packages, which `apt-get download PACKAGE ...` puts into DEB_DIR; `dpkg-deb` reads them,
nothing is installed. SOURCES names them all. Out come `prose.jsonl.gz`, one `{"text": ..., "source": ...}`
a line, and `PROVENANCE.md`, one table row a source; the same inputs give the same bytes. `LICENSES.txt` is
kept by hand: look at it when a source or its version changes.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import importlib.metadata
import importlib.util
import io
import json
import platform
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 0
MIN_WORDS, MAX_WORDS = 20, 120
DOC_CAP, BOOK_CAP = 450, 1300  # most paragraphs taken from one package, from one book

# --- from marked-up text to prose ---

NOT_PROSE = re.compile(r"[-*+|#:@>=~^!\[\]<{}]|\.\. |\d+[.)]\s|```|Copyright|(Args|Returns|Note):|TODO|[\w.]+ : ")
UNDERLINE = re.compile(r"([=\-~^*#\"'`+.])\1{2,}")
CODE_SIGNS = re.compile(r"\w@\w|://|==|\)\.|->|=>|::|[{}\\|<>=`]|[^\x20-\x7e\u00a0-\u024f\u2010-\u2026]")
INLINE_MARKUP = [
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r":[a-z:+-]+:`~?(?:[\w.]*\.)?([^`<]+?)(?:\s*<[^`]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_+"), r"\1"),  # `text <address>`_
    (re.compile(r"\[`~?([^`]+)`\]"), r"\1"),  # [`~a.B`]
    (re.compile(r"`+([^`]+)`+_?"), r"\1"),
    (re.compile(r"\s?\[\d+\]_"), ""),  # footnote marks
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w/*])\*(?!\s)([^*]+)(?<!\s)\*(?![\w/*])"), r"\1"),
]
ABBREVIATIONS = ("Mr", "Mrs", "Dr", "St", "Fig", "Prop", "Exper", "Obs", "Cas", "vs", "e.g", "E.g", "i.e")
SENTENCE_END = re.compile(
    "".join(rf"(?<!\b{re.escape(a)}\.)" for a in ABBREVIATIONS)
    + r"(?<!\b[A-Z]\.)(?<=[.!?]['\"”)]|[^.][.!?])\s+(?=['\"“(]?[A-Z])"
)


def prose_paragraphs(text: str) -> list[str]:
    """The paragraphs of a dedented text that read as prose, each on one line and without markup.

    A paragraph is what stands between blank lines. It is dropped whole if it stands in a code fence or if one
    of its lines is indented (code, parameter lists, verse) or starts as a prompt, bullet, table or
    directive. One above 120 words is cut where sentences end; what then has fewer than 20 words, or more
    than 120, is dropped.
    """
    kept: list[str] = []
    fenced = False
    for block in re.split(r"\n[ \t]*\n", text):
        fences = len(re.findall(r"^\s*```", block, re.M))
        in_code, fenced = fenced or fences > 0, fenced ^ (fences % 2 == 1)
        lines = block.strip("\n").split("\n")
        if len(lines) > 1 and UNDERLINE.fullmatch(lines[1].rstrip()):
            lines = lines[2:]  # a section title and its underline
        if in_code or any(line[:1].isspace() or NOT_PROSE.match(line) for line in lines):
            continue
        kept += [piece for piece in pieces(plain(" ".join(lines))) if is_prose(piece)]
    return kept


def plain(paragraph: str) -> str:
    """The paragraph with its reStructuredText or Markdown inline markup taken off, single-spaced."""
    for pattern, replacement in INLINE_MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return " ".join(paragraph.split())


def pieces(paragraph: str) -> list[str]:
    """The paragraph cut at sentence ends into pieces of at most 120 words; a longer sentence stays whole."""
    cut: list[list[str]] = [[]]
    for sentence in SENTENCE_END.split(paragraph):
        words = sentence.split()
        if cut[-1] and len(cut[-1]) + len(words) > MAX_WORDS:
            cut.append([])
        cut[-1] += words
    return [" ".join(words) for words in cut]


def is_prose(paragraph: str) -> bool:
    """Whether it has 20 to 120 words, starts and ends as sentences do, and is words rather than code."""
    if not MIN_WORDS <= len(paragraph.split()) <= MAX_WORDS:
        return False
    if not re.match(r"[\"'(“]?[A-Z]", paragraph) or not re.search(r"[.!?][\"')”]?$", paragraph):
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.9 * len(paragraph) and not CODE_SIGNS.search(paragraph)


# --- documentation: docstrings of Python packages ---

LEFT_OUT = re.compile(  # tests and vendored code
    r"(^|/)(tests?|testing|_?vendor\w*|_?externals?|extern|third_party|site-packages|idlelib|lib2to3"
    r"|ensurepip|turtledemo)(/|$)"
)
OTHER_LICENCE = (
    r"permission is hereby granted|permission to use|redistribution and use|general public licen|mit licen"
    r"|non-?commercial"
)


def docstrings_under(root: Path, other_licence: str = OTHER_LICENCE) -> Iterator[str]:
    """The docstrings of the modules under a folder, but for tests, vendored code and other licences."""
    for file in sorted(root.rglob("*.py")):
        if not LEFT_OUT.search(file.relative_to(root).as_posix()):
            code = file.read_text(encoding="utf-8", errors="replace")
            if not re.search(other_licence, code, re.I):
                yield from docstrings(code)


def docstrings(code: str) -> Iterator[str]:
    """The docstrings in a module's source, dedented; none if this Python cannot parse it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


# --- books: one file each in a Debian package ---

UNKIND = re.compile(
    r"fuck|bitch|nigg|negro|penis|sexual|lesbian|suicide|pagan|\bjew|koran|mohammed|mahomet|mussulman"
    r"|chinese|indian|female|\bwom[ae]n",
    re.I,
)


def without_unkind(text: str) -> str:
    """The text without the blocks in which a satirical lexicon is crude or mocks a people, faith or sex."""
    return "\n\n".join(block for block in re.split(r"\n[ \t]*\n", text) if not UNKIND.search(block))


def austen(raw: bytes) -> str:
    """The novels out of an R lazy-load file: zlib chunks, each one serialised vector of lines."""
    lines: list[str] = []
    while raw:
        unzip = zlib.decompressobj()
        data, raw = unzip.decompress(raw[4:]), unzip.unused_data
        at = 14  # "X\n" and three integers, the first of them the format's version
        if data[5] == 3:  # version 3 goes on with the encoding's name
            at += 4 + struct.unpack_from(">i", data, at)[0]
        count = struct.unpack_from(">i", data, at + 4)[0]
        at += 8
        for _ in range(count):  # flags, length, bytes
            end = at + 8 + struct.unpack_from(">i", data, at + 4)[0]
            lines.append(data[at + 8 : end].decode())
            at = end
        lines.append("")
    return "\n".join(lines).replace("_", "").replace("--", " - ")


def jargon(raw: bytes) -> str:
    """Introduction and lexicon; the appendices and the bibliography quote other authors and stay out."""
    text = gzip.decompress(raw).decode().replace("\u00a0", " ")
    text = text[text.index("\nChapter 1. ") : text.index("\nAppendix A. ")]
    text = re.sub(r"^ {3}", "", text, flags=re.M)
    text = re.sub(r"^\[[^\]\n]{0,60}\]\s+", "", text, flags=re.M)  # [common], [techspeak], ...
    return without_unkind(re.sub(r"\{([^}]+)\}", r"\1", text).translate(str.maketrans("‘’", "''")))


def bierce(raw: bytes) -> str:
    text = gzip.decompress(raw).decode("latin-1")
    return without_unkind(text[text.index("\nABASEMENT") :].replace("_", ""))


def newton(raw: bytes) -> str:
    return raw.decode().replace("_", "").replace("--", " - ")


# --- the sources ---


@dataclass(frozen=True)
class Source:
    """Where paragraphs come from and on what terms: a Python package, or one file of a Debian package."""

    name: str  # as in the rows; for a Python package also its import name
    package: str  # "" means CPython itself
    licence: str
    holders: str
    path: str = ""  # Debian: the file inside the package
    read: Callable[[bytes], str] | None = None  # Debian: from that file's bytes to text


PD, BSD, APACHE, HF = "public domain", "BSD-3-Clause", "Apache-2.0", "the Hugging Face team and contributors"
SOURCES = (
    Source("austen", "r-cran-janeaustenr", f"{PD} (package: MIT)", "Jane Austen; package: Julia Silge",
           "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", austen),
    Source("jargon", "jargon-text", PD, "the Jargon File 4.4.7, 29 Dec 2003, edited by Eric S. Raymond",
           "usr/share/doc/jargon-text/jargon.txt.gz", jargon),
    Source("bierce", "dict-devil", PD, "The Devil's Dictionary, Ambrose Bierce, 1911",
           "usr/share/dictd/devil.dict.dz", bierce),
    Source("newton", "golang-1.19-src", f"{PD} (package: BSD-3-Clause)",
           "Opticks, Isaac Newton, 1730; package: The Go Authors",
           "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt", newton),
    Source("cpython", "", "PSF-2.0", "Python Software Foundation"),
    Source("numpy", "numpy", BSD, "NumPy Developers"),
    Source("scipy", "scipy", BSD, "Enthought, Inc.; SciPy Developers"),
    Source("sklearn", "scikit-learn", BSD, "the scikit-learn developers"),
    Source("pandas", "pandas", BSD, "AQR Capital Management, LLC, Lambda Foundry, Inc. and PyData "
           "Development Team; open source contributors"),
    Source("torch", "torch", BSD, "Facebook, Inc. and the other holders named in LICENSES.txt"),
    Source("transformers", "transformers", APACHE, HF),
    Source("datasets", "datasets", APACHE, HF),
    Source("accelerate", "accelerate", APACHE, HF),
    Source("peft", "peft", APACHE, HF),
    Source("trl", "trl", APACHE, HF),
    Source("huggingface_hub", "huggingface_hub", APACHE, HF),
)  # fmt: skip


def python_texts(source: Source) -> tuple[str, Iterable[str]]:
    """The version of an installed package and its docstrings."""
    other = OTHER_LICENCE
    if source.licence != APACHE:
        other += "|under the apache licen|spdx-.*: mit"
    if not source.package:
        stdlib = Path(sysconfig.get_path("stdlib"))
        return f"CPython {platform.python_version()}", docstrings_under(stdlib, other)
    spec = importlib.util.find_spec(source.name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"source {source.name!r} is missing: run 'pip install {source.package}'")
    version = importlib.metadata.version(source.package).split("+")[0]
    return f"{source.package} {version} (PyPI)", docstrings_under(Path(spec.origin).parent, other)


def debian_texts(source: Source, debs: Path) -> tuple[str, Iterable[str]]:
    """The version of a downloaded Debian package and the text of its book."""
    assert source.read is not None
    found = sorted(debs.glob(f"{source.package}_*.deb"))
    if len(found) != 1:
        raise RuntimeError(
            f"source {source.name!r} needs one {source.package}_*.deb in {debs}, found {len(found)}: "
            f"run 'apt-get download {source.package}' there"
        )
    version = dpkg_deb("--field", str(found[0]), "Version").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(dpkg_deb("--fsys-tarfile", str(found[0])))) as package:
        member = package.extractfile("./" + source.path)
        assert member is not None  # None only for what is no file
        return f"{source.package} {version} (Debian)", [source.read(member.read())]


def dpkg_deb(*arguments: str) -> bytes:
    return subprocess.run(["dpkg-deb", *arguments], check=True, capture_output=True).stdout


# --- the two files ---


def choose(source: Source, texts: Iterable[str], seen: set[str]) -> list[str]:
    """The source's paragraphs, at most its cap, drawn with a fixed seed.

    Of paragraphs that start with the same eight words, in any source, only the first counts: docstrings are
    copied from class to class with a word changed. `seen` holds those starts and grows.
    """
    fresh: list[str] = []
    for paragraph in (p for text in texts for p in prose_paragraphs(text)):
        start = " ".join(paragraph.lower().split()[:8])
        if start not in seen:
            seen.add(start)
            fresh.append(paragraph)
    cap = BOOK_CAP if source.read else DOC_CAP
    return random.Random(f"{SEED} {source.name}").sample(fresh, min(cap, len(fresh)))


PROVENANCE = """# Where the shipped text comes from

`prose.jsonl.gz` holds {n} paragraphs ({size} bytes of UTF-8 text) from {sources} sources. `build.py` made
it and this page; its docstring says how to make them again. `LICENSES.txt` has the licence texts and full
notices.

What was changed: paragraphs of {low} to {high} words were taken out of docstrings and books and joined to
one line without inline markup; longer ones were cut at sentence ends. Left out are code, parameter lists,
tables and verse, paragraphs that start like an earlier one, the appendices and bibliography of the Jargon
File, and passages of the Jargon File and The Devil's Dictionary that are crude or mock a people, a faith or
a sex. At most {book_cap} paragraphs of a book and {doc_cap} of a package were drawn at random, and the
whole was shuffled.

| source | from | licence | work or copyright holders | paragraphs | bytes |
|---|---|---|---|---|---|
{table}
"""


def build(out_dir: Path, debs: Path) -> str:
    """Writes prose.jsonl.gz and PROVENANCE.md into `out_dir` and returns the latter's text.

    Raises RuntimeError if a package is neither installed nor in `debs`; the message says how to get it.
    """
    rows: list[dict[str, str]] = []
    table: list[str] = []
    seen: set[str] = set()
    for source in SOURCES:
        origin, texts = debian_texts(source, debs) if source.read else python_texts(source)
        chosen = choose(source, texts, seen)
        rows += [{"text": text, "source": source.name} for text in chosen]
        size = sum(len(text.encode()) for text in chosen)
        cells = (source.name, origin, source.licence, source.holders, str(len(chosen)), str(size))
        table.append("| " + " | ".join(cells) + " |")
    random.Random(SEED).shuffle(rows)
    page = PROVENANCE.format(
        n=len(rows), size=sum(len(row["text"].encode()) for row in rows), sources=len(SOURCES),
        low=MIN_WORDS, high=MAX_WORDS, book_cap=BOOK_CAP, doc_cap=DOC_CAP, table="\n".join(table),
    )  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out_dir / "prose.jsonl.gz").write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    (out_dir / "PROVENANCE.md").write_text(page, encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the shipped text.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--debs", type=Path, required=True, help="folder with the downloaded Debian packages")
    arguments = parser.parse_args()
    try:
        print(build(arguments.out_dir, arguments.debs))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
