"""Tiny models with trained-looking adapters, a tokenizer of single characters, and rows of several forms."""

import string

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from krontune.adapters import MokaConfig

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_llama(**changes) -> LlamaForCausalLM:
    options = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


def tokenizer():
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def with_lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options))


def with_moka(model, **options):
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, MokaConfig(**({"r": 4, "target_modules": "all-linear", "init_weights": False} | options))
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "moka_gate" in name:
                parameter.normal_()
    return adapted


def batch(lengths=(9, 14, 5, 11), prompts=(3, 6, 1, 8), vocab=128):
    """Right-padded random inputs and labels; the answer of row i begins at prompts[i]."""
    generator = torch.Generator().manual_seed(5)
    longest = max(lengths)
    ids = torch.randint(3, vocab, (len(lengths), longest), generator=generator)
    columns = torch.arange(longest)[None]
    real = columns < torch.tensor(lengths)[:, None]
    ids = torch.where(real, ids, 0)
    labels = torch.where(real & (columns >= torch.tensor(prompts)[:, None]), ids, -100)
    return {"input_ids": ids, "attention_mask": real.long()}, labels
