"""Keys, tokens and passwords are found by name, by environment and by look, and nothing else is hidden."""

import json

import pytest
import yaml

from krontune.recipes import masking
from krontune.recipes.faults import Fault, RecipeError
from krontune.recipes.loader import load
from krontune.recipes.masking import MASK, hide, learn, masked, names_secret
from krontune.recipes.run_folder import RunFolder, recipe_text

PLANTED = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3f"


@pytest.fixture(autouse=True)
def nothing_learned(monkeypatch):
    monkeypatch.setattr(masking, "_learned", set())


@pytest.mark.parametrize("name", "API_KEY apiKey hub_token hf-token password passwords db_password token key".split())
def test_names_of_secrets(name):
    assert names_secret(name)


@pytest.mark.parametrize(
    "name", "pad_token stop_tokens keyboard tokenizer token_credit max_completion_length monkey data/key".split()
)
def test_names_that_only_look_like_it(name):
    assert not names_secret(name)


def test_a_token_is_known_by_its_look_and_names_of_code_are_not():
    assert hide(f"login with {PLANTED}!") == f"login with {MASK}!"
    for text in ("hf_quantizer", "hf_hub_download_of_everything", "risk-averse-and-some-more-words", "a" * 40):
        assert hide(text) == text


def test_what_the_environment_holds_is_hidden_and_its_paths_and_flags_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("SSL_KEY", str(tmp_path))
    monkeypatch.setenv("USE_TOKEN", "true")
    said = hide(f"0123456789abcdef0123456789abcdef01234567 {tmp_path} true")
    assert said == f"{MASK} {tmp_path} true"


def test_a_secret_of_the_recipe_is_hidden_wherever_it_comes_up_and_a_common_word_is_not():
    learn({"reward_options": {"judge": {"api_key": "sk-1-abc"}, "key": "answer", "password": "swordfish"}})
    assert hide("refused: sk-1-abc, swordfish, the answer") == f"refused: {MASK}, {MASK}, the answer"


def test_counts_of_tokens_and_words_of_the_text_stay_in_a_recipe():
    recipe = {"tokens": 900, "max_tokens": 5, "pad_token": "<pad>", "passwords": ["a", {"b": 1}], "pin_key": 7}
    assert masked(recipe) == {**recipe, "passwords": [MASK, {"b": MASK}], "pin_key": MASK}


def test_no_part_of_a_secret_is_left_where_an_error_cuts_a_long_value(small):
    long = "x" * 40 + PLANTED + "y" * 40
    with pytest.raises(RecipeError) as caught:
        load(
            small, [f"stages.select.k={long}", f"base.api_key={PLANTED}", f"stages.rl.reward_options.my_key={PLANTED}]"]
        )
    with pytest.raises(RecipeError) as second:
        load(small, [f"stages.select.k='{long}'", "base.password=swordfish1"])
    for text in (str(caught.value), str(second.value)):
        assert PLANTED[:8] not in text and "swordfish1" not in text and "override" in text
    assert PLANTED not in str(Fault("here", PLANTED))


def test_the_run_folder_holds_no_secret_and_takes_the_same_recipe_again(small, tmp_path):
    options = f"stages.rl.reward_options={{api_key: {PLANTED}, password: hunter2, url: x}}"
    recipe = load(small, [options])
    with RunFolder(tmp_path / "run", recipe) as folder:
        folder.begin("rl")
        folder.log("rl", 1, {"said": f"cannot log in as hunter2 with {PLANTED}"})
        folder.finish("rl", error=PLANTED)
    text = "".join(file.read_text() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert PLANTED not in text and "hunter2" not in text and text.count(MASK) >= 5
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["stages"][2]["reward_options"]
    assert kept == {"api_key": MASK, "password": MASK, "url": "x"}
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["said"].startswith("cannot log in as ")
    assert RunFolder(tmp_path / "run", load(small, [options])).is_done("rl")
    assert recipe.stage("rl").reward_options["api_key"] == PLANTED, "the reward itself gets it"
    assert recipe_text(load(tmp_path / "run" / "recipe.yaml")) == recipe_text(recipe)
