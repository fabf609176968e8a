"""Real text of known origin: thirteen domains from Debian packages and Python's library, as paragraphs and as chunks.

    python benchmarks/labelled_pool.py FOLDER

downloads the packages (`apt-get download`, not installed, 150 MB), unpacks them below FOLDER and writes
`paragraphs.jsonl` and `chunks.jsonl` there, rows of `text`, `source` (the domain) and `document`. Nothing of it is part
of krontune.
"""

import gzip
import json
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = """anarchism bible-kjv bible-kjv-text dict-foldoc dict-gcide fortunes fortunes-min freebsd-manpages
linux-doc-6.1 linux-headers-6.12.117+deb12-common manpages manpages-dev maxima-doc perl-doc postgresql-doc-15
python3.11-doc""".split()
WORDS = (20, 500)  # of a paragraph that is kept
CHUNK, SHORTEST_CHUNK = 128, 40
MOST = 12_000  # rows a domain
# A document's name and its text, pieces parted by blank lines.
Document = tuple[str, str]


class Paragraphs(HTMLParser):
    """Gathers the text of blocks of prose and of listings."""

    blocks = {"p", "dd", "pre", "blockquote"}

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.blocks:
            self.depth += 1
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.blocks:
            self.depth = max(self.depth - 1, 0)

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.found[-1] += re.sub(r"\n\s*\n", "\n", data)


def content(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", "replace")


def html(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.html*")):
        parser = Paragraphs()
        parser.feed(content(path))
        yield str(path.relative_to(folder)), "\n\n".join(parser.found)


def plain(pattern: str) -> Callable[[Path], Iterator[Document]]:
    def documents(folder: Path) -> Iterator[Document]:
        for path in sorted(folder.rglob(pattern)):
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(folder)), content(path)

    return documents


def pod(folder: Path) -> Iterator[Document]:
    for name, text in plain("*.pod")(folder):
        yield name, re.sub(r"[A-Z]<+ ?(?:[^<>|]*\|)?([^<>]*?) ?>+", r"\1", re.sub(r"(?m)^=\w+ ?", "", text))


def manual(folder: Path) -> Iterator[Document]:
    """Without troff's macros: a paragraph macro is a blank line, any other keeps its arguments."""
    for name, text in plain("*.gz")(folder / "usr/share/man"):
        text = re.sub(r'(?m)^[.\']\\".*\n', "", text)
        text = re.sub(r"(?m)^\.(PP|P|TP|IP|LP|Pp|SH|SS|Sh|Ss|It|HP|in|nf|fi|EX|EE)\b.*$", "\n", text)
        text = re.sub(r"(?m)^\.\w+ ?", "", text)
        text = re.sub(r"\\f[BIRPC]|\\f\(..|\\[&|^c]|\\s[-+]?\d", "", text)
        yield name, re.sub(r"\\\((..)|\\(.)", lambda m: {"em": "-", "aq": "'"}.get(m[1], m[2] or ""), text)


def entries(pattern: str, split: str, size: int) -> Callable[[Path], Iterator[Document]]:
    """Dictionaries and fortunes: `size` neighbouring entries count as a document."""

    def documents(folder: Path) -> Iterator[Document]:
        for path in sorted(folder.rglob(pattern)):
            if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8", ".index"):
                found = re.split(split, content(path))
                for at in range(0, len(found), size):
                    pieces = [re.sub(r"\n\s*\n", "\n", piece) for piece in found[at : at + size]]
                    yield f"{path.name}/{at}", "\n\n".join(pieces)

    return documents


def bible(folder: Path) -> Iterator[Document]:
    """Five verses a paragraph, a chapter a document."""
    program = next(folder.parent.glob("bible-kjv_*/usr/bin/bible"))
    command = [str(program.absolute()), "-l10000", "-p", str((folder / "usr/lib").absolute()), "Gen1:1-Rev22:21"]
    out = subprocess.run(command, capture_output=True, check=True, input=b"").stdout.decode("latin-1")
    for chapter in re.split(r"\n(?=\w[\w ]* \d+\n)", out):  # a line "Genesis 1", then lines "  1 In the beginning ..."
        name, verses = chapter.strip().split("\n")[0], re.findall(r"(?m)^ +\d+ (.+)$", chapter)
        yield name, "\n\n".join("\n".join(verses[at : at + 5]) for at in range(0, len(verses), 5))


DOMAINS: dict[str, tuple[str, Callable[[Path], Iterator[Document]]]] = {
    "bible": ("bible-kjv-text_*", bible),
    "c_code": ("linux-headers-*", plain("*.h")),
    "dictionary": ("dict-gcide_*", entries("*.dz", r"\n(?=\S+ \\)", 25)),
    "foldoc": ("dict-foldoc_*", entries("*.dz", r"\n(?=\S)", 30)),
    "fortunes": ("fortunes*_*", entries("games/fortunes/*", r"\n%\n", 20)),
    "kernel_doc": ("linux-doc-*", plain("*.rst.gz")),
    "manpage": ("*manpages*_*", manual),
    "math_doc": ("maxima-doc_*", html),
    "perl_doc": ("perl-doc_*", pod),
    "politics": ("anarchism_*", html),
    "postgres_doc": ("postgresql-doc-*", html),
    "python_doc": ("python3.11-doc_*", html),
}


def fetch(folder: Path) -> None:
    packed = folder / "debs"
    packed.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not list(packed.glob(f"{name}_*"))]
    if missing:
        subprocess.run(["apt-get", "download", "-qq", *missing], cwd=packed, check=True)
    (folder / "x").mkdir(exist_ok=True)
    for path in sorted(packed.glob("*.deb")):
        target = folder / "x" / path.stem
        if not target.exists():
            subprocess.run(["dpkg-deb", "-x", str(path), str(target)], check=True)


def documents(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(domain, document, text) of everything."""
    for domain, (pattern, reader) in DOMAINS.items():
        for package in sorted((folder / "x").glob(pattern)):
            for name, text in reader(package):
                yield domain, f"{domain}/{name}", text
    for name, text in plain("*.py")(Path(sysconfig.get_path("stdlib"))):
        if "site-packages" not in name and "/test" not in name and not name.startswith("test/"):
            yield "python_code", f"python_code/{name}", text


def main() -> None:
    folder = Path(sys.argv[1])
    fetch(folder)
    rows: dict[str, dict[str, list[dict[str, str]]]] = {"paragraphs": {}, "chunks": {}}
    seen: dict[str, set[str]] = {"paragraphs": set(), "chunks": set()}
    for domain, document, text in documents(folder):
        pieces = {"paragraphs": [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()], "chunks": []}
        pieces["paragraphs"] = [p for p in pieces["paragraphs"] if WORDS[0] <= len(p.split()) <= WORDS[1]]
        words = text.split()
        chunks = [words[at : at + CHUNK] for at in range(0, len(words), CHUNK)]
        pieces["chunks"] = [" ".join(chunk) for chunk in chunks if len(chunk) >= SHORTEST_CHUNK]
        for kind, found in pieces.items():
            for piece in found:
                if piece not in seen[kind]:
                    seen[kind].add(piece)
                    row = {"text": piece.strip("\n"), "source": domain, "document": document}
                    rows[kind].setdefault(domain, []).append(row)
    for kind, by_domain in rows.items():
        with (folder / f"{kind}.jsonl").open("w") as file:
            for domain, found in by_domain.items():
                kept = random.Random(0).sample(found, min(MOST, len(found)))
                file.writelines(json.dumps(row) + "\n" for row in kept)
                print(kind, domain, len({row["document"] for row in kept}), "documents,", len(kept), "rows")


if __name__ == "__main__":
    main()
