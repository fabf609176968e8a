import json
import random

import pytest

from krontune.recipes.faults import RecipeError
from krontune.recipes.overrides import apply_overrides
from krontune.recipes.yaml12 import read

RECIPE = read(
    "name: x\nbase: {model: m}\nhub:\nstages:\n- {stage: sft, trainer: {n: [1, 2]}}\n"
    "- {stage: rl, k: 1}\n- {stage: sft}\nempty: []\n",
    "r",
)


def override_faults(*overrides):
    with pytest.raises(RecipeError) as caught:
        apply_overrides(RECIPE, overrides)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=y", ("name",), "y"),
        ("name=1e-5", ("name",), 1e-5),
        ("name=on", ("name",), "on"),
        ("name=", ("name",), None),
        ("name='a: #b'", ("name",), "a: #b"),
        ("name=a=b", ("name",), "a=b"),
        (" name = y ", ("name",), "y"),
        ("name=[1, {a: 2e-3}]", ("name",), [1, {"a": 2e-3}]),
        ("base.model=foo", ("base", "model"), "foo"),
        ("base.new=true", ("base", "new"), True),
        ("base=3", ("base",), 3),
        ("new.deep.key=1", ("new", "deep", "key"), 1),
        ("hub.repo=a/b", ("hub", "repo"), "a/b"),
        ("stages.1.trainer.max_steps=10", ("stages", 1, "trainer", "max_steps"), 10),
        ("stages.rl.trainer.max_steps=10", ("stages", 1, "trainer", "max_steps"), 10),
        ("stages.0.trainer.n.1=7", ("stages", 0, "trainer", "n", 1), 7),
        ("stages.rl={stage: rl}", ("stages", 1), {"stage": "rl"}),
        ("stages.sft.x=1", ("stages", 0, "x"), 1),
        ("stages.sft-2.trainer.max_steps=3", ("stages", 2, "trainer", "max_steps"), 3),
    ],
)
def test_override_sets_one_value_and_reports_itself_as_its_place(override, path, value):
    before = json.dumps(RECIPE.data)
    document = apply_overrides(RECIPE, [override])
    found = document.data
    for segment in path:
        found = found[segment]
    assert found == value and type(found) is type(value)
    assert document.where(path) == f"override {override!r}"
    assert json.dumps(RECIPE.data) == before


def test_override_reports_for_what_it_made_and_for_nothing_else():
    document = apply_overrides(RECIPE, ["stages.1.trainer.steps=1", "base={model: {a: 1}}"])
    assert document.where(("stages", 1, "trainer")) == "override 'stages.1.trainer.steps=1'"
    assert document.where(("stages", 1, "trainer", "missing")) == "override 'stages.1.trainer.steps=1'"
    assert document.where(("base", "model", "a")) == "override 'base={model: {a: 1}}'"
    assert document.where(("stages", 1)) == RECIPE.where(("stages", 1)) == "r:6:3"
    assert document.where(("stages", 1, "k")) == "r:6:15"


def test_later_override_wins():
    document = apply_overrides(RECIPE, ["name=a", "name=b"])
    assert (document.data["name"], document.where(["name"])) == ("b", "override 'name=b'")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "an override is written path.to.key=value"),
        ("=3", "an override is written path.to.key=value"),
        ("a..b=1", "an override is written path.to.key=value"),
        ("name.x=1", "name is 'x' and has no key 'x'"),
        ("stages.rl.k.x=1", "stages.rl.k is a number and has no key 'x'"),
        ("stages.9.x=1", "no item '9': stages has 3 items, numbered from 0"),
        ("stages.-1.x=1", "no item '-1': stages has 3 items, numbered from 0"),
        (
            "stages.rll.x=1",
            "no item 'rll': stages has 3 items, numbered from 0, with the stages sft, rl, sft-2; did you mean 'rl'?",
        ),
        (
            "stages.sft-3.x=1",
            "no item 'sft-3': stages has 3 items, numbered from 0, with the stages sft, rl, sft-2; did you mean "
            "'sft-2'?",
        ),
        ("empty.0=1", "no item '0': empty is an empty list"),
        ("stages.0.trainer.n.x=1", "no item 'x': stages.0.trainer.n has 2 items, numbered from 0"),
        ("name=#fff", "not all of '#fff' is a value; put it in YAML quotes"),
        ("name=a #b", "not all of 'a #b' is a value; put it in YAML quotes"),
        ("name=---", "not all of '---' is a value; put it in YAML quotes"),
        ("name=a: b", "'a: b' must be written {key: value} or [item], or in quotes"),
        ("name=- a", "'- a' must be written {key: value} or [item], or in quotes"),
        ("name=[1", "a ',' or ']' is missing; the bracket was opened in line 1"),
        ("name=!x y", "the tag '!x' is not allowed here; remove it"),
        ("name=*.jsonl", "'*' begins an alias, and no name of one follows; put the value in quotes"),
        (".".join("a" * 65) + "=1", "a path has at most 64 steps, this one has 65"),
    ],
)
def test_override_that_cannot_be_applied_says_why(override, message):
    shown = override if len(override) <= 60 else override[:57] + "..."
    assert override_faults(override) == [f"override {shown!r}: {message}"]


def test_faults_of_all_overrides_are_found_at_once():
    assert override_faults("name", "name=y", "stages.9=1", "base.x=[") == [
        "override 'base.x=[': a value is missing here",
        "override 'name': an override is written path.to.key=value",
        "override 'stages.9=1': no item '9': stages has 3 items, numbered from 0",
    ]


def test_random_overrides_raise_nothing_but_recipe_error():
    rng = random.Random(3)
    pieces = [
        "stages",
        "sft",
        "rl",
        "0",
        "9",
        ".",
        ".",
        "=",
        "=",
        "[",
        "]",
        "{a: 1}",
        "'",
        " ",
        "#",
        "*x",
        "\ud800",
    ]
    applied = 0
    for _ in range(4000):
        override = "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
        try:
            apply_overrides(RECIPE, [override])
            applied += 1
        except RecipeError as error:
            assert all(fault.where.startswith("override ") for fault in error.faults)
    assert applied > 50
