import gzip
import json
import re
import struct
import zlib
from collections import Counter
from functools import cache
from importlib.resources import files

import pytest

from krontune.recipes.data import build

DATA = files("krontune.recipes.data")
LONG = "This plain sentence has exactly ten words in it today. "  # ten words


@cache
def shipped_rows() -> list[dict[str, str]]:
    text = gzip.decompress((DATA / "prose.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


@cache
def provenance() -> dict[str, list[str]]:
    """The cells of each source's row in PROVENANCE.md after the name."""
    lines = (DATA / "PROVENANCE.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {name: cells for name, *cells in rows}


# --- the file ---


def test_every_row_has_text_and_a_source_of_the_provenance_page() -> None:
    for row in shipped_rows():
        assert set(row) == {"text", "source"}
        assert row["text"] == " ".join(row["text"].split()) != ""
        assert row["source"] in provenance()


def test_sizes_are_in_bounds() -> None:
    assert 900_000 <= len((DATA / "prose.jsonl.gz").read_bytes()) <= 2_000_000
    assert 5_000 <= len(shipped_rows()) <= 8_500
    for row in shipped_rows():
        assert 20 <= len(row["text"].split()) <= 120, row


def test_no_text_appears_twice() -> None:
    texts = [row["text"].casefold() for row in shipped_rows()]
    assert len(set(texts)) == len(texts)


def test_no_source_dominates_and_books_are_a_third() -> None:
    counts = Counter(row["source"] for row in shipped_rows())
    books = sum(counts[source.name] for source in build.SOURCES if source.read)
    assert len(counts) >= 5
    assert max(counts.values()) <= 0.2 * len(shipped_rows())
    assert books >= 0.3 * len(shipped_rows())


def test_rows_of_all_sources_are_mixed() -> None:
    head = Counter(row["source"] for row in shipped_rows()[:800])
    assert set(head) == set(provenance())


def test_the_provenance_page_counts_what_is_shipped() -> None:
    texts = shipped_rows()
    for name, (_, _, _, paragraphs, size) in provenance().items():
        own = [row["text"] for row in texts if row["source"] == name]
        assert (len(own), sum(len(text.encode()) for text in own)) == (int(paragraphs), int(size))


def test_every_source_names_version_licence_and_holders() -> None:
    assert list(provenance()) == [source.name for source in build.SOURCES]
    for name, (origin, licence, holders, _, _) in provenance().items():
        assert re.search(r"\d+\.\d+", origin), name
        assert licence and holders


def test_every_source_has_its_licence_among_the_licence_texts() -> None:
    text = (DATA / "LICENSES.txt").read_text(encoding="utf-8")
    titles = re.findall(r"^=+\n(.+)\n=+$", text, re.M)
    for name, (_, licence, *_) in provenance().items():
        (title,) = [title for title in titles if re.search(rf"\b{name}\b", title.split(":")[0])]
        kinds = ("MIT", "BSD-3-Clause", "PSF-2.0", "Apache-2.0", "public domain")
        assert any(kind in title for kind in kinds if kind in licence), name


# --- paragraphs out of text ---


def test_a_paragraph_of_twenty_to_120_words_is_kept_on_one_line() -> None:
    text = (LONG * 2).strip()
    assert build.prose_paragraphs(text.replace(" words", "\nwords")) == [text]


@pytest.mark.parametrize("words, kept", [(19, 0), (20, 1), (21, 1), (119, 1), (120, 1), (121, 0), (300, 0)])
def test_word_bounds_hold_for_one_sentence(words: int, kept: int) -> None:
    sentence = "Once " + "upon " * (words - 2) + "again."
    assert len(build.prose_paragraphs(sentence)) == kept


@pytest.mark.parametrize("sentences", [1, 2, 12, 13, 14, 24, 25, 37])
def test_a_long_paragraph_is_cut_at_sentence_ends_and_short_tails_go(sentences: int) -> None:
    found = [len(piece.split()) for piece in build.prose_paragraphs(LONG * sentences)]
    full, rest = divmod(sentences, 12)
    assert found == [120] * full + [10 * rest] * (rest >= 2)


def test_a_long_paragraph_is_not_cut_after_abbreviations_and_initials() -> None:
    names = "Mr. Brown met Dr. J. Watson, as Fig. A. Bell shows, e.g. now and then at St. James going home. "
    for piece in build.pieces(names * 20):
        assert piece.startswith("Mr. Brown") and piece.endswith("home.")


INDENTED = f"For example::\n\n    {LONG * 3}\n    x = 1\n"
CODE = {
    "indented block": INDENTED,
    "fence": f"```python\n{LONG * 3}\n```",
    "fence with empty lines": f"```python\nx = 1\n\n{LONG * 4}\n\ny = 1\n```",
    "doctest prompt": f">>> {LONG * 3}\n{LONG}",
    "numpy parameters": f"Parameters\n----------\nx : array_like\n    {LONG * 3}\n",
    "google arguments": f"Args:\n    x (int): {LONG * 3}\n",
    "field list": f":param x: {LONG * 3}",
    "bullets": f"- {LONG * 3}\n- {LONG * 2}",
    "numbered list": f"1. {LONG * 3}",
    "directive": f".. note:: {LONG * 3}",
    "table": f"| {LONG * 3} | {LONG} |",
    "code in a sentence": f"{LONG * 3}Then call f(x) -> y and look at it.",
    "address": f"{LONG * 3}See https://example.org for more.",
    "mostly digits": "A " + "12 34 56 " * 10 + "end.",
    "no full stop": (LONG * 3).strip(" ."),
    "starts in the middle": LONG.lower() * 3,
}


@pytest.mark.parametrize("text", CODE.values(), ids=CODE.keys())
def test_what_is_not_prose_is_dropped_and_its_neighbours_stay(text: str) -> None:
    before, after = "The first part. " + LONG * 2, "The second part. " + LONG * 3
    assert build.prose_paragraphs(text) == []
    assert build.prose_paragraphs(f"{before}\n\n{text}\n\n{after}") == [before.strip(), after.strip()]


def test_a_section_title_is_taken_off_its_paragraph() -> None:
    assert build.prose_paragraphs(f"Notes\n-----\n{LONG * 2}") == [(LONG * 2).strip()]


@pytest.mark.parametrize(
    "marked, expected",
    [
        ("a ``name`` and `other`", "a name and other"),
        (":class:`~numpy.ndarray` or :func:`os.path.join`", "ndarray or join"),
        ("[`~models.Bert`] in [the guide](https://example.org)", "models.Bert in the guide"),
        ("`the guide <https://example.org>`_ says [1]_", "the guide says"),
        ("**bold** and *slanted* in a/*.json or b/*/*.json", "bold and slanted in a/*.json or b/*/*.json"),
        ("snake_case and __init__ stay", "snake_case and __init__ stay"),
    ],
)
def test_inline_markup_is_taken_off(marked: str, expected: str) -> None:
    assert build.plain(marked) == expected


# --- sources ---


def test_docstrings_of_modules_classes_and_functions_are_found() -> None:
    code = (
        '"""M."""\n'
        'class C:\n    """C."""\n'
        '    async def f(self):\n        """F.\n\n        Its code::\n\n            in\n        """\n'
        "def g(): pass\n"
    )
    assert [text for text in build.docstrings(code) if text] == ["M.", "C.", "F.\n\nIts code::\n\n    in"]
    assert list(build.docstrings("not python at all")) == []


def test_tests_vendored_code_and_other_licences_are_left_out(tmp_path) -> None:
    for name, code in {
        "a.py": '"""Kept."""',
        "tests/b.py": '"""Test."""',
        "_vendored/c.py": '"""Vendored."""',
        "d.py": '# Permission is hereby granted, free of charge\n"""Other."""',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    assert list(build.docstrings_under(tmp_path)) == ["Kept."]


def test_paragraphs_that_start_alike_count_once_and_the_cap_holds() -> None:
    source = next(source for source in build.SOURCES if not source.read)
    texts = [f"Number {i // 2} of many {LONG * 2}" + LONG * (i % 2) for i in range(4 * build.DOC_CAP)]
    chosen = build.choose(source, texts, set())
    assert len(chosen) == build.DOC_CAP
    assert len({text.split()[1] for text in chosen}) == build.DOC_CAP
    assert chosen == build.choose(source, texts, set())
    assert build.choose(source, texts[:6], {" ".join(texts[0].lower().split()[:8])}) != []
    seen: set[str] = set()
    assert len(build.choose(source, texts[:6], seen)) == 3 == len(seen)
    assert build.choose(source, texts[:6], seen) == []


@pytest.mark.parametrize("version", [2, 3])
def test_novels_are_read_from_serialised_r_vectors(version: int) -> None:
    def chunk(lines: list[str]) -> bytes:
        data = b"X\n" + struct.pack(">iii", version, 0, 0)
        if version == 3:
            data += struct.pack(">i", 5) + b"UTF-8"
        data += struct.pack(">ii", 16, len(lines))
        for line in lines:
            data += struct.pack(">ii", 0x00040009, len(line.encode())) + line.encode()
        return struct.pack(">i", len(data)) + zlib.compress(data)

    text = build.austen(chunk(["One--two", "", "_three_ é"]) + chunk(["four"]))
    assert text == "One - two\n\nthree é\n\nfour\n"


def test_the_jargon_file_comes_without_appendices_marks_and_crude_entries() -> None:
    body = "\nChapter 1. Slang\n\n   [common] See {foo}.\n\n   Pagan entry.\n\nAppendix A. More\n\n   Mel.\n"
    text = build.jargon(gzip.compress(("Contents\n" + body).encode()))
    assert text.split("\n\n") == ["\nChapter 1. Slang", "See foo."]


def test_a_missing_debian_package_is_named_with_the_command_that_gets_it(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="apt-get download r-cran-janeaustenr"):
        build.build(tmp_path / "out", tmp_path)
