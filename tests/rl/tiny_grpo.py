"""TRL's GRPO on a tiny random model that speaks in single characters, for the tests of the trainer."""

import random
import string
from copy import deepcopy

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from krontune.adapters import MokaConfig
from krontune.rl.credit import TokenCredit
from krontune.rl.trainer import TokenCreditGRPOTrainer

# Completions of 24 tokens, most of which have an FAI within 2 to 8 tokens.
SHORT = TokenCredit(horizon=(2, 8), window=4, credit_truncated=True)
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "moka": MokaConfig(r=4, target_modules="all-linear"),
}
PROMPTS = ["say a", "say bee", "c", "say d again"]
ARGUMENTS = ("risk", "rollout_func", "share_prompts", "dense_rollouts", "tools")


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def letters(completions, **_):
    return [sum(c in "aeiou" for c in text) / 10 for text in completions]


def make(
    out,
    credit=SHORT,
    kind=TokenCreditGRPOTrainer,
    model=None,
    peft_config=None,
    reward=letters,
    prompts=PROMPTS,
    tokenizer=None,
    **options,
):
    """A trainer. Options are those of GRPOConfig, or arguments of the trainer in `ARGUMENTS`."""
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 24,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    ours = {} if kind is GRPOTrainer else {"credit": credit, "dense_rollouts": False}
    ours |= {name: options.pop(name) for name in ARGUMENTS if name in options}
    return kind(
        model=model if model is not None else tiny_model(),
        args=GRPOConfig(output_dir=str(out), **(defaults | options)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer or tiny_tokenizer(),
        reward_funcs=reward,
        peft_config=deepcopy(peft_config),
        **ours,
    )


def train(trainer):
    """Samples alike for every trainer."""
    torch.manual_seed(0)
    trainer.train()


def first_batch(trainer, prompts=PROMPTS[:2]):
    """What one call of the overridden method returns, for rows as the data loader gives them."""
    trainer.model.train()
    torch.manual_seed(0)
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def gradient_of(trainer, batch):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def weights(trainer):
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters() if p.requires_grad])


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def completion_of(prompt, number):
    """Of 13 to 24 tokens, the same for a prompt and a number wherever they are."""
    draw = random.Random(f"{prompt} {number % 4}")
    return [*(draw.randint(4, 100) for _ in range(draw.randint(12, 23))), 2]


def scripted(prompts, trainer):
    """Completions that depend on the prompt and on nothing else, of uneven lengths, with a tool's output in each."""
    completions = [completion_of(prompt, number) for number, prompt in enumerate(prompts)]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": [[0 if 5 <= t < 9 else 1 for t in range(len(ids))] for ids in completions],
    }
