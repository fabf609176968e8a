"""The shipped recipes of the embedded model but for the quickstart, shortened, from their first stage to the page."""

import json

import pytest

from krontune.recipes import load, run

SFT = ["stages.sft.trainer.max_steps=1", "stages.sft.trainer.per_device_train_batch_size=2"]
RL = [
    "stages.rl.trainer.max_steps=1",
    "stages.rl.trainer.per_device_train_batch_size=8",
    "stages.rl.trainer.gradient_accumulation_steps=1",
    "stages.rl.trainer.num_generations=8",
    "stages.rl.trainer.max_completion_length=16",
    "stages.rl.reward=random",  # one step of sft earns nothing, and a run that earns nothing is stopped
]
VERIFY = ["stages.verify.instances=4", "stages.verify.max_new_tokens=16"]
PUZZLES = "{{name: {0}, raw: {{puzzles: [{0}], size: 8, seed: 1}}}}"
SHORTENED = {
    "mixed_precision": [*SFT, *VERIFY],
    "risk_averse": [*SFT, *RL, *VERIFY],
    "rlvr_activity": [*SFT, *RL, *VERIFY],
    "adapt_inf_lifelong": [
        *SFT,
        f"stages.select.datasets=[{', '.join(PUZZLES.format(kind) for kind in ('sorting', 'lis'))}]",
        "stages.select.k=4",
        "stages.select.keep=8",
        "stages.select.held_out=2",
        "stages.select.clusters=2",
        "stages.select.warm_up={steps: 1, batch_size: 2}",
        "stages.sft.controls=[random]",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTENED)
def test_a_shipped_recipe_runs(name, tmp_path):
    recipe = load(name, SHORTENED[name])
    found = run(recipe, tmp_path / name, say=lambda line: None)
    record = json.loads((found.path / "run.json").read_text())
    assert all((found.path / stage / "done").is_file() for stage in recipe.names)
    assert record["stages"]["sft"]["trainable_parameters"] == 547_800
    assert (found.adapter / "adapter_model.safetensors").is_file() and (found.path / "report.html").is_file()
