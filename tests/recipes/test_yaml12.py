import json
import math
import pickle
import random

import pytest
import yaml

from krontune.recipes.faults import RecipeError
from krontune.recipes.yaml12 import MAX_DEPTH, MAX_NODES, read


def faults_of(text, name="r.yaml"):
    with pytest.raises(RecipeError) as caught:
        read(text, name)
    return str(caught.value).split("\n")


# ---------------------------------------------------------------- values

SCALARS = [
    ("1e-5", 1e-5), ("1E5", 1e5), ("2e+3", 2e3), (".5", 0.5), ("-.5", -0.5), ("5.", 5.0), ("5.e3", 5e3),
    ("1.0", 1.0), ("+1.5", 1.5), (".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf),
    ("12", 12), ("012", 12), ("-012", -12), ("+3", 3), ("0o17", 15), ("0x1F", 31), ("0", 0),
    ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False), ("FALSE", False),
    ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None),
    ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"), ("tRUE", "tRUE"),
    ("2024-01-31", "2024-01-31"), ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("0b11", "0b11"),
    ("0X1F", "0X1F"), ("0o8", "0o8"), ("-0x1F", "-0x1F"), ("1e", "1e"), (".", "."), ("e5", "e5"),
    ("\u0661", "\u0661"), ("nan", "nan"), ("inf", "inf"), ("=", "="), ("<<", "<<"), ("1.2.3", "1.2.3"),
    ("'12'", "12"), ('"true"', "true"), ("'~'", "~"), ('""', ""), ("|-\n  1", "1"),
    ("!!str 12", "12"), ("!!int '12'", 12), ("!!float 3", 3.0), ("!!bool 'true'", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalar_is_read_as_the_yaml_1_2_core_schema_says(text, value):
    got = read(f"a: {text}\n", "r").data["a"]
    assert (type(got), got) == (type(value), value)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_nan_is_a_number(text):
    assert math.isnan(read(f"a: {text}", "r").data["a"])


def random_data(rng, depth=0):
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.randint(-(10**9), 10**9)
    if kind == 2:
        return rng.gauss(0, 1) * 10.0 ** rng.randint(-8, 8)
    if kind < 6:
        return "".join(rng.choice("ab 1.:#-'\"{}[],~é\n") for _ in range(rng.randrange(6)))
    if kind == 6:
        return [random_data(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {f"k{n}": random_data(rng, depth + 1) for n in range(rng.randrange(4))}


def test_json_is_read_as_json_reads_it():
    rng = random.Random(0)
    for size in range(150):
        data = {f"key{n}": random_data(rng) for n in range(size % 7 + 1)}
        text = json.dumps(data, ensure_ascii=False, indent=rng.choice([None, 1]))
        assert read(text, "r").data == json.loads(text)


def test_aliases_give_separate_copies():
    data = read("a: &x {v: [1]}\nb: *x\n", "r").data
    assert data["a"] == data["b"]
    data["a"]["v"].append(2)
    assert data["b"] == {"v": [1]}


def test_merge_keys_fill_in_what_the_mapping_does_not_give():
    text = "one: &one {r: 1, s: 1}\ntwo: &two {r: 2, t: 2}\nboth: {<<: [*one, *two], s: 9}\n"
    assert read(text, "r").data["both"] == {"r": 1, "s": 9, "t": 2}


def test_quoted_merge_sign_is_a_plain_key():
    assert read("'<<': 3", "r").data == {"<<": 3}


def test_bytes_and_a_byte_order_mark_are_read():
    assert read("\ufeffa: é".encode(), "r").data == read("\ufeffa: é", "r").data == {"a": "é"}


# ---------------------------------------------------------------- positions

PLACED = read(
    """\
# a comment
name: x
base: {model: m, "quantization": nf4}
stages:
  - stage: sft
    trainer: &t
      learning_rate: 1
      n: [3, 55]
  - {stage: rl, trainer: *t}
  - *t
""",
    "r.yaml",
)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "2:1"),
        (("name",), "2:1"),
        (("base",), "3:1"),
        (("base", "model"), "3:8"),
        (("base", "quantization"), "3:18"),
        (("stages", 0), "5:5"),
        (("stages", 0, "trainer", "learning_rate"), "7:7"),
        (("stages", 0, "trainer", "n", 1), "8:14"),
        (("stages", 1), "9:5"),
        (("stages", 1, "trainer"), "9:17"),
        (("stages", 1, "trainer", "n"), "8:7"),
        (("stages", 2), "10:5"),
    ],
)
def test_position_is_that_of_the_key_or_the_list_item(path, place):
    assert PLACED.where(path) == f"r.yaml:{place}"


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("stages", 0, "sft", "trainer", "learning_rate"), "7:7"),  # the tag of a union
        (("stages", 0, "sft", "trainer", "n", "list[int]", 1, "int"), "8:14"),
        (("stages", 0, "sft", "trainer", "function-wrap[check()]"), "6:5"),
        (("stages", 0, "sft", "trainer", "missing"), "6:5"),
        (("stages", 0, "sft", "name"), "5:5"),  # missing there, although the top level has a `name`
        (("stages", 7, "sft", "x"), "4:1"),
        (("missing",), "2:1"),
        (("stages", -1), "4:1"),
        (("stages", True), "4:1"),
    ],
)
def test_segments_that_the_data_lacks_are_passed_over(path, place):
    assert PLACED.where(path) == f"r.yaml:{place}"


def test_key_that_is_named_like_a_tag_does_not_mislead():
    document = read("stages:\n- stage: sft\n  sft: {}\n  trainer: {x: 1}\n", "r")
    assert document.where(("stages", 0, "sft", "trainer", "x")) == "r:4:13"
    assert document.where(("stages", 0, "sft", "sft")) == "r:3:3"


def naive_places(node, path=()):
    places = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            places[(*path, key.value)] = key.start_mark
            places |= naive_places(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*path, index)] = item.start_mark
            places |= naive_places(item, (*path, index))
    return places


def test_positions_equal_those_of_a_plain_walk():
    rng = random.Random(1)
    for size in range(60):
        data = {f"key{n}": random_data(rng) for n in range(size % 5 + 1)}
        text = yaml.safe_dump(data, default_flow_style=rng.choice([None, True, False]), indent=rng.choice([2, 3]))
        document = read(text, "r")
        for path, mark in naive_places(yaml.compose(text, yaml.SafeLoader)).items():
            assert document.where(path) == f"r:{mark.line + 1}:{mark.column + 1}"


# ---------------------------------------------------------------- refusals

REFUSED = [
    ("a:\n\tb: 1", "2:1: a tab cannot indent; use spaces"),
    ("a: 'x\n", "1:4: the quoted text that begins here is never closed"),
    ("a: [1,\nb: 2", "2:5: a ',' or ']' is missing; the bracket was opened in line 1"),
    ("a: {b: 1, c", "1:12: a ',' or '}' is missing; the bracket was opened in line 1"),
    ("a: b: c", "1:5: a ': ' cannot stand here; put the value in quotes or indent it"),
    ("a: 1\nb\nc: 2", "2:1: a key must stand here, and no ': ' follows this text"),
    ("a: 1\nb\n", "2:1: a key must stand here, and no ': ' follows this text"),
    ("a: - b", "1:4: a list item '- ' cannot stand here; begin a new line for it"),
    ("a: @x", "1:4: a value cannot begin with '@'; put it in quotes"),
    ("a: \"x\" y", "1:8: this does not fit the block of line 1; check indentation and quotes"),
    ("a: |x\n  y",
     "1:5: after '|' or '>' only '+', '-', a digit from 1 to 9 or a comment may stand in the line"),
    ("%FOO\n%YAML x\n---\na: 1",
     "2:7: a line that begins with '%' is not allowed here; put the text in quotes"),
    ("%YAML 2.0\n---\na: 1", "1:1: only YAML 1 is read; remove the line %YAML"),
    ("a: *b", "1:4: there is no anchor &b above; put the value in quotes if it is text"),
    ("a: *.jsonl", "1:5: '*' begins an alias, and no name of one follows; put the value in quotes"),
    ("a: &x 1\nb: &x 2", "2:4: this anchor was already given in line 1; choose another name"),
    ("a: &x [*x]", "1:4: this value contains an alias to itself"),
    ("a: &x {<<: *x}", "1:4: this value contains an alias to itself"),
    ("<<: 3", "1:1: '<<' takes an alias to a mapping, or a list of them"),
    ("a: 1\n---\nb: 2", "2:1: a file holds one recipe; remove this second document"),
    ("", "1:1: the recipe is empty; it must be a mapping of keys"),
    ("# only a comment\n", "1:1: the recipe is empty; it must be a mapping of keys"),
    ("---\n", "1:1: the recipe is empty; it must be a mapping of keys"),
    ("\n- 1", "2:1: a recipe must be a mapping of keys, not a list"),
    ("yes", "1:1: a recipe must be a mapping of keys, not text"),
    ("1: a", "1:1: a key must be text, and this is a number; put it in quotes: '1'"),
    ("true: a", "1:1: a key must be text, and this is true or false; put it in quotes: 'true'"),
    ("~: a", "1:1: a key must be text, and this is null; put it in quotes: '~'"),
    ("[a]: b", "1:1: a key must be text, not a list or a mapping"),
    ("a: !foo 3", "1:4: the tag '!foo' is not allowed here; remove it"),
    ("a: ! 3", "1:4: the tag '!' is not allowed here; remove it"),
    ("a: !e!x 3", "1:4: tags (!name) are not allowed; put the value in quotes if it is text"),
    ("a: !!python/object:os.system {}",
     "1:4: the tag '!!python/object:os.system' is not allowed here; remove it"),
    ("a: !!timestamp 2024-01-01", "1:4: the tag '!!timestamp' is not allowed here; remove it"),
    ("a: !!int [1]", "1:4: the tag '!!int' is not allowed here; remove it"),
    ("a: !!int x", "1:4: 'x' is not what its tag !!int says"),
    ("a: 1e999", "1:4: '1e999' is too large for a number; write .inf for infinity"),
    ("a: " + "9" * 500, "1:4: a number of 500 digits is too long; 400 are allowed"),
    ('a: "\\q"', "1:6: 'q' after a backslash is not an escape; use single quotes"),
    ('a: "\\u12"', "1:7: this escape needs more digits; use single quotes if none is meant"),
    ('a: "\\ud800"', "1:4: an escape here is half of a character; write the character itself"),
    ('a: "\\UFFFFFFFF"', "1:7: the number in this escape or directive is out of range"),
    ("a: b\x07", "1:5: character U+0007 is not allowed in YAML"),
    ("a: 1\nb: \ud800", "2:4: character U+D800 is not allowed in YAML"),
    (b"a: 1\nbb: \xff", "2:5: byte 0xff is not UTF-8 text; save the file as UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "fault"), REFUSED)
def test_what_is_refused_says_where_and_why(text, fault):
    assert faults_of(text) == ["r.yaml:" + fault]


def test_all_duplicate_keys_are_found_at_once_with_both_positions():
    assert faults_of("a: 1\nb: {c: 1, c: 2}\na:\n  - d: 1\n    d: 2\n'a': 3\n", "r") == [
        "r:2:11: key 'c' is given twice; the first stands at r:2:5",
        "r:3:1: key 'a' is given twice; the first stands at r:1:1",
        "r:5:5: key 'd' is given twice; the first stands at r:4:5",
        "r:6:1: key 'a' is given twice; the first stands at r:1:1",
    ]


def test_faults_of_several_kinds_are_found_at_once_and_before_a_syntax_error():
    assert faults_of("a: !x 1\n2: b\na: 1\n", "r") == [
        "r:1:4: the tag '!x' is not allowed here; remove it",
        "r:2:1: a key must be text, and this is a number; put it in quotes: '2'",
        "r:3:1: key 'a' is given twice; the first stands at r:1:1",
    ]
    assert faults_of("a: !x 1\nb: [\n", "r") == [
        "r:1:4: the tag '!x' is not allowed here; remove it",
        "r:3:1: a value is missing here",
    ]


def alias_bomb():
    lines = ["a0: &a0 [" + ",".join("1" * 10) + "]"]
    lines += [f"a{n}: &a{n} [" + ",".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 8)]
    return "\n".join(lines)


def test_alias_bomb_is_refused():
    (fault,) = faults_of(alias_bomb())
    assert f"more than {MAX_NODES} values, aliases counted" in fault


def test_merge_bomb_is_refused():
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [" + ",".join([f"*a{n - 1}"] * 10) + "]}" for n in range(1, 9)]
    (fault,) = faults_of("\n".join(lines))
    assert f"more than {MAX_NODES} values, aliases counted" in fault


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        "a: " + "{b: " * 5000,
        "\n".join(" " * n + "a:" for n in range(200)),
        "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000)),
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: *a{n - 1}}}" for n in range(1, 2000)),
        "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{1: *a{n - 1}}}" for n in range(1, 2000)),
    ],
    ids=["lists", "mappings", "block", "aliases", "merges", "refused keys"],
)
def test_deep_nesting_is_refused(text):
    assert any(f"nested more than {MAX_DEPTH} deep" in fault for fault in faults_of(text))


def test_nesting_up_to_the_cap_is_read():
    value = read("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "r").data["a"]
    for _ in range(MAX_DEPTH - 2):
        (value,) = value
    assert value == []


def test_random_bytes_raise_nothing_but_recipe_error():
    rng = random.Random(2)
    alphabet = "{}[]:,-?!&*#|>'\"%@`~<=. \t\n\r\\01eExUuab\x85\u2028\x00\ufeff\ud800"
    seeds = [
        'name: x\nstages:\n  - {stage: sft, r: 10}\n  - &a {<<: *a}\nbase: "q\\u0041"\n',
        "%YAML 1.2\n---\na: !!int 3\n? b\n: |\n  x\n",
        "a: &x [1, 'b', .inf, 0x1F]\nb: *x\n<<: {c: 1}\n",
    ]
    outcomes = {"read": 0, "refused": 0}
    for round_ in range(6000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randrange(1, 5)):
            text.insert(rng.randrange(len(text)), rng.choice(alphabet))
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        signs = "a: " + "".join(rng.choice(alphabet) for _ in range(rng.randrange(30)))
        try:
            read(["".join(text), noise, signs][round_ % 3], "r")
            outcomes["read"] += 1
        except RecipeError as error:
            outcomes["refused"] += 1
            assert error.faults and all(fault.where.startswith("r:") for fault in error.faults)
            assert "yaml." not in str(error) and "Error" not in str(error)
    assert min(outcomes.values()) > 200


def test_document_survives_pickling():
    document = read("name: x", "r")
    again = pickle.loads(pickle.dumps(document))
    assert again == document and again.where(["name"]) == "r:1:1"
