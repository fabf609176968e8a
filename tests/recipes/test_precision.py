"""The section `precision` of a recipe's base, and the plan of a run."""

import os
from dataclasses import replace

import pytest
import yaml

from krontune.adapters import BaseModelError, BitPlan
from krontune.recipes import precision, training
from krontune.recipes.faults import RecipeError
from krontune.recipes.figures import storage
from krontune.recipes.loader import load
from krontune.recipes.run_folder import recipe_text
from krontune.recipes.schema_model import BaseModelSection

MIXED = "base.precision={scorer: lim, levels: [16, 8, 4], avg_bits: 5.0}"


def refusal(file, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return [str(fault) for fault in caught.value.faults]


def test_precision_takes_the_place_of_quantization(small):
    base = load(small, [MIXED]).base
    assert base.precision.avg_bits == 5.0 and base.quantization is None
    assert load(small).base.quantization == "nf4"
    assert load(small, [MIXED, "base.quantization=null"]).base.quantization is None
    assert load(small, ["base.precision={avg_bits: 6}"]).base.precision.scorer == "nll"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_both_together_are_refused(small, quantization):
    [fault] = refusal(small, MIXED, f"base.quantization={quantization}")
    assert f"precision takes the place of quantization, which is '{quantization}': leave quantization out" in fault


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{avg_bits: 3.5}", "avg_bits 3.5 is below the smallest of the levels [16, 8, 4]; give 4 to 16"),
        ("{avg_bits: 17}", "avg_bits 17.0 is above the largest of the levels [16, 8, 4]; give 4 to 16"),
        ("{levels: [8, 4], avg_bits: 9}", "avg_bits 9.0 is above the largest of the levels [8, 4]; give 4 to 8"),
        ("{levels: [16, 8]}", "avg_bits 5.0 is below the smallest of the levels [16, 8]; give 8 to 16"),
        ("{avg_bits: .nan}", "avg_bits nan is not within the levels [16, 8, 4]"),
        ("{levels: [8], avg_bits: 8}", "give two or three different ones of 16, 8 and 4; for one alone use quantiz"),
        ("{levels: [16, 8, 2]}", "allowed: 16, 8, 4"),
        ("{scorer: kl}", "scorer: 'kl' is unknown; allowed: 'lim', 'zd', 'nll'"),
        ("{avgbits: 5}", "unknown key 'avgbits'; did you mean 'avg_bits'?"),
        ("{tokens: 1}", "tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_its_place_with_the_numbers(small, section, message):
    text = small.read_text().replace(
        "base: {model: smollm2-135m}", f"base: {{model: smollm2-135m, precision: {section}}}"
    )
    small.write_text(text)
    [fault] = refusal(small)
    assert fault.startswith(f"{small}:2:") and message in fault


def test_the_resolved_recipe_reads_back(small, tmp_path):
    recipe = load(small, [MIXED])
    (tmp_path / "resolved.yaml").write_text(recipe_text(recipe))
    again = load(tmp_path / "resolved.yaml")
    assert again.base == recipe.base and yaml.safe_load(recipe_text(recipe))["base"]["quantization"] is None


def test_storage_is_told_in_words():
    base = load("quickstart", ["base.precision={levels: [8, 4], avg_bits: 5.5}", "base.quantization=null"]).base
    assert storage(base.model_dump()) == "mixed precision, 8 and 4 bits, at most 5.5 on average"
    assert storage({"model": "m", "quantization": "nf4"}) == "nf4"
    assert storage({"model": "m", "quantization": None, "precision": None}) is None


# ---------------------------------------------------------------- the plan of a run


@pytest.fixture
def tiny(tmp_path):
    """The folder of a random model of four layers over single characters."""
    import string

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path / "tiny"
    LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=4, **sizes)).save_pretrained(folder)
    numbered = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def planned(monkeypatch):
    """The calls of `bit_plan`."""
    calls, original = [], precision.bit_plan
    monkeypatch.setattr(precision, "bit_plan", lambda *a, **o: calls.append(a) or original(*a, **o))
    return calls


def section(model, **changes):
    return BaseModelSection.model_validate({"model": str(model), "precision": {"tokens": 300, **changes}})


@pytest.mark.parametrize("scorer", ["lim", "zd", "nll"])
def test_the_plan_is_made_once_kept_and_used_again(tiny, tmp_path, planned, scorer):
    base = section(tiny, scorer=scorer)
    plan = precision.recipe_plan(base, tmp_path)
    assert plan == BitPlan.load(tmp_path) and plan.counts() == {16: 0, 8: 1, 4: 3}
    when = (tmp_path / "bit_plan.json").stat().st_mtime_ns
    assert precision.recipe_plan(base, tmp_path) == plan and len(planned) == 1
    assert (tmp_path / "bit_plan.json").stat().st_mtime_ns == when


@pytest.mark.parametrize("change", [{"avg_bits": 6.0}, {"scorer": "zd"}, {"levels": [16, 4]}, {"tokens": 600}])
def test_a_plan_for_other_settings_is_made_anew(tiny, tmp_path, planned, change):
    precision.recipe_plan(section(tiny), tmp_path)
    precision.recipe_plan(section(tiny, **change), tmp_path)
    assert len(planned) == 2


def test_a_plan_that_was_cut_while_it_was_made_leaves_none(tiny, tmp_path, monkeypatch):
    def cut(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            precision.recipe_plan(section(tiny), tmp_path)
    assert not (tmp_path / "bit_plan.json").exists()
    assert precision.recipe_plan(section(tiny), tmp_path) == BitPlan.load(tmp_path)


def test_a_damaged_plan_is_named(tiny, tmp_path):
    (tmp_path / "bit_plan.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"bit_plan.json' is no bit plan.*Delete it"):
        precision.recipe_plan(section(tiny), tmp_path)


def test_without_precision_there_is_no_plan(tiny, tmp_path):
    base = BaseModelSection(model=str(tiny))
    assert precision.recipe_plan(base, tmp_path) is None and not list(tmp_path.glob("*.json"))
    precision.save_plan(base, tmp_path, tmp_path)  # where another recipe left a plan, none goes along


def test_a_run_trains_over_the_mixed_base_and_puts_the_plan_beside_each_adapter(small, tiny, tmp_path, planned):
    """sft, rl and verify stand on the same plan; an adapter folder alone gives the same base again."""
    import torch
    from peft import PeftModel

    from krontune.adapters import load_base
    from krontune.recipes import run

    small.write_text(f"""\
name: small
base: {{model: {tiny}, precision: {{scorer: nll, levels: [8, 4], avg_bits: 5.0, tokens: 128}}, dense_generation: true}}
stages:
  - stage: sft
    data: target.jsonl
    adapter: {{target_modules: [q_proj, down_proj], r: 2}}
    trainer: {{max_steps: 2, per_device_train_batch_size: 1, learning_rate: 1e-2}}
  - stage: rl
    task: {{name: lis, n: [3, 3]}}
    reward: random
    instances: 4
    trainer: {{max_steps: 1, per_device_train_batch_size: 4, num_generations: 2, max_completion_length: 8}}
  - {{stage: verify, instances: 4, max_new_tokens: 4, checks: [triplet]}}
""")
    done = run(load(small), "out")
    folder = done.path
    assert len(planned) == 1
    plan = BitPlan.load(folder)
    assert plan.model == str(tiny) and plan.counts() == {8: 1, 4: 3}
    for place in (folder / "sft" / "adapter", folder / "rl" / "adapter", done.adapter):
        assert BitPlan.load(place) == replace(plan, model="tiny")  # and not where it lies on this machine
    one = training.load_recipe_base(load(small).base, folder)[0]
    other = load_base(tiny, precision=done.adapter)[0]
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        values = [PeftModel.from_pretrained(base, str(done.adapter))(tokens).logits for base in (one, other)]
    assert torch.equal(*values) and len(planned) == 1
    card = (done.adapter / "README.md").read_text()
    assert "in mixed precision, 8 and 4 bits, at most 5 on average" in card and "mixed-precision" in card
    assert 'precision="the folder of bit_plan.json"' in card
