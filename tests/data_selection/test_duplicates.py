"""Copies against plain sets of strings, planted copies of each kind, forbidden texts, and errors."""

import json
import random
import sys

import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Selection
from krontune.data_selection import duplicates as module
from krontune.data_selection.code_tokens import LANGUAGES, code_lexer
from krontune.data_selection.duplicates import deduplicate
from krontune.data_selection.ngrams import mix64
from krontune.data_selection.shingles import (
    band_rows,
    bands,
    candidate_pairs,
    jaccard,
    shingles,
    signatures,
    text_shingles,
)

WORDS = [f"word{i}" for i in range(300)]


def naive_shingles(text, width):
    words = text.lower().split()
    if len(words) < width:
        return {tuple(words)} if words else set()
    return {tuple(words[at : at + width]) for at in range(len(words) - width + 1)}


def naive_jaccard(one, other, width):
    a, b = naive_shingles(one, width), naive_shingles(other, width)
    return len(a & b) / len(a | b) if a | b else 0.0


def naive_deduplicate(texts, threshold, width):
    """The kept row of each row: that of an equal row, else the most similar of all earlier kept ones."""
    kept, owner = [], []
    for row, text in enumerate(texts):
        same = [other for other in range(row) if texts[other].lower().split() == text.lower().split()]
        best = max(((naive_jaccard(text, texts[other], width), -other) for other in kept), default=(0.0, 0))
        if same:
            owner.append(owner[same[0]])
        elif best[0] >= threshold:
            owner.append(-best[1])
        else:
            kept.append(row)
            owner.append(row)
    return owner


def edited(rng, text, changes):
    words = text.split()
    for _ in range(changes):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = [rng.choice(WORDS)]
    return " ".join(words)


def pool_with_copies(n, seed):
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        if texts and rng.random() < 0.5:
            texts.append(edited(rng, rng.choice(texts), rng.randrange(4)))
        else:
            texts.append(" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))))
    return texts


def owners(selection):
    return [reason["cluster"] for reason in selection.reasons]


def test_shingles_are_equal_exactly_where_the_token_tuples_are():
    texts = [*pool_with_copies(40, 0), "", "one", "ONE", "one two"]
    for width in (1, 2, 5):
        found = text_shingles(texts, width)
        parts = np.split(found.hashes, found.starts()[1:-1])
        seen = {}
        for text, part in zip(texts, parts, strict=True):
            words = text.lower().split()
            tuples = [tuple(words[at : at + width]) for at in range(max(len(words) - width, 0) + 1)] if words else []
            assert len(tuples) == len(part)
            for one, value in zip(tuples, part.tolist(), strict=True):
                assert seen.setdefault(one, value) == value
        assert len(set(seen.values())) == len(seen)


def test_names_count_by_their_first_place_in_the_shingle():
    def of(text):
        tokens = text.split()
        numbers = np.array([abs(hash(token)) for token in tokens], np.uint64)
        named = np.array([token.isalpha() for token in tokens])
        return shingles(numbers, np.array([len(tokens)]), len(tokens), named).hashes.tolist()

    assert of("a = a + b") == of("x = x + y")
    assert of("a = a + b") != of("x = y + x")
    assert of("a = a + b") != of("a = a - b")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_signatures_agree_in_a_share_of_entries_equal_to_the_jaccard_similarity(share):
    rng = np.random.default_rng(0)
    common = mix64(rng.integers(0, 2**63, 1000).astype(np.uint64))
    own = round(1000 * share * 2 / (1 + share))  # of 1000 a side, so that J = share
    one = np.concatenate([common[:own], mix64(rng.integers(0, 2**63, 1000 - own).astype(np.uint64))])
    two = np.concatenate([common[:own], mix64(rng.integers(0, 2**63, 1000 - own).astype(np.uint64))])
    found = module.Shingles(np.concatenate([one, two]), np.array([1000, 1000]))
    first, second = signatures(found, 4096, seed=3)
    assert abs((first == second).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4096)


def test_bands_are_as_wide_as_the_miss_rate_allows():
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        rows = band_rows(threshold, 128)
        assert rows == 1 or (1 - threshold**rows) ** (128 // rows) <= 0.01
        assert rows == 128 or (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 0.01
    assert band_rows(0.01, 4) == 1


def test_candidate_pairs_are_the_rows_that_agree_in_a_band():
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 12, (60, 3)).astype(np.uint64)
    expected = {(i, j) for j in range(60) for i in range(j) if (keys[i] == keys[j]).any()}
    assert set(map(tuple, candidate_pairs(keys, 60).tolist())) == expected
    few = candidate_pairs(np.zeros((50, 2), np.uint64), 3).tolist()
    assert sorted(map(tuple, few)) == sorted((i, j) for i in range(3) for j in range(i + 1, 50))
    assert len(candidate_pairs(np.empty((0, 3), np.uint64), 3)) == 0


def test_bands_agree_where_all_their_entries_do():
    signature = np.array([[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [2, 1, 3, 4, 9]], np.uint64)
    keys = bands(signature, 2)
    assert keys.shape == (3, 2)
    assert keys[0, 0] == keys[1, 0] != keys[2, 0]
    assert keys[0, 1] == keys[2, 1] != keys[1, 1]


def test_jaccard_is_that_of_sets():
    rng = np.random.default_rng(2)
    sets = [np.unique(rng.integers(0, 40, rng.integers(1, 30))).astype(np.uint64) for _ in range(30)]
    expected = [len(set(sets[0]) & set(s)) / len(set(sets[0]) | set(s)) for s in sets]
    assert np.allclose(jaccard(sets[0], sets), expected)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_copies_are_those_of_comparing_every_row_with_every_kept_one(threshold, seed, monkeypatch):
    texts = pool_with_copies(250, seed)
    monkeypatch.setattr(module, "band_rows", lambda threshold, permutations: 1)  # bands that miss nothing
    found = deduplicate(texts, threshold=threshold, shingle=3, permutations=64, report_only=True)
    assert owners(found) == naive_deduplicate(texts, threshold, 3)
    for row, reason in enumerate(found.reasons):
        if "similarity" in reason and reason["copy"] == "near":
            assert reason["similarity"] >= threshold
            # An exact copy of a near copy has the latter's similarity, which is its own.
            assert reason["similarity"] == pytest.approx(naive_jaccard(texts[row], texts[reason["cluster"]], 3))


def test_of_pairs_at_the_threshold_few_are_missed():
    texts = []
    for pair in range(300):
        words = [f"w{pair}x{at}" for at in range(64)]
        texts += [" ".join(words[:57]), " ".join(words[7:])]  # 53 shingles each, 46 shared: J = 46 / 60
    assert naive_jaccard(texts[0], texts[1], 5) == pytest.approx(46 / 60)
    found = deduplicate(texts, threshold=46 / 60, report_only=True)
    assert sum("copy" in reason for reason in found.reasons) >= 290


def test_the_kept_rows_name_the_rows_that_they_stand_for():
    texts = pool_with_copies(100, 2)
    kept, report = deduplicate(texts), deduplicate(texts, report_only=True)
    assert len(report) == 100
    assert kept.indices.tolist() == [row for row, reason in enumerate(report.reasons) if "copy" not in reason]
    listed = [copy for reason in kept.reasons for copy in reason.get("copies", [])]
    assert sorted([*listed, *kept.indices.tolist()]) == list(range(100))
    for row, reason in zip(kept.indices.tolist(), kept.reasons, strict=True):
        assert reason["cluster"] == row
        assert all(report.reasons[copy]["cluster"] == row for copy in reason.get("copies", []))
    assert sum(kept.details["left_out"].values()) == 100 - len(kept)


def test_case_and_white_space_do_not_matter_and_one_other_word_does():
    texts = ["Some words, here.", "some  words,\nHERE.", "some words there.", "", "  "]
    assert owners(deduplicate(texts, method="exact", report_only=True)) == [0, 0, 2, 3, 3]


def test_a_chain_of_small_steps_does_not_pull_in_what_does_not_resemble_the_kept_row():
    words = [f"w{i}" for i in range(60)]
    steps = [" ".join(words[at : at + 40]) for at in (0, 5, 10, 15, 20)]  # neighbours: J = 31/41, two steps: 26/46
    assert owners(deduplicate(steps, permutations=1024, report_only=True)) == [0, 0, 2, 2, 4]


def test_longest_keeps_the_longest_of_each_cluster():
    base = " ".join(WORDS[:40])
    texts = [base, base + " tail end", base.upper() + " TAIL end", "other words"]
    kept = deduplicate(texts, keep="longest")
    assert kept.indices.tolist() == [1, 3]
    assert kept.reasons[0]["copies"] == [0, 2]


def test_results_do_not_depend_on_batches_or_the_kind_of_source(tmp_path, monkeypatch):
    texts = pool_with_copies(120, 3)
    expected = deduplicate(texts)
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    of_file, of_iterator = deduplicate(str(path)), deduplicate(iter(texts))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    assert deduplicate(texts) == expected == of_file == of_iterator
    assert of_iterator.pool is None
    assert expected.apply(texts) == [texts[row] for row in expected.indices]


def test_a_template_repeated_often_is_one_cluster_and_few_comparisons(monkeypatch):
    rng = random.Random(4)
    base = " ".join(WORDS[:80])
    texts = [edited(rng, base, 1) for _ in range(400)]
    sizes = []
    real = module.candidate_pairs
    monkeypatch.setattr(module, "candidate_pairs", lambda *a: sizes.append(len(pairs := real(*a))) or pairs)
    found = deduplicate(texts)
    assert len(found) < 5
    assert sizes[0] <= 32 * module.PAIRS_A_ROW * 400 / 2


def test_forbidden_texts_are_found_inside_longer_rows_with_their_share():
    exam = [
        "What is the capital of France and which river flows through the city?",
        "short one",
        "never there at all ok",
    ]
    inside = f"Some page. {exam[0]} More of the page."
    half = "What is the capital of France and then something quite different follows here"
    pool = [inside, half, "short one", "short one and more", "clean text about nothing"]
    kept = deduplicate(pool, method="none", against={"exam": exam})
    assert kept.indices.tolist() == [1, 3, 4]
    assert kept.details["left_out"] == {"against:exam": 2}
    assert kept.details["against_rows"] == {"exam": [0, 2]}
    report = deduplicate(pool, method="none", against={"exam": exam}, report_only=True)
    assert report.reasons[0] == {"against": "exam", "against_row": 0, "overlap": 1.0}
    assert report.reasons[2] == {"against": "exam", "against_row": 1, "overlap": 1.0}
    assert report.reasons[1] == {"cluster": 1}


def test_overlap_is_the_share_of_distinct_shingles_of_the_forbidden_text():
    rng = random.Random(5)
    exam = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 30))) for _ in range(40)]
    pool = [edited(rng, " ".join(rng.sample(exam, 2)), rng.randrange(6)) for _ in range(60)]
    report = deduplicate(pool, method="none", against={"exam": exam}, overlap=0.5, shingle=3, report_only=True)
    hits = 0
    for text, reason in zip(pool, report.reasons, strict=True):
        own = naive_shingles(text, 3)
        shares = [len(own & naive_shingles(one, 3)) / len(naive_shingles(one, 3)) for one in exam]
        if max(shares) >= 0.5:
            hits += 1
            assert reason["overlap"] == pytest.approx(max(shares))
            assert shares[reason["against_row"]] == max(shares)
        else:
            assert "against" not in reason
    assert 10 < hits < 60


def test_a_row_with_a_forbidden_text_represents_nothing():
    text = " ".join(WORDS[:30])
    kept = deduplicate([text, text + " more", "else"], against={"exam": [text]}, overlap=1.0)
    assert kept.indices.tolist() == [2]
    kept = deduplicate([text + " x", text], against={"exam": [text + " x"]}, overlap=1.0)
    assert kept.indices.tolist() == [1]


# Of each language a piece of code; one with other names, comments and literals; one with another flow of values.
CODE = {
    "java": (
        "class Stack { int top; void push(int value) { items[top] = value; top = top + 1; } }",
        "class Pile {\n int n; // count\n void add(int x) { cells[n] = x; n = n + 7; } }",
        "class Stack { int top; void push(int value) { items[top] = top; value = top + 1; } }",
    ),
    "python": (
        "def mean(values, start=0):\n    total = start\n    for value in values:\n        total += value\n"
        "    return total / len(values)\n",
        "def avg(xs, s=12):\n    acc = s  # sum\n    for x in xs:\n      acc += x\n    return acc / len(xs)\n",
        "def mean(values, start=0):\n    total = values\n    for value in start:\n        total += total\n"
        "    return value / len(total)\n",
    ),
    "javascript": (
        "function greet(name) { const text = `hello ${name}`; console.log(text + name); return text.length; }",
        "function f(a) { /* c */ const b = `x`; console.log(b + a); return b.length; }",
        "function greet(name) { const text = `hello ${name}`; text.log(name + console); return length.name; }",
    ),
    "c": (
        "static int clamp(int v, int lo, int hi) { if (v < lo) return lo; if (v > hi) return hi; return v; }",
        "static int f(int a, int b, int c) { if (a < b) return b; if (a > c) return c; return a; }",
        "static int clamp(int v, int lo, int hi) { if (lo < hi) return v; if (lo > v) return hi; return hi; }",
    ),
}


@pytest.mark.parametrize("lexer", ["regex", "tree-sitter"])
@pytest.mark.parametrize("language", list(CODE))
def test_code_with_other_names_comments_and_literals_is_a_copy_and_with_another_flow_is_none(language, lexer):
    if lexer == "tree-sitter":
        pytest.importorskip("tree_sitter")
        pytest.importorskip(f"tree_sitter_{language}")
    original, renamed, flow = CODE[language]
    found = deduplicate([original, renamed, flow], method="code", language=language, lexer=lexer, report_only=True)
    assert found.reasons[1] == {"cluster": 0, "copy": "code", "similarity": 1.0}
    assert found.reasons[2] == {"cluster": 2}
    assert owners(deduplicate([original, renamed], report_only=True)) == [0, 1]


def test_code_that_is_all_comment_resembles_nothing():
    texts = ["# one comment\n", "# another\n# comment\n", "x = 1\n", "# one comment\n"]
    for lexer in ("regex", "auto"):
        found = deduplicate(texts, method="code", language="python", lexer=lexer, report_only=True)
        assert owners(found) == [0, 1, 2, 0]


def test_the_regex_lexer_knows_comments_strings_and_numbers():
    _, lexer = code_lexer("python", "regex")
    tokens, names = lexer('x1 = f"a # b" + 1.5e-3  # c\nif \'it\\\'s\': """doc\n# no\n"""')
    assert tokens == ["x1", "=", '""', "+", "0", "if", '""', ":", '""']
    assert names == [True, *[False] * 8]
    _, lexer = code_lexer("java", "regex")
    assert lexer("/* a\n b */ char c = '\"'; // \"x\nfoo();")[0] == [
        *("char", "c", "=", '""', ";"),
        *("foo", "(", ")", ";"),
    ]


def test_every_language_has_a_regex_lexer():
    for language in LANGUAGES:
        name, lexer = code_lexer(language, "regex")
        assert name == "regex"
        assert lexer("x = 1")[0] == ["x", "=", "0"]


def test_a_selection_of_unique_rows_can_be_saved_and_loaded(tmp_path):
    found = deduplicate(pool_with_copies(50, 6), against={"exam": ["a b c"]})
    found.save(tmp_path)
    assert Selection.load(tmp_path) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fuzzy"}, "near, code, exact, none"),
        ({"threshold": 0}, "above 0 and at most 1"),
        ({"overlap": 1.5}, "above 0 and at most 1"),
        ({"shingle": 0}, "shingle=0"),
        ({"permutations": 1}, "permutations=1"),
        ({"keep": "last"}, "'first' or 'longest'"),
        ({"method": "code"}, "give language"),
        ({"language": "python"}, "goes with method='code'"),
        ({"method": "code", "language": "cobol"}, "must be one of python"),
        ({"method": "code", "language": "python", "lexer": "flex"}, "'tree-sitter' or 'regex'"),
        ({"method": "code", "language": "bash", "lexer": "tree-sitter"}, "pip install tree-sitter tree-sitter-bash"),
        ({"method": "none"}, "nothing to look for"),
        ({"against": ["text"]}, "texts by name"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(DataSelectionError, match=message):
        deduplicate(["a text"], **options)


def test_an_empty_pool_and_a_null_text_are_refused():
    with pytest.raises(DataSelectionError, match="pool is empty"):
        deduplicate([])
    with pytest.raises(DataSelectionError, match="item 1"):
        deduplicate([{"text": "a"}, {"text": None}])


def test_a_pool_that_changes_between_the_readings_is_refused():
    class Shrinking:
        """Rows of which the last ones are gone at the second reading."""

        left = 2

        def __iter__(self):
            text = " ".join(WORDS[:30])
            texts = [text, "other", text + " more"]
            self.left -= 1
            return iter(texts if self.left else texts[:2])

    with pytest.raises(DataSelectionError, match="other rows at the second reading"):
        deduplicate(Shrinking())


def test_importing_does_not_import_torch_or_tree_sitter():
    import subprocess

    code = "import sys; import krontune.data_selection.duplicates; print({'torch', 'tree_sitter'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
