"""What a recipe needs beyond this machine: how much an rl stage generates."""

import pytest

from krontune.recipes.loader import load
from krontune.recipes.needs import notes
from krontune.recipes.preflight import check

from .conftest import write_rows

TRAINER = "{per_device_train_batch_size: 8, num_generations: 8, max_completion_length: 1024"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("krontune.recipes.needs.hub_answers", lambda: False)


def notes_of(small, *overrides):
    return " / ".join(notes(load(small, overrides)))


@pytest.mark.parametrize(("instances", "many"), [(2000, True), (20, False)])
def test_epochs_over_a_task_are_counted_as_steps(small, instances, many):
    said = notes_of(
        small, f"stages.rl.instances={instances}", f"stages.rl.trainer={TRAINER}, num_train_epochs: 2}}"
    )  # 2 epochs x 2000 rows x 8 completions x 1024 tokens, 8 completions a step
    assert ("33 million tokens in 4000 steps: that needs a GPU" in said) == many and "not known" not in said


def test_epochs_over_data_are_counted_where_the_rows_are_known(small, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "1"}] * 2000)
    stage = f"adapter: {{r: 2}}, reward: math, trainer: {TRAINER}, num_train_epochs: 2}}"
    alone = "stages=[{stage: rl, data: %s, " + stage + "}]"
    assert "33 million tokens in 4000 steps: that needs a GPU" in notes_of(small, alone % "rows.jsonl")
    assert "how many steps the rl stage takes is not known" in notes_of(small, alone % "{hub: some/rows}")


def test_max_steps_bounds_the_epochs(small):
    assert "steps" not in notes_of(small, "stages.rl.instances=2000", f"stages.rl.trainer={TRAINER}, max_steps: 3}}")


@pytest.mark.parametrize("key", ["stages.select.raw", "stages.select.target", "stages.sft.data"])
def test_texts_of_the_hub_are_a_note_and_no_fault_where_it_does_not_answer(small, key):
    override = f"{key}={{hub: some/texts, text: body}}"
    assert "data set 'some/texts' comes from the Hub, which does not answer; its rows were not checked" in notes_of(
        small, override
    )
    assert check(load(small, [override])) == []
