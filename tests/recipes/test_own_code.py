"""Own rewards and tasks by dotted path, data of one's own, guard and controls."""

import json
import re
import sys
from pathlib import Path

import pytest

from krontune.recipes import chain
from krontune.recipes.audit import audit, must_stop, training_texts
from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.rewards import guard_of, make_reward, monitored
from krontune.recipes.rl import make_credit, make_task, training_rows
from krontune.recipes.run_folder import recipe_text
from krontune.recipes.schema import Recipe
from krontune.recipes.steps import steps
from krontune.rl import CertificateReward, Guarded, TokenCredit

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
WORDS = ["cat", "dog", "owl", "ant", "bee"]
FAULTY = """
def equal(completions, **columns):
    return [1.0] * len(completions)

def raises(completions, **columns):
    return [1 / len(text) for text in completions]

def hangs(completions, **columns):
    while not completions[0]:
        pass
    return [float(len(text)) for text in completions]

def length(completions, **columns):
    return [len(text) / 100 for text in completions]
"""


@pytest.fixture
def shout(tmp_path, monkeypatch):
    """The example of docs/tasks.md, written out of the page."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    for name in ("shout.py", "shout.yaml"):
        found = re.search(rf"```[a-z]+\n# {re.escape(name)}\n(.*?)```", text, re.DOTALL)
        assert found
        Path(name).write_text(found[1])
    rows = [{"prompt": f"Shout {word}.", "answer": word, "completion": f"{word.upper()}?"} for word in WORDS]
    Path("words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("faulty.py").write_text(FAULTY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield Path("shout.yaml")
    for module in ("shout", "faulty"):
        sys.modules.pop(module, None)


def test_the_example_of_the_page_has_no_faults_and_runs_guarded(shout):
    recipe = load(shout)
    assert check(recipe) == []
    reward = make_reward(recipe.stage("rl"), None, 0)
    try:
        assert isinstance(reward, Guarded)
        assert reward(completions=["CAT?", "CAT!", "dog?"], answer=["cat", "cat", "dog"]) == [1.0, 0.0, 0.0]
    finally:
        assert isinstance(reward, Guarded)
        reward.close()
    assert not isinstance(make_reward(load(shout, ["stages.rl.guard=null"]).stage("rl"), None, 0), Guarded)


def test_the_example_passes_the_audit_and_a_reward_that_pays_anything_fails_it(shout):
    found = {one.name: one.verdict for one in audit(load(shout, ["stages.rl.guard=null"]))}
    assert found["soundness"] == found["verifier"] == "pass" and found["contamination"] == "not run"
    assert found["headroom"] == "not run"
    paid = audit(
        load(
            shout,
            [
                "allow=[faulty:equal]",
                "stages.rl={stage: rl, data: words.jsonl, reward: faulty:equal}",
                "stages.rl.adapter={r: 2}",
            ],
        )
    )
    assert must_stop(paid) and {one.name: one.verdict for one in paid}["verifier"] == "fail"


def test_a_check_that_the_task_is_too_small_for_says_so_and_the_others_are_made(small):
    narrow = ["stages.rl.task={name: lis, n: [4, 5], options: {values: [1, 4]}}", "stages.verify.instances=2"]
    found = {one.name: one for one in audit(load(small, narrow))}
    assert found["soundness"].verdict == "not run" and "nothing new" in found["soundness"].details["reason"]
    assert found["headroom"].verdict == "not run" and found["contamination"].verdict != "not run"


def test_training_texts_are_all_that_is_trained_on_and_read_line_by_line(tmp_path, monkeypatch):
    def jsonl(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    pool, own = jsonl("pool.jsonl", [{"text": "in the pool"}]), jsonl("own.jsonl", [{"text": "of sft"}])
    asked = jsonl("asked.jsonl", [{"prompt": [{"role": "user", "content": "of\nrl"}], "answer": "1"}])
    recipe = tmp_path / "r.yaml"

    def texts(sft, run=None):
        recipe.write_text(f"""\
name: r
base: {{model: smollm2-135m, quantization: null}}
stages:
  - {{stage: select, raw: {pool}, target: {own}, k: 1}}
  - {{stage: sft, data: {sft}}}
  - {{stage: rl, data: {asked}, reward: math}}
""")
        return list(training_texts(load(recipe), run))

    assert texts("select") == ["in the pool", "of\nrl"]
    assert texts(own) == ["of sft", "of\nrl"]
    (tmp_path / "run" / "select").mkdir(parents=True)
    jsonl("run/select/selected.jsonl", [{"text": "picked"}])
    assert texts("select", tmp_path / "run") == ["picked", "of\nrl"]
    rows = iter([{"text": "first"}, {"text": "second"}])
    monkeypatch.setattr("krontune.recipes.audit.source_rows", lambda source, name: rows)
    read = training_texts(load(recipe))
    assert next(read) == "first" and next(rows) == {"text": "second"}, "no row is read ahead"


def test_code_that_the_recipe_does_not_allow_is_refused_with_what_to_add_and_not_imported(shout):
    with pytest.raises(RecipeError, match=r"add at the top level: allow: \['shout:Shout'\]"):
        load(shout, ["allow=[]"])
    assert "shout" not in sys.modules


def test_a_recipe_made_in_python_is_held_to_what_it_allows_too(shout, tmp_path):
    recipe = load(shout)
    data = recipe.model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match=r"add at the top level: allow: \['shout:Shout'\]"):
        Recipe.model_validate({**data, "allow": []})
    sys.modules.pop("shout", None)
    copied = recipe.model_copy(update={"allow": []})  # which pydantic does not validate
    [fault] = check(copied)
    assert "add at the top level" in fault.message
    with pytest.raises(RecipeError, match="add at the top level"):
        chain.run(copied, tmp_path / "run")
    assert "shout" not in sys.modules and not (tmp_path / "run").exists()


def test_the_code_of_a_models_repository_is_run_only_where_the_recipe_allows_it(small):
    trusting = ["base.model=some/model", "base.trust_remote_code=true"]
    with pytest.raises(RecipeError, match=r"trust_remote_code.*: true runs .* allow: \['some/model'\]"):
        load(small, trusting)
    assert load(small, [*trusting, "allow=[some/model]"]).base.trust_remote_code
    with pytest.raises(RecipeError, match="allow"):
        load(small, ["allow=['not a name']"])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("equal", "the reward pays a wrong completion 1 and a right one 1"),
        ("raises", "the reward fails on an empty completion (exception): ZeroDivisionError"),
        ("hangs", "the reward fails on an empty completion (timeout)"),
        ("gone", "has no 'gone'"),
    ],
)
def test_a_faulty_reward_is_found_by_the_check(shout, name, fault):
    rl = f"{{stage: rl, data: words.jsonl, reward: faulty:{name}, guard: {{item_timeout_s: 0.3}}, adapter: {{r: 2}}}}"
    found = [str(one) for one in check(load(shout, [f"allow=[faulty:{name}]", f"stages.rl={rl}"]))]
    assert any(fault in one for one in found), found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.rl.task={name: lis, n: [3, 5]}"], "task and data exclude each other"),
        (["stages.rl.data=null"], "the rl stage needs a task or data"),
        (["stages.rl.reward=certificate"], "reward 'certificate' needs a task"),
        (["stages.rl.controls=[format]"], "the control 'format' knows a task's form"),
        (["stages.rl.hints=0.5"], "'hints' is of a task"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(shout, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load(shout, overrides)


def test_math_over_data_is_guarded_and_tried(shout):
    pytest.importorskip("math_verify")
    Path("sums.jsonl").write_text(
        "".join(json.dumps({"prompt": f"1+{n}", "solution": str(n + 1)}) + "\n" for n in range(4))
    )
    base = ["stages.rl={stage: rl, data: sums.jsonl, reward: math, adapter: {r: 2}}"]
    [fault] = [str(one) for one in check(load(shout, base))]
    assert "needs the data set's column 'answer'" in fault
    assert check(load(shout, [*base, "stages.rl.reward_options={column: solution}"])) == []


def test_own_tasks_are_marked_inside_the_guard_and_shipped_ones_outside(small, tmp_path):
    own = ["allow=['krontune.rl.tasks.lis:Lis']", "stages.rl.task.name=krontune.rl.tasks.lis:Lis"]
    for overrides, inside in ((own, True), (["stages.rl.guard={workers: 1}"], False)):
        stage = load(small, overrides).stage("rl")
        task = make_task(stage.task)
        reward = monitored(make_reward(stage, task, 0), task, inside)
        assert isinstance(reward, Guarded) == inside and guard_of(reward) is not None


@pytest.mark.parametrize(("reward", "control"), [("random", None), ("certificate", "random")])
def test_random_pay_runs_no_code_of_an_own_task_on_what_a_model_wrote(small, monkeypatch, reward, control):
    own = ["allow=['krontune.rl.tasks.lis:Lis']", "stages.rl.task.name=krontune.rl.tasks.lis:Lis"]
    stage = load(small, [*own, f"stages.rl.reward={reward}"]).stage("rl")
    task = make_task(stage.task)
    rows = training_rows(stage, 0)
    expected = CertificateReward("lis", "random", seed=3)(completions=["x"] * 8, instance=rows["instance"])
    monkeypatch.setattr(type(task), "parse", lambda self, text: pytest.fail("the task read a completion"))
    paid = monitored(make_reward(stage, task, 3, control), task, own_task=True)(
        completions=["x"] * 8, instance=rows["instance"], log_metric=lambda name, value: None
    )
    assert paid == expected


def test_controls_run_the_stage_again_and_are_verified(small, tmp_path, monkeypatch):
    started = []

    def note(name, folder, adapter):
        started.append(name)
        place = folder.begin(name)
        if adapter:
            (place / "adapter").mkdir()
        folder.finish(name)

    monkeypatch.setattr(chain, "check", lambda recipe: [])
    seen = []
    for kind in ("select", "sft", "rl"):
        monkeypatch.setattr(chain, f"run_{kind}", lambda r, s, f: note(s.name, f, s.stage.stage in ("sft", "rl")))
    monkeypatch.setattr(chain, "run_verify", lambda r, s, f: (seen.extend(s.adapters), note("verify", f, False)))
    chain.run(load(small, ["stages.rl.controls=[random, format]"]), tmp_path / "run")
    assert started == ["select", "sft", "rl", "rl-random", "rl-format", "verify"]
    assert seen == ["sft", "rl", "rl-random", "rl-format"]


def test_a_credit_preset_is_changed_by_the_other_keys_and_survives_writing_out(small, tmp_path):
    recipe = load(small, ["stages.rl.credit={preset: v1, top_q: 0.3}", "stages.rl.guard={workers: 1}"])
    assert make_credit(recipe.stage("rl")) == TokenCredit.preset("v1", top_q=0.3)
    again = tmp_path / "again.yaml"
    again.write_text(recipe_text(recipe))
    assert recipe_text(load(again)) == recipe_text(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.rl.credit={}", "stages.rl.trainer.max_completion_length=16"], "it would do nothing"),
        (["stages.rl.credit={}", "stages.rl.trainer.loss_type=luspo"], "loss_type: luspo weighs whole sequences"),
        (["stages.rl.credit={layers: [99]}"], "layers must be indices from 0 to"),
        (["stages.rl.credit={gamma: .nan}"], "gamma must be a finite number, got nan"),
        (["stages.rl.risk={alpha: 0.1}", "stages.rl.trainer.num_generations=8"], "tail of one"),
        (["stages.rl.risk={}", "stages.rl.trainer.scale_rewards=group"], "takes the place of scale_rewards"),
        (
            [
                "stages.rl.risk={bundle: 3}",
                "stages.rl.trainer.per_device_train_batch_size=8",
                "stages.rl.trainer.num_generations=4",
            ],
            "cannot be cut into bundles of 3",
        ),
    ],
)
def test_credit_and_risk_that_cannot_work_are_faults(small, overrides, message):
    assert any(message in str(one) for one in check(load(small, overrides)))


def test_a_run_over_data_trains_guarded_reports_the_guards_health_and_leaves_no_worker(shout, tokenizer, monkeypatch):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from krontune.recipes import rl
    from krontune.recipes.run_folder import RunFolder

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **size)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    trainer = (
        "{max_steps: 1, per_device_train_batch_size: 2, num_generations: 2, max_completion_length: 6, logging_steps: 1}"
    )
    stage = f"{{stage: rl, data: words.jsonl, reward: faulty:length, controls: [random], trainer: {trainer}}}"
    overrides = ["base={model: ./model, quantization: null}", "allow=[faulty:length]", f"stages.rl={stage}"]
    recipe = load(shout, [*overrides, "stages.rl.adapter={r: 2, n_shapes: 2, target_modules: [q_proj]}"])
    keepers = []
    start = Guarded.__call__

    def watched(self, *args, **kwargs):
        paid = start(self, *args, **kwargs)
        keepers.extend(worker.process for worker in self._pool)
        return paid

    monkeypatch.setattr(Guarded, "__call__", watched)
    with RunFolder("run", recipe) as folder:
        for step in steps(recipe):
            rl.run_rl(recipe, step, folder)
    assert keepers and all(process.poll() is not None for process in keepers)
    report = json.loads(Path("run/rl/rlvr_report.json").read_text())
    health = next(one for one in report["checks"] if one["name"] == "verifier_health")
    assert health["details"]["counts"] == {"scored": 2} and health["value"] == 0
    assert Path("run/rl/adapter/adapter_config.json").is_file()
    assert Path("run/rl-random/adapter/adapter_config.json").is_file()
    assert set(folder.record["stages"]) == {"rl", "rl-random"}
