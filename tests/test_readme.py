"""The README's Python examples run as they stand; those that train are left to the quickstart's test."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "runs/" not in code]


def test_there_are_examples_of_three_rooms_and_no_placeholder():
    assert len(EXAMPLES) == 3 and "@@" not in README


@pytest.mark.parametrize("code", EXAMPLES, ids=["adapters", "data_selection", "rl"])
def test_an_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(code.strip().splitlines()) <= 10
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
