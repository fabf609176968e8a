"""Copies found: recall on planted edits, and documents a second, beside rensa and datasketch where they are installed.

    OMP_NUM_THREADS=1 python benchmarks/duplicates.py [PASSAGES]

The pool is real code: passages of 40 to 300 words, cut at blank lines, of Python's library and PyTorch (8,000 by
default); then, for every kind of edit, 100 passages once more, edited. Recall is the share of the edited passages that
are found to be copies of their originals. "Other" are passages that nobody planted and that are called copies, exact
ones left out: some are true ones. Shingles of 5 tokens (for code 8), 128 entries, threshold 0.7. rensa and datasketch
get the same words and no second look at a candidate.
"""

import builtins
import io
import keyword
import random
import re
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import show

from krontune.data_selection.duplicates import deduplicate

PASSAGES, PLANTED, WORDS = 8000, 100, (40, 300)
THRESHOLD, PERMUTATIONS, BANDS, SHINGLE = 0.7, 128, 16, 5


def passages(count: int) -> list[str]:
    """Distinct ones, from files of Python's library and of PyTorch in random order."""
    found: dict[str, None] = {}
    folders = [Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    random.Random(0).shuffle(paths)
    for path in paths:
        for text in re.split(r"\n\n(?=\S)", path.read_text(encoding="utf-8", errors="ignore")):
            if WORDS[0] <= len(text.split()) <= WORDS[1] and len(names_of(text)) >= 5:
                found[text] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def names_of(text: str) -> list[str]:
    """The names in it that a programmer chose; none where it is no Python."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    names = {token.string for token in tokens if token.type == tokenize.NAME and not keyword.iskeyword(token.string)}
    return sorted(name for name in names if not hasattr(builtins, name))


def renamed(share: float) -> Callable[[str, random.Random], str]:
    def edit(text: str, rng: random.Random) -> str:
        names = names_of(text)
        chosen = {name: f"v{rng.randrange(10**6)}" for name in rng.sample(names, max(1, round(share * len(names))))}
        return re.sub(r"\b[A-Za-z_]\w*\b", lambda match: chosen.get(match[0], match[0]), text)

    return edit


def spaced(text: str, rng: random.Random) -> str:
    lines = [line.replace(", ", " ,  ").replace(" = ", "  =   ") for line in text.split("\n")]
    return "\n".join(line for old in lines for line in ([old, ""] if rng.random() < 0.3 else [old]))


def commented(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    return "\n".join(f"{line}  # seen {rng.randrange(100)}" if rng.random() < 0.2 else line for line in lines)


def words_changed(text: str, rng: random.Random) -> str:
    return re.sub(r"\w+", lambda match: f"w{rng.randrange(10**6)}" if rng.random() < 0.03 else match[0], text)


def lines_dropped(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    return "\n".join(line for line in lines if rng.random() > 0.1) or lines[0]


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "none": lambda text, rng: text,
    "white space": spaced,
    "comments added": commented,
    "3 % of words changed": words_changed,
    "10 % of lines dropped": lines_dropped,
    "10 % of names changed": renamed(0.1),
    "50 % of names changed": renamed(0.5),
    "all names changed": renamed(1.0),
}


def ours(**options: str) -> Callable[[list[str]], dict[int, int]]:
    def run(texts: list[str]) -> dict[int, int]:
        found = deduplicate(texts, report_only=True, permutations=PERMUTATIONS, threshold=THRESHOLD, **options)  # type: ignore[arg-type]
        return {row: why["cluster"] for row, why in enumerate(found.reasons) if "copy" in why}

    return run


def shingles_of(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))]


def rensa(texts: list[str]) -> dict[int, int]:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)
    known, copies = [], {}
    for row, text in enumerate(texts):
        one = RMinHash(num_perm=PERMUTATIONS, seed=1)
        one.update(shingles_of(text))
        known.append(one)
        near = [other for other in index.query(one) if known[other].jaccard(one) >= THRESHOLD]
        if near:
            copies[row] = min(near)
        index.insert(row, one)
    return copies


def datasketch(texts: list[str]) -> dict[int, int]:
    from datasketch import MinHash, MinHashLSH

    index, known, copies = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS)), [], {}
    for row, text in enumerate(texts):
        one = MinHash(num_perm=PERMUTATIONS, seed=1)
        one.update_batch([shingle.encode() for shingle in shingles_of(text)])
        known.append(one)
        near = [other for other in index.query(one) if known[other].jaccard(one) >= THRESHOLD]
        if near:
            copies[row] = min(near)
        index.insert(row, one)
    return copies


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else PASSAGES
    texts = passages(count)
    rng = random.Random(1)
    planted: dict[int, tuple[str, int]] = {}
    for name, edit in EDITS.items():
        for row in rng.sample(range(count), PLANTED):
            planted[len(texts)] = name, row
            texts.append(edit(texts[row], rng))
    contenders = {"krontune, near": ours(method="near")}
    contenders["krontune, code (regex)"] = ours(method="code", language="python", lexer="regex")
    if find_spec("tree_sitter") and find_spec("tree_sitter_python"):
        contenders["krontune, code (tree-sitter)"] = ours(method="code", language="python", lexer="tree-sitter")
    contenders |= {name: run for name, run in (("rensa", rensa), ("datasketch", datasketch)) if find_spec(name)}
    columns = []
    for name, run in contenders.items():
        run(texts[:200])
        start = time.process_time()
        copies = run(texts)
        seconds = time.process_time() - start
        hits = dict.fromkeys(EDITS, 0)
        for row, (kind, original) in planted.items():
            # The original may itself be called a copy of an earlier passage.
            hits[kind] += row in copies and copies[row] in (original, copies.get(original))
        other = sum(row < count for row in copies)
        columns.append([*(f"{found / PLANTED:.2f}" for found in hits.values()), f"{other:,}"])
        columns[-1].append(f"{len(texts) / seconds:,.0f}")
        print(name, columns[-1], flush=True)
    rows = [[name, *cells] for name, *cells in zip([*EDITS, "other", "texts/CPU-s"], *columns, strict=True)]
    show(f"{len(texts):,} passages of Python: recall a kind of edit", ["", *contenders], rows)


main()
