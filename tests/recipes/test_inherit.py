"""`extends:`: what a recipe takes over, and where its faults stand."""

import pytest

from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.run_folder import recipe_text

CHILD = """\
extends: small.yaml
name: child
stages:
  - stage: sft
    trainer: {learning_rate: 5e-4}
"""


@pytest.fixture
def child(small):
    """Writes a recipe beside small.yaml and returns its path."""

    def write(text, name="child.yaml"):
        (small.parent / name).write_text(text)
        return small.parent / name

    return write


def faults(file) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(file)
    return str(caught.value).replace(f"{file.parent}/", "").split("\n")


def test_a_recipe_takes_over_all_but_what_it_says_itself(small, child):
    recipe, parent = load(child(CHILD)), load(small)
    assert recipe.name == "child" and recipe.description == ""
    assert [stage.stage for stage in recipe.stages] == ["select", "sft", "rl", "verify"]
    trainer = recipe.stage("sft").trainer
    assert (trainer.max_steps, trainer.learning_rate) == (2, 5e-4)
    assert recipe.stage("rl") == parent.stage("rl") and recipe.base == parent.base
    assert "extends" not in recipe_text(recipe)
    assert load(child(CHILD), ["stages.sft.trainer.max_steps=9"]).stage("sft").trainer.max_steps == 9


def test_lists_and_sources_are_replaced_and_null_takes_away(child):
    file = child(
        "extends: small.yaml\nname: x\nseed: 3\nstages:\n"
        "- {stage: select, raw: {shipped: prose}}\n"
        "- {stage: rl, credit: null, task: {n: [4, 6]}}\n"
    )
    recipe = load(file)
    assert recipe.stage("select").raw[0].shipped == "prose" and recipe.stage("select").k == 4
    assert (recipe.seed, recipe.stage("rl").task.name, recipe.stage("rl").task.n) == (3, "lis", [4, 6])
    grand = child("extends: child.yaml\nname: y\nstages: [{stage: select, raw: pool.jsonl}]\n", "grand.yaml")
    assert load(grand).stage("select").raw == ["pool.jsonl"] and load(grand).seed == 3


def test_a_stage_that_the_parent_lacks_is_put_where_its_kind_belongs(child):
    child("name: p\nbase: {model: m}\nstages: [{stage: sft}]\n", "p.yaml")
    verify = "{stage: verify, task: {name: lis, n: [3, 4]}}"
    text = f"extends: p.yaml\nname: c\nstages: [{verify}, {{stage: select, raw: a.txt, target: b.txt, k: 1}}]\n"
    assert [stage.stage for stage in load(child(text)).stages] == ["select", "sft", "verify"]


def test_a_shipped_recipe_can_be_extended(child):
    recipe = load(child("extends: quickstart\nname: mine\nstages: [{stage: rl, instances: 5}]\n"))
    assert recipe.stage("rl").instances == 5 and recipe.stage("rl").task == load("quickstart").stage("rl").task


def test_a_fault_stands_in_the_file_where_its_key_does(small, child):
    small.write_text(small.read_text().replace("instances: 8", "instances: many"))
    assert faults(child(CHILD.replace("learning_rate: 5e-4", "lerning_rate: 5e-4").replace("name: child\n", ""))) == [
        "child.yaml:1:1: missing key 'name' (Also the name of the run folder)",
        "child.yaml:4:15: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        "small.yaml:12:5: instances: 'many' is not a whole number",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "extends: 3\nname: x\n",
            "child.yaml:1:1: extends is the file of a recipe or the name of a shipped one, not a",
        ),
        ("name: x\nextends: no.yaml\n", "child.yaml:2:1: extends 'no.yaml': there is no such file (looked in "),
        ("extends: quikstart\n", "child.yaml:1:1: extends 'quikstart': there is no such file and no such shipped"),
        ("extends: child.yaml\n", "child.yaml:1:1: extends goes in a circle: child.yaml extends child.yaml; take one"),
        ("extends: ring.yaml\n", "ring.yaml:2:1: extends goes in a circle: child.yaml extends ring.yaml extends chi"),
        ("extends: broken.yaml\n", "broken.yaml:2:1: a value is missing here"),
    ],
)
def test_a_parent_that_cannot_be_had_is_told_where_it_is_named(child, text, fault):
    child("name: ring\nextends: child.yaml\n", "ring.yaml")
    child("name: [\n", "broken.yaml")
    [found] = faults(child(text))
    assert found.startswith(fault)
