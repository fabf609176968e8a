"""The verify stage on tiny models and scripted answers: what it asks, what it keeps, and what it checks."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.adapters import MokaConfig
from krontune.recipes import models
from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.run_folder import RunFolder
from krontune.recipes.steps import steps
from krontune.recipes.verify import run_verify, verification
from krontune.recipes.verify_checks import Answers, after_answers, curves
from krontune.rl.tasks import get_task

torch.set_num_threads(1)  # on models this small, threads only wait for each other

RECIPE = """\
name: tiny
base: {model: MODEL, quantization: null}
stages:
  - stage: sft
    data: {puzzles: [lis], size: 4}
  - stage: rl
    task: {name: lis, n: [9, 10]}
    instances: 30
    credit: {strategy: coupled, horizon: [2, 8]}
  - stage: verify
    instances: 45
    samples: 4
    checks: [all]
    sizes: [6, 8]
    probes: 3
    max_new_tokens: 6
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A random Llama on disk, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, checkpoint):
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("MODEL", str(checkpoint)))
    return file


@pytest.fixture
def run(tmp_path, recipe, checkpoint):
    """A run whose training stages left a random adapter each."""
    with RunFolder(tmp_path / "run", load(recipe)) as folder:
        for seed, name in enumerate(("sft", "rl", "rl-random")):
            torch.manual_seed(seed)
            base = LlamaForCausalLM.from_pretrained(checkpoint)
            model = get_peft_model(base, MokaConfig(target_modules=["q_proj"], r=2, init_weights=False))
            model.save_pretrained(folder.path / name / "adapter")
        yield folder


def verify(run, file, *overrides, adapters=("sft", "rl", "rl-random")):
    recipe = load(file, overrides)
    step = next(step for step in steps(recipe) if step.name == "verify")
    run_verify(recipe, replace(step, adapters=tuple(adapters)), run)
    return verification(run.path, "verify")


@pytest.fixture
def asked(monkeypatch):
    """Notes what is generated: how many prompts a call."""
    calls, generate = [], models.generate

    def noting(model, tokenizer, prompts, **settings):
        calls.append(len(prompts))
        return generate(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(models, "generate", noting)
    return calls


def test_real_models_go_through_the_checks_that_ask_and_a_second_pass_asks_nothing(run, recipe, asked):
    asking = "[symmetry, size_ladder, discriminating, early_answering, self_explanation, contamination, base_vs_tuned]"
    small = ["stages.verify.instances=4", "stages.verify.samples=2", "stages.verify.probes=2"]
    small.append(f"stages.verify.checks={asking}")
    first = verify(run, recipe, *small)
    assert list(first["models"]) == ["base", "sft", "rl", "rl-random"]
    names = [one["name"] for one in first["checks"]]
    assert set(names) == {*asking.strip("[]").split(", "), "headroom"}
    assert sum(asked) > 0 and first["credit_picture"] == "credit.svg"
    assert (run.path / "verify" / "credit.svg").read_text().startswith("<svg")
    asked.clear()
    (run.path / "verify" / "done").unlink()
    assert verify(run, recipe, *small) == first and asked == []


def test_what_was_answered_before_a_cut_is_read_and_the_rest_is_asked(run, recipe, asked, monkeypatch):
    small = ["stages.verify.instances=4", "stages.verify.samples=0", "stages.verify.checks=[triplet]"]
    generate, left = models.generate, [2]

    def cut(*args, **settings):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate(*args, **settings)

    monkeypatch.setattr(models, "generate", cut)
    with pytest.raises(KeyboardInterrupt):
        verify(run, recipe, *small)
    assert asked == [4, 4] and not (run.path / "verify" / "done").exists()
    monkeypatch.setattr(models, "generate", generate)
    resumed = verify(run, recipe, *small)
    assert asked == [4, 4, 4, 4]
    for file in (run.path / "verify" / "answers").iterdir():
        file.unlink()
    assert verify(run, recipe, *small) == resumed, "whole and resumed must agree"


@pytest.mark.parametrize("change", ["weights", "questions", "settings"])
def test_answers_of_other_weights_questions_or_settings_are_not_reused(run, recipe, asked, change):
    small = ["stages.verify.instances=4", "stages.verify.samples=0", "stages.verify.checks=[]"]
    verify(run, recipe, *small, adapters=["sft"])
    assert asked == [4, 4]
    if change == "weights":
        (run.path / "rl" / "adapter" / "adapter_model.safetensors").replace(
            run.path / "sft" / "adapter" / "adapter_model.safetensors"
        )
    more = {"questions": ["stages.verify.seed=1"], "settings": ["stages.verify.max_new_tokens=7"]}.get(change, [])
    verify(run, recipe, *small, *more, adapters=["sft"])
    assert asked == [4, 4, 4] if change == "weights" else asked == [4, 4, 4, 4]


# ---------------------------------------------------------------- scripted answers

TASK = get_task("lis")
POLICY_CHECKS = (
    "stages.verify.checks=[triplet, attribution, heuristic_agreement, base_vs_tuned, spurious_controls, symmetry, "
    "size_ladder, discriminating]"
)


def instance_of(prompt):
    rows = [line.split(" | ") for line in prompt.splitlines() if " | " in line and line[0].isdigit()]
    return TASK.instance([int(value) for _, value in rows])


def scripted(policies):
    """A generate that answers by the policy of the adapter's name: "solve", "wrong", or a heuristic."""

    def generate(model, tokenizer, prompts, *, starts=None, chat=True, temperature=0.0, **settings):
        policy = policies[model]
        said = []
        for prompt, start in zip(prompts, starts or [""] * len(prompts), strict=True):
            if policy == "reasons" and chat and not isinstance(prompt, list):
                said.append(reasoned(instance_of(prompt), start))
                continue
            if isinstance(prompt, list):  # asked why: the rows of its answer
                said.append(prompt[1]["content"].rpartition("\n")[2].partition(" \\answer")[0])
                continue
            if not chat:
                said.append("something else")
                continue
            one = instance_of(prompt)
            ids = TASK.solve(one).certificate if policy == "solve" else ()
            ids = TASK.heuristics[policy](one) if policy in TASK.heuristics else ids
            said.append("" if policy == "mute" else TASK.write(one, ids))
        return said

    return generate


def reasoned(one, start):
    """Knows the answer only once the whole worked line stands there; asked for no answer yet, it reasons anew."""
    whole = TASK.completion(one)
    worked, opener, answer = whole.partition("\\ids{")
    if not start.endswith(opener):
        return whole
    return (answer if start == worked + opener else "1} \\answer{1}") + "\n" + whole


def put_through(run, recipe, monkeypatch, policies, *overrides):
    """The result where each model of `policies` answers by its policy."""
    monkeypatch.setattr(models, "generate", scripted(policies))
    monkeypatch.setattr(
        models, "answer_probabilities", lambda model, tokenizer, prompts, *rest, **settings: [0.5] * len(prompts)
    )
    monkeypatch.setattr(models.Model, "loaded", property(lambda self: (self.name, str)))
    monkeypatch.setattr(models.Model, "close", lambda self: None)
    monkeypatch.setattr("krontune.recipes.verify._credit_picture", lambda *args: None)
    monkeypatch.setattr("krontune.recipes.models.longest_in_tokens", lambda tokenizer, texts: 10)
    return verify(run, recipe, *overrides, adapters=list(policies)[1:])


def by_name(result):
    found = {}
    for one in result["checks"]:
        found.setdefault(one["name"], []).append(one)
    return found


def test_a_solver_passes_and_its_gain_over_a_control_is_its_own(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "greedy_first", "rl": "solve", "rl-random": "greedy_first"}
    found = by_name(put_through(run, recipe, monkeypatch, policies, "stages.verify.probes=40", POLICY_CHECKS))
    for name in ("triplet", "attribution", "heuristic_agreement", "symmetry", "size_ladder", "discriminating"):
        assert found[name][0]["verdict"] == "pass", found[name]
    assert found["spurious_controls"][0]["verdict"] == "pass"
    assert found["spurious_controls"][0]["details"]["gains"]["random"] == 0
    pairs = {tuple(one["details"]["models"]): one["value"] for one in found["base_vs_tuned"]}
    assert set(pairs) == {("base", "sft"), ("base", "rl"), ("sft", "rl")}
    assert pairs["base", "rl"] == 1.0 and 0 < pairs["sft", "rl"] < 1
    con = found["base_vs_tuned"][0]["details"]["con"]  # the base says nothing, sft always the same
    assert con["k"] == [1, 2, 4] and con["difference"]["value"] == pytest.approx([pairs["base", "sft"]] * 3)


def test_a_heuristic_is_seen_through_and_its_control_shows_that_nothing_was_gained(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "beam3", "rl": "beam3", "rl-random": "beam3"}
    result = put_through(run, recipe, monkeypatch, policies, "stages.verify.probes=40", POLICY_CHECKS)
    found = by_name(result)
    for name in ("attribution", "heuristic_agreement", "symmetry", "discriminating"):
        assert found[name][0]["verdict"] == "fail", found[name]
    assert found["size_ladder"][0]["value"] == 0 and found["size_ladder"][0]["details"]["nearest"] == "beam3"
    assert found["discriminating"][0]["value"] == 0
    assert found["spurious_controls"][0]["verdict"] == "warn" and found["spurious_controls"][0]["value"] == 0
    curve = result["samples"]["rl"]
    right = result["models"]["rl"]["certificate"]["value"]
    assert curve["pass_certificate"]["k"] == [1, 2, 4]
    assert curve["pass_certificate"]["value"] == pytest.approx([right] * 3), "all samples of an instance are alike"
    assert curve["con_certificate"]["value"] == pytest.approx([right] * 3)


def test_early_answering_forces_the_answer_and_sees_that_it_needs_the_reasoning(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "mute", "rl": "reasons"}
    small = ("stages.verify.checks=[early_answering]", "stages.verify.probes=40", "stages.verify.samples=0")
    [found] = by_name(put_through(run, recipe, monkeypatch, policies, *small))["early_answering"]
    assert found["verdict"] == "pass" and found["value"] > 0.9
    assert found["details"]["accuracy"][-1] == 1.0 and found["details"]["accuracy"][2] < 0.1


def test_the_rewards_checks_are_of_the_recipes_own_reward(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "mute", "rl": "solve"}
    small = ("stages.verify.checks=[verifier, heuristics]", "stages.verify.samples=0")
    found = by_name(put_through(run, recipe, monkeypatch, policies, *small, "stages.rl.reward=answer"))
    assert found["verifier"][0]["verdict"] == "fail" and found["verifier"][0]["details"]["reward"] == "answer"
    assert found["heuristics"][0]["details"]["policies"]["patience_tails"]["reward"] == 1.0
    other = ("stages.verify.task={name: knapsack, n: [4, 5]}", "stages.rl.reward=answer")
    other_task = load(recipe, [*small, *other])
    said = Answers(get_task("knapsack"), [4, 5], [], "rl", {"base": [], "rl": []})
    [told] = after_answers(other_task, other_task.stage("verify"), said)["verifier"]
    assert told.verdict == "pass" and told.details["reward"].startswith("certificate")


def test_test_questions_in_the_sft_files_fail_contamination(run, recipe, monkeypatch, tmp_path):
    policies = {"base": "mute", "sft": "mute", "rl": "solve"}
    small = ["stages.verify.checks=[contamination]", "stages.verify.samples=0", "stages.verify.instances=20"]
    overlap, completion = by_name(put_through(run, recipe, monkeypatch, policies, *small))["contamination"]
    assert (overlap["verdict"], overlap["value"], completion["details"]["by"]) == ("pass", 0.0, "completion")
    leak = tmp_path / "leak.jsonl"
    asked = TASK.instances(20, [9, 10], 0, "test")
    leak.write_text("".join(json.dumps({"text": TASK.prompt(one)}) + "\n" for one in asked))
    (run.path / "verify" / "done").unlink()
    leaked = by_name(put_through(run, recipe, monkeypatch, policies, *small, f"stages.sft.data={leak}"))
    assert (leaked["contamination"][0]["verdict"], leaked["contamination"][0]["value"]) == ("fail", 1.0)


def test_headroom_is_told_of_the_model_that_rl_began_with(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "greedy_first", "rl": "solve"}
    small = ("stages.verify.checks=[triplet]", "stages.rl.trainer.num_generations=4")
    [found] = by_name(put_through(run, recipe, monkeypatch, policies, *small))["headroom"]
    assert (found["details"]["model"], found["value"], found["details"]["group_size"]) == ("sft", 1.0, 4)


def test_headroom_that_is_asked_for_without_samples_says_what_to_set(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "greedy_first", "rl": "solve"}
    small = ("stages.verify.checks=[headroom]", "stages.verify.samples=0")
    [found] = by_name(put_through(run, recipe, monkeypatch, policies, *small))["headroom"]
    assert (found["verdict"], found["details"]["reason"]) == ("not run", "no samples were drawn; set samples")


def test_votes_are_on_the_stated_ids_and_any_optimum_may_win():
    task = get_task("lis", unique=False)
    tied = task.instance([2, 1, 4, 3])  # four optima of two rows
    certificates = [(1, 3), (1, 4), (2, 3), (2, 4)]
    wrong = task.write(tied, (3,))
    said = Answers(task, [4, 4], [tied], "rl", {"rl": [wrong]})
    said.samples["rl"] = [[*(task.write(tied, ids) for ids in certificates[:3]), wrong, wrong]]
    found = curves(said)["rl"]["con_certificate"]
    assert found["k"] == [1, 2, 4, 5] and found["value"][0] == pytest.approx(0.6) and found["value"][-1] == 0.0
    said.samples["rl"] = [[*(task.write(tied, ids) for ids in certificates[:3]), task.write(tied, (3, 1)), wrong]]
    assert curves(said)["rl"]["con_certificate"]["value"][-1] == 1.0


def test_a_check_that_cannot_be_made_says_so_and_costs_nothing_else(run, recipe, monkeypatch):
    policies = {"base": "mute", "sft": "mute", "rl": "mute"}
    monkeypatch.setattr("krontune.recipes.verify_checks.checks.symmetry", raise_rl_error)
    found = by_name(put_through(run, recipe, monkeypatch, policies))
    assert found["symmetry"][0]["verdict"] == "not run" and "no symmetries" in found["symmetry"][0]["details"]["reason"]
    assert found["spurious_controls"][0]["verdict"] == "not run"
    assert found["triplet"][0]["verdict"] == "not run" and found["attribution"][0]["verdict"] == "fail"


def raise_rl_error(*args, **options):
    from krontune.rl import RlError

    raise RlError("this task has no symmetries")


# ---------------------------------------------------------------- before a run


def faults(file, *overrides):
    return [str(fault).replace(str(file), "r") for fault in check(load(file, overrides))]


def test_check_finds_what_the_verify_stage_cannot_do(recipe):
    assert faults(recipe) == []
    [fault] = faults(recipe, "stages.verify.checks=[triplet, triplet]")
    assert "'triplet' is asked for twice" in fault
    [fault] = faults(recipe, "stages.verify.task={name: lis, n: [3, 3]}", "stages.verify.checks=[discriminating]")
    assert "needs instances that fool every heuristic" in fault and "raise n" in fault
    [fault] = faults(recipe, "stages.verify.sizes=[0]")
    assert "sizes" in fault or "n" in fault


def test_wrong_names_and_values_are_told_by_the_loader(recipe):
    from krontune.recipes.faults import RecipeError

    for override, word in (
        ("stages.verify.checks=[symetry]", "did you mean 'symmetry'"),
        ("stages.verify.samples=-1", "samples"),
        ("stages.verify.temperature=0", "temperature"),
        ("stages.verify.probes=0", "probes"),
    ):
        with pytest.raises(RecipeError, match=word):
            load(recipe, [override])
