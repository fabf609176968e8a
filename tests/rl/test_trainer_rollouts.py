"""Token credit where completions are not plainly sampled: TRL's own loop of tool calls, and an engine such as vLLM."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import decoders
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from krontune.rl.credit import TokenCredit

sys.path.insert(0, str(Path(__file__).parent))
from tiny_grpo import ADAPTERS, completion_of, first_batch, gradient_of, logged, make, tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
torch.set_num_threads(1)

CHAT = (
    "{% for m in messages %}{{ m.role }}: "
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PARSED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close_pattern": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "</s>", "content": "text"},
    },
}
CHATS = [[{"role": "user", "content": text}] for text in ("one and two", "again")]


def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return f"the sum is {a + b}"


def talking_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template, tokenizer.response_template = CHAT, PARSED
    return tokenizer


def turns(trainer, prompt_ids, *_, **__):
    """In the place of sampling: three of four completions call the tool and go on after its output."""
    tokenizer, said = trainer.processing_class, []
    for number, ids in enumerate(prompt_ids):
        if "tool: " in tokenizer.decode(ids):
            text = "so that is what it is, " + "a bit " * (number % 3)
        elif number % 4 == 3:
            text = "no tool is needed for this"
        else:
            text = '<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call>'
        said.append(tokenizer(text + "</s>")["input_ids"])
    return said, None


def calling(folder, credit, **options):
    """A trainer whose completions are `turns` and whose rewards differ within each group."""
    return make(
        folder,
        credit,
        tools=[add],
        tokenizer=talking_tokenizer(),
        prompts=CHATS,
        reward=lambda completions, **_: [float(at % 4) for at in range(len(completions))],
        max_completion_length=160,
        **options,
    )


def test_what_a_tool_says_in_trls_own_loop_gets_neither_credit_nor_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turns)
    plain = first_batch(calling(tmp_path, TokenCredit("off")), CHATS)
    trainer = calling(tmp_path, TokenCredit("preplan"))
    batch = first_batch(trainer, CHATS)
    tool, own = batch["tool_mask"] == 0, batch["completion_mask"] * batch["tool_mask"] == 1
    says = trainer.processing_class.decode(batch["completion_ids"][0][tool[0]])
    assert says == "tool: the sum is 3</s>assistant: " and tool.any(1).sum() == 6
    gamma = batch["advantages"] / plain["advantages"][:, None]
    assert (gamma[~own] == 1).all()
    calls = tool.any(1)
    before = tool.long().flip(1).cumsum(1).flip(1) > 0  # the tool speaks later
    for turn in (own & before, own & ~before):
        assert gamma[calls][turn[calls]].max() == pytest.approx(1.5)
    gradient = gradient_of(trainer, batch)
    loud = batch["advantages"].where(~tool, 1e3)
    assert torch.equal(gradient_of(trainer, batch | {"advantages": loud}), gradient)
    assert not torch.equal(gradient_of(trainer, batch | {"advantages": gamma}), gradient)


def test_a_run_with_tools_trains_with_credit(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turns)
    trainer = calling(tmp_path, TokenCredit("coupled", horizon=(2, 40)), peft_config=ADAPTERS["lora"], max_steps=1)
    trainer.train()
    assert logged(trainer, "tools/call_frequency") == [0.75] and logged(trainer, "tools/failure_frequency") == [0.0]
    assert logged(trainer, "credit/share")[0] > 0.2


class Engine:
    """In the place of TRL's vLLM engine, which needs a GPU: completions from outside, with log-probabilities."""

    def __init__(self, *_, **__):
        self.synced = 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        said = [completion_of(ids, number) for number, ids in enumerate(prompts)]
        return None, said, [[[-4.6] for _ in ids] for ids in said], None


def as_the_engine(prompts, trainer):
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    said = Engine().generate(ids, None, 4, None)[1]
    return {"prompt_ids": ids, "completion_ids": said, "logprobs": None}


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_completions_of_an_engine_are_credited_alike_under_each_kind_of_its_correction(mode, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1e9}
    trainer = make(tmp_path, use_vllm=True, dense_rollouts=True, **options)
    assert not trainer.dense_rollouts
    batch = first_batch(trainer)
    expected = first_batch(make(tmp_path, rollout_func=as_the_engine))
    torch.testing.assert_close(batch["advantages"], expected["advantages"])
    ratios = {"token_truncate": batch["completion_ids"].shape, "sequence_mask": (8, 1)}
    assert batch["importance_sampling_ratio"].shape == ratios[mode]
    # One ratio a sequence weighs a sequence; within it, credit still counts.
    mask = batch["completion_mask"]
    mean = ((batch["advantages"] * mask).sum(1) / mask.sum(1))[:, None].expand_as(mask)
    by_token, by_mean = gradient_of(trainer, batch), gradient_of(trainer, batch | {"advantages": mean})
    assert (by_token - by_mean).norm() > 0.01 * by_mean.norm()
    assert trainer.vllm_generation.synced == 1


def test_a_run_with_an_engine_trains_with_credit(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)
    trainer = make(tmp_path, use_vllm=True, peft_config=ADAPTERS["moka"], vllm_importance_sampling_clip_max=1e9)
    trainer.train()
    assert trainer.vllm_generation.synced == 2 and logged(trainer, "credit/share")[0] > 0
    assert all(number > 0 for number in logged(trainer, "grad_norm"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_trl_says_what_is_missing_when_the_trainer_is_made(tmp_path):
    with pytest.raises(ImportError, match="vLLM is not available"):
        make(tmp_path, use_vllm=True)
