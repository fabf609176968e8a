import json
import random
import re
from importlib.resources import files

import pytest

from krontune import recipes
from krontune.recipes.json_schema import recipe_schema
from krontune.recipes.loader import load
from krontune.recipes.run_folder import recipe_text
from krontune.recipes.schema import Recipe
from krontune.recipes.shipped import copy_recipe, shipped, shipped_text
from krontune.recipes.training import moka_config
from krontune.recipes.yaml12 import read

HEAD = "name: x\nbase: {model: m}\nstages:\n"
SELECT = "- {stage: select, raw: a.txt, target: b.txt, k: 3}\n"
SFT = "- {stage: sft, data: a.txt}\n"
RL = "- {stage: rl, task: {name: lis, n: [3, 5]}}\n"


@pytest.fixture
def faults_of(tmp_path):
    """A function from the text of a recipe, and overrides, to its faults, with `r` for the name of the file."""

    def run(text: str, *overrides: str) -> list[str]:
        file = tmp_path / "r.yaml"
        file.write_text(text)
        with pytest.raises(recipes.RecipeError) as caught:
            load(file, overrides)
        return str(caught.value).replace(str(file), "r").split("\n")

    return run


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_loads_by_its_name_and_is_described(name):
    recipe = load(name)
    assert recipe.name == name and recipe.description == shipped()[name] != ""


def test_quickstart_has_all_four_stages():
    recipe = load("quickstart")
    assert [stage.stage for stage in recipe.stages] == ["select", "sft", "rl", "verify"]
    assert recipe.stage("sft").controls == ["random"] and recipe.base.quantization == "nf4"
    assert recipe.stage("nothing") is None


def test_shapes_by_module_reach_the_adapter_and_the_kept_recipe(tmp_path, faults_of):
    by_module = {"down_proj": "ladder", "layers.0.self_attn.q_proj": [[24, 12], [8, 4]]}
    sft = "- stage: sft\n  data: a.txt\n  adapter: "
    (tmp_path / "one.yaml").write_text(HEAD + sft + json.dumps({"shapes": [[4, 4]], "shapes_pattern": by_module}))
    recipe = load(tmp_path / "one.yaml")
    (tmp_path / "again.yaml").write_text(recipe_text(recipe))
    for read_back in (recipe, load(tmp_path / "again.yaml")):
        config = moka_config(read_back.stage("sft").adapter)
        assert [*map(tuple, config.shapes)] == [(4, 4)]
        assert config.shapes_pattern == {"down_proj": "ladder", "layers.0.self_attn.q_proj": [(24, 12), (8, 4)]}
    wrong = {"shapes_pattern": {"q_proj": "square", "v_proj": [[8, 0]], "k_proj": [[8]]}}
    assert [line.split(": ", 1)[1] for line in faults_of(HEAD + sft + json.dumps(wrong))] == [
        "q_proj: 'square' is not one of 'balanced', 'ladder' or a list",
        "v_proj.0.1: must be greater than or equal to 1, got 0",
        "k_proj.0: must have at least 2 items after validation, not 1, got [8]",
    ]


def test_a_file_is_read_with_its_overrides_and_every_key_has_its_place(small):
    overrides = ["stages.sft.trainer.max_steps=7", "seed=3", "stages.rl.trainer={max_steps: 5}"]
    recipe = load(small, overrides)
    assert (recipe.seed, recipe.stages[1].trainer.max_steps, recipe.stages[2].trainer.max_steps) == (3, 7, 5)
    assert recipe.where(("stages", 0, "k")) == f"{small}:7:5"
    assert recipe.where(("stages", 1, "trainer", "max_steps")) == f"override {overrides[0]!r}"
    assert load(small).stages[1].trainer.max_steps == 2


def test_scalars_are_those_of_yaml_1_2(small, faults_of):
    assert load(small).stages[1].trainer.learning_rate == 1e-3
    assert load(small, ["description=on"]).description == "on"
    assert faults_of(HEAD + SELECT, "base.trust_remote_code=yes") == [
        "override 'base.trust_remote_code=yes': trust_remote_code: 'yes' is not true or false"
    ]


@pytest.mark.parametrize("source", ["a.txt", "{shipped: prose}", "{puzzles: [lis], size: 3}"])
def test_one_source_may_be_written_without_its_list(tmp_path, source):
    file = tmp_path / "r.yaml"
    text = HEAD + "- {stage: select, raw: SOURCE, target: b.txt, k: 3}\n"
    file.write_text(text.replace("SOURCE", f"[{source}]"))
    listed = load(file)
    file.write_text(text.replace("SOURCE", source))
    assert load(file).stages == listed.stages and isinstance(listed.stages[0].raw, list)


def test_a_recipe_made_in_python_names_places_by_their_path():
    recipe = Recipe.model_validate({"name": "x", "base": {"model": "m"}, "stages": [{"stage": "sft", "data": "a.txt"}]})
    assert recipe.where(("stages", 0, "data")) == "stages.0.data"


# ---------------------------------------------------------------- what is refused


def test_all_faults_come_at_once_with_file_line_and_column(faults_of):
    text = (
        "name: x\n"
        "sed: 1\n"
        "base:\n"
        "  model: m\n"
        "  quantization: nf5\n"
        "stages:\n"
        "- stage: select\n"
        "  raw: 3\n"
        "  target: [a.txt, {puzzles: [liss], size: 0}]\n"
        "  k: many\n"
        "- stage: sfd\n"
        "- stage: sft\n"
        "  adapter: {r: 2.5, max_steps: 1}\n"
        "  trainer:\n"
        "    lerning_rate: 1e-4\n"
        "    bf16: 1\n"
    )
    kinds = (
        "a source is the path of a .jsonl, .parquet or .txt file, or a mapping with 'shipped', 'puzzles', 'path' or "
        "'hub'"
    )
    assert faults_of(text) == [
        "r:2:1: unknown key 'sed'; did you mean 'seed'?",
        "r:5:3: quantization: 'nf5' is unknown; allowed: 'nf4', 'fp4', 'int8'; did you mean 'nf4'?",
        f"r:8:3: raw.0: {kinds}, got 3",
        "r:9:30: puzzles.0: 'liss' is unknown; allowed: 'sorting', 'arithmetic', 'scheduling', 'activity', "
        "'activity_weighted', 'countdown', 'knapsack', 'lis'; "
        "did you mean 'lis'?",
        "r:9:37: size: must be greater than or equal to 1, got 0",
        "r:10:3: k: 'many' is not a number",
        "r:11:3: stage 'sfd' is unknown; allowed: 'dedup', 'select', 'sft', 'rl', 'verify'; did you mean 'sft'?",
        "r:13:13: r: 2.5 is not a whole number",
        "r:13:21: unknown key 'max_steps'; it belongs under stages.2.trainer",
        "r:15:5: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        "r:16:5: bf16: 1 is not true or false",
    ]


def test_several_faults_at_one_place_are_all_kept(faults_of):
    assert faults_of("seed: 0\n") == [
        "r:1:1: missing key 'base' (a mapping)",
        "r:1:1: missing key 'name' (Also the name of the run folder)",
        "r:1:1: missing key 'stages' (a list)",
    ]
    override = "stages.sft.trainer={seed: 1, max_stepz: 2, output_dir: a}"
    assert faults_of(HEAD + SFT, override) == [
        f"override {override!r}: 'output_dir' is not set under trainer: the run folder is given with --out",
        f"override {override!r}: 'seed' is not set under trainer: the key 'seed' of the recipe sets it",
        f"override {override!r}: unknown key 'max_stepz'; did you mean 'max_steps'?",
    ]


def test_a_trainer_key_that_krontune_sets_is_answered_with_its_place_and_nothing_else(faults_of):
    assert faults_of(HEAD + "- {stage: sft, data: a.txt, trainer: {hub_model_id: x, seed: 1}}\n") == [
        "r:4:39: 'hub_model_id' is not set under trainer: "
        "nothing is pushed during training; hub: {repo: owner/name} pushes the run when it is done",
        "r:4:56: 'seed' is not set under trainer: the key 'seed' of the recipe sets it",
    ]


def test_a_duplicate_key_is_refused_with_both_places(faults_of):
    [fault] = faults_of(HEAD + SELECT + "seed: 1\nname: y\n")
    assert fault.startswith("r:6:1: key 'name' is given twice; the first stands at ") and fault.endswith("r:1:1")


def test_a_key_of_another_source_is_not_suggested_to_itself(faults_of):
    text = HEAD + "- {stage: sft, data: {shipped: prose, size: 3}}\n"
    assert faults_of(text) == ["r:4:39: unknown key 'size'; it does not go together with the other keys here"]


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        (
            SFT + SFT.replace("}", ", adapter: {}}"),
            "r:5:29: the sft stage continues the sft stage's adapter; leave 'ad",
        ),
        ("- stage: sft\n", "r:4:3: the sft stage trains on what 'select' picked, and none comes before; add one, or"),
        ("- {stage: sft}\n" + SELECT, "r:4:4: the sft stage trains on what 'select' picked, and none comes before"),
        ("- {stage: sft, data: a.txt, controls: [random]}\n", "r:4:29: a random control needs the pool of a select"),
        (RL, "r:4:4: the rl stage continues an sft stage's adapter, and none comes before; add one, or give adapter"),
        (SFT + RL.replace("]}}", "]}, adapter: {}}"), "r:5:45: the rl stage continues the sft stage's adapter; leave"),
        ("- stage: verify\n", "r:4:3: the verify stage takes its task from an rl stage, and none comes before it"),
    ],
)
def test_stages_that_do_not_fit_each_other_are_refused(faults_of, stages, fault):
    [found] = faults_of(HEAD + stages)
    assert found.startswith(fault)


def test_stages_that_stand_alone_are_fine(tmp_path):
    file = tmp_path / "r.yaml"
    verify = "- {stage: verify, task: {name: lis, n: [3, 5]}}\n"
    for stages in (SELECT, SFT, RL.replace("]}}", "]}, adapter: {}}"), verify, SELECT + "- stage: sft\n" + RL + verify):
        file.write_text(HEAD + stages)
        assert len(load(file).stages) == stages.count("stage: ")


@pytest.mark.parametrize("name", ["missing.yaml", "folder/missing", "missing.yml"])
def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipes.RecipeError) as caught:
        load(name)
    assert str(caught.value) == f"{name}: there is no such file (looked in {tmp_path})"


def test_an_unknown_shipped_recipe_gets_the_nearest_name_or_all():
    for name, hint in {"quikstart": "did you mean 'quickstart'?", "xyz": f"shipped: {', '.join(shipped())}"}.items():
        with pytest.raises(recipes.RecipeError) as caught:
            load(name)
        assert str(caught.value) == f"{name}: there is no such file and no such shipped recipe; {hint}"


def test_every_random_change_of_a_recipe_loads_or_gives_placed_faults(small):
    rng = random.Random(0)
    plain = read(small.read_text(), "r").data
    values = [None, True, 0, -1, 3, 2.5, "x", "select", [], ["x"], [None], {}, {"x": 1}, [[1]], {"stage": "rl"}]
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(400):
        data = json.loads(json.dumps(plain))
        for _ in range(rng.randint(1, 2)):
            at = data
            while isinstance(at, dict | list) and at:
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
                if rng.random() < 0.3 or not isinstance(at[key], dict | list) or not at[key]:
                    new = json.loads(json.dumps(rng.choice(values)))
                    at[rng.choice([key, "new"]) if isinstance(at, dict) else key] = new
                    break
                at = at[key]
        small.write_text(json.dumps(data))
        try:
            load(small)
            outcomes["loaded"] += 1
        except recipes.RecipeError as error:
            outcomes["refused"] += 1
            assert error.faults and all(fault.where.startswith(f"{small}:1:") for fault in error.faults)
    assert min(outcomes.values()) > 10


# ---------------------------------------------------------------- what is written


def given(recipe):
    return recipe.model_dump(exclude_unset=True)


def test_a_recipe_written_out_is_read_back_as_it_was(small):
    texts = "12e4 1e-5 0o17 012 1_000 .5 .inf 0x1F yes TRUE null ~ = << ' 2024-01-01 *a".split()
    for text in [*texts, "", " a", "- a", "a: b", "# a", "line\nbreak", "é\u2028b", "x " * 100]:
        recipe = load(small, ["seed=5", f"base.revision={json.dumps(text)}", "stages.sft.adapter.alpha=1e-5"])
        assert recipe.base.revision == text
        copy = small.with_name("copy.yaml")
        copy.write_text(recipe_text(recipe))
        assert load(copy).model_dump() == recipe.model_dump()
        assert given(load(copy).stage("sft").trainer) == given(recipe.stage("sft").trainer)


def test_a_copied_recipe_is_the_shipped_one_with_the_schema_it_names(tmp_path):
    copy = copy_recipe("quickstart", tmp_path / "mine.yaml")
    assert copy.read_text() == shipped_text("quickstart").replace("name: quickstart", "name: mine")
    assert given(load(copy)) == given(load("quickstart")) | {"name": "mine"}
    schema = copy.read_text().split("$schema=./")[1].split("\n")[0]
    assert (tmp_path / schema).read_text() == recipe_schema()


def test_a_copy_overwrites_nothing_and_says_why_it_cannot_be_written(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    for to, why in {
        "mine.yaml": "the file exists and was left as it is",
        "no/folder.yaml": "cannot be written",
    }.items():
        with pytest.raises(recipes.RecipeError, match=why):
            copy_recipe("quickstart", tmp_path / to)
    assert (tmp_path / "mine.yaml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- the editors' schema


def test_the_schema_file_is_current():
    assert (files("krontune.recipes") / "recipe.schema.json").read_text() == recipe_schema()


def naive_accepts(schema, value, definitions) -> bool:
    """Whether a JSON schema accepts a value, for the keywords that pydantic writes for our models."""
    if "$ref" in schema:
        return naive_accepts(definitions[schema["$ref"].rpartition("/")[2]], value, definitions)
    for keyword, enough in {"anyOf": any, "oneOf": lambda accepted: sum(accepted) == 1}.items():
        if keyword in schema and not enough([naive_accepts(one, value, definitions) for one in schema[keyword]]):
            return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
    kind = schema.get("type")
    if kind == "number" and (isinstance(value, bool) or not isinstance(value, int | float)):
        return False
    if kind in kinds and (not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool))):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, list):
        return all(naive_accepts(schema.get("items", {}), item, definitions) for item in value)
    if not isinstance(value, dict):
        return True
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", [])) <= set(value) or (others is False and set(value) - set(properties)):
        return False
    return all(naive_accepts(properties.get(key, {}), item, definitions) for key, item in value.items())


def test_the_schema_accepts_the_shipped_recipes_and_refuses_slips():
    schema = json.loads(recipe_schema())
    for name in shipped():
        data = read(shipped_text(name), name).data
        assert naive_accepts(schema, data, schema["$defs"])
        next(stage for stage in data["stages"] if "trainer" in stage)["trainer"]["max_stepz"] = 3
        assert not naive_accepts(schema, data, schema["$defs"])
    data = read(HEAD + SFT, "r").data
    assert naive_accepts(schema, data, schema["$defs"])
    assert naive_accepts(schema, {"extends": "r.yaml", "name": "y"}, schema["$defs"])
    assert not naive_accepts(schema, {"name": "y"}, schema["$defs"])
    for slip in [{"extends": 3}, {"seed": "x"}, {"sed": 1}, {"stages": [{"stage": "sft", "data": 3}]}, {"base": {}}]:
        assert not naive_accepts(schema, data | slip, schema["$defs"])


def test_the_schema_explains_keys():
    definitions = json.loads(recipe_schema())["$defs"]
    assert (
        definitions["Select"]["properties"]["k"]["description"] == "How many rows to pick, or which share of the pool."
    )
    assert "learning rate" in definitions["SftTrainerArgs"]["properties"]["learning_rate"]["description"].lower()
