"""Rollouts with another cache: that it is used, that what it costs is measured, and that the guard stops on it."""

import json
import string
from pathlib import Path

import pytest
import torch
import transformers.generation.utils as generation
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast
from transformers.cache_utils import QuantizedCache
from trl import GRPOConfig

from krontune.recipes import RecipeError, load
from krontune.recipes.chain import run as run_recipe
from krontune.recipes.preflight import check
from krontune.recipes.run_folder import RunError
from krontune.rl import MismatchGuard, RlError
from krontune.rl import rollout_cache as cache_module
from krontune.rl import trainer as trainer_module
from krontune.rl.mismatch import MAX, MEAN
from krontune.rl.rollout_cache import cache_settings, group_size, recorded
from krontune.rl.trainer import DenseRolloutGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
torch.set_num_threads(1)
CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_model():
    torch.manual_seed(0)
    tokens = {"vocab_size": 104, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **tokens, num_key_value_heads=2, initializer_range=0.3)).eval()


def tiny_tokenizer():
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", "<s>", *string.printable])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    chat = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=letters, **names, chat_template=chat)


def trained(out, cache, steps=2, guard=None, **options):
    """The trainer after some steps, and the caches that its rollouts were given."""
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    trainer = DenseRolloutGRPOTrainer(
        model=tiny_model(),
        args=GRPOConfig(output_dir=str(out), **settings),
        train_dataset=Dataset.from_dict({"prompt": ["say a", "say bee", "c", "say d again"]}),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        callbacks=[guard] if guard else [],
        rollout_cache=cache,
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("cache", ["fp8", "int4"])
def test_rollouts_use_the_cache_and_what_it_costs_is_logged(tmp_path, monkeypatch, cache):
    made = []

    class Spied(QuantizedCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append((self, kwargs))

    monkeypatch.setattr(generation, "QuantizedCache", Spied)
    trainer = trained(tmp_path, cache)
    assert len(made) == 2 and all(one.get_seq_length() >= 12 for one, _ in made), "one for each sampling, filled"
    assert made[0][1]["backend"] == ("fp8" if cache == "fp8" else "hqq")
    assert len(logged(trainer, MEAN)) == 2 and all(0 < value < 2 for value in logged(trainer, MEAN))
    assert all(most >= mean for most, mean in zip(logged(trainer, MAX), logged(trainer, MEAN), strict=True))


def test_over_the_usual_cache_sampler_and_learner_agree_token_by_token(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "cache_settings", lambda *args: {})
    assert max(logged(trained(tmp_path, "fp8", 2), MAX)) < 1e-4
    assert logged(trained(tmp_path, None, 1), MEAN) == []


def test_the_guard_stops_a_run_above_its_limit(tmp_path):
    guard = MismatchGuard(1e-6)
    trainer = trained(tmp_path, "int4", steps=5, guard=guard)
    assert trainer.state.global_step == 1 and "above the limit of 1e-06" in guard.stopped
    assert guard.worst == logged(trainer, MEAN)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cache", [None, "int4"])
def test_recorded_are_the_probabilities_that_the_sampler_used(cache, temperature):
    """Compared with a decoding of one's own, token by token, over the same kind of cache."""
    model, settings = tiny_model(), cache_settings(cache, tiny_model().config, CPU) if cache else {}
    ids, attended = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6}
    wanted = GenerationConfig(**options, eos_token_id=None, pad_token_id=0, **settings)
    with torch.no_grad(), recorded(model, temperature) as found:
        sampled = model.generate(input_ids=ids, attention_mask=attended, generation_config=wanted)
    assert "generate" not in vars(model) and found[0].shape == (2, 6)

    past = QuantizedCache(config=model.config, **settings["cache_config"]) if cache else None
    step, mask, expected = ids, attended, []
    for place in range(4, 10):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        with torch.no_grad():
            out = model(
                input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
            )
        past, step = out.past_key_values, sampled[:, place : place + 1]
        expected.append((out.logits[:, -1] / temperature).log_softmax(-1).gather(1, step)[:, 0])
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    torch.testing.assert_close(found[0], torch.stack(expected, 1), atol=1e-5, rtol=1e-5)


def test_groups_divide_a_head_and_fill_bytes():
    def of(size, heads):
        return LlamaConfig(hidden_size=size * heads, num_attention_heads=heads, num_key_value_heads=heads)

    found = {
        (s, h, bits): group_size(of(s, h), bits) for s, h, bits in [(64, 8, 4), (64, 3, 4), (64, 3, 2), (80, 4, 4)]
    }
    assert list(found.values()) == [64, 32, 16, 16]
    for (size, heads, bits), group in found.items():
        assert size % group == 0 and heads * size // group * bits % 8 == 0
    with pytest.raises(RlError, match="3 heads of 20 numbers cannot be cut into groups"):
        group_size(of(20, 3), 4)


def test_what_cannot_work_is_refused_by_name(tmp_path, monkeypatch):
    config = tiny_model().config
    with pytest.raises(RlError, match="cache 'int3' is unknown; allowed: offloaded, fp8, int4, int2"):
        cache_settings("int3", config, CPU)
    with pytest.raises(RlError, match="'offloaded' moves what a GPU holds to main memory"):
        cache_settings("offloaded", config, CPU)
    assert cache_settings("offloaded", config, torch.device("cuda")) == {"cache_implementation": "offloaded"}
    window = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(RlError, match="cache 'fp8' cannot hold this model: .*full attention"):
        cache_settings("fp8", window, CPU)
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    with pytest.raises(RlError, match="cache 'int4' needs the package hqq: pip install hqq; 'fp8' needs none"):
        cache_settings("int4", config, CPU)


# ---------------------------------------------------------------- from a recipe

TASK = "task: {name: lis, n: [3, 4]}, instances: 4, reward: random, adapter: {r: 2}"
SIZE = "max_steps: 3, per_device_train_batch_size: 4, num_generations: 4, max_completion_length: 12"
STAGE = f"{{stage: rl, {TASK}, cache: fp8, trainer: {{{SIZE}, logging_steps: 1}}}}"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    Path("r.yaml").write_text(f"name: r\nbase: {{model: ./model, quantization: null}}\nstages: [{STAGE}]\n")
    return "r.yaml"


@pytest.mark.slow
def test_a_recipe_logs_the_mismatch_and_its_limit_ends_the_run(recipe):
    assert load(recipe).stage("rl").mismatch_limit == 0.2
    with pytest.raises(RunError, match=r"rl: stopped at step 1: .* above the limit of 1e-07.*\(max_mismatch\)"):
        run_recipe(load(recipe, ["stages.rl.max_mismatch=1e-7"]), "run", say=lambda line: None)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line[MEAN] > 0 for line in lines if MEAN in line] == [True]


def test_limits_are_automatic_given_or_none(recipe):
    for override, limit in (("null", None), ("0.3", 0.3), ("auto", 0.2)):
        assert load(recipe, [f"stages.rl.max_mismatch={override}"]).stage("rl").mismatch_limit == limit
    for cache in ("null", "int4"):
        found = load(recipe, [f"stages.rl.cache={cache}"]).stage("rl").mismatch_limit
        assert found == (None if cache == "null" else 0.2)
    with pytest.raises(RecipeError, match="max_mismatch"):
        load(recipe, ["stages.rl.max_mismatch=0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.rl.cache=offloaded"], "there is no GPU here"),
        (["stages.rl.share_prompts=true"], "share_prompts fills a cache of its own"),
        (["stages.rl.trainer.use_vllm=true"], "use_vllm has its own"),
        (["stages.rl.trainer.cache_implementation=static"], "both set the cache of rollouts"),
        (["stages.rl.cache=null", "stages.rl.trainer.cache_implementation=quantized"], "nothing measures how far"),
        (["stages.rl.cache=int4"], "needs the package hqq"),
    ],
)
def test_what_cannot_go_together_is_a_fault(recipe, monkeypatch, overrides, message):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    if overrides == ["stages.rl.cache=int4"]:
        monkeypatch.setattr("krontune.recipes.preflight.find_spec", lambda name: None)
    faults = [str(fault) for fault in check(load(recipe, overrides))]
    assert any(message in fault for fault in faults), faults


def test_a_model_that_the_cache_cannot_hold_is_a_fault(recipe):
    config = json.loads(Path("model/config.json").read_text())
    text = {**config, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    Path("model/config.json").write_text(json.dumps(text))
    faults = [str(fault) for fault in check(load(recipe))]
    assert len(faults) == 1 and "cache 'fp8' cannot hold this model" in faults[0], faults


def test_the_names_of_the_recipe_are_those_of_the_trainer():
    from typing import get_args

    from krontune.recipes.schema import Rl

    literal, _ = get_args(Rl.model_fields["cache"].annotation)
    assert get_args(literal) == cache_module.CACHES
