import dataclasses

import pytest
from pydantic import ValidationError
from trl import GRPOConfig, SFTConfig

from krontune.recipes.loader import load
from krontune.recipes.trainer_args import GrpoTrainerArgs, SftTrainerArgs, given, set_by_krontune

SECTIONS = [(SftTrainerArgs, SFTConfig), (GrpoTrainerArgs, GRPOConfig)]


@pytest.mark.parametrize(("section", "config"), SECTIONS)
def test_every_field_of_trl_can_be_given_or_is_said_to_be_set_elsewhere(section, config):
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    elsewhere = {name for name in fields if set_by_krontune(name)}
    assert set(section.model_fields) == fields - elsewhere
    assert {"output_dir", "seed", "hub_model_id", "resume_from_checkpoint"} <= elsewhere and len(elsewhere) < 30
    assert not set_by_krontune("learning_rate") and not set_by_krontune("learning_rat")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", 10),
        ("learning_rate", 1e-4),
        ("learning_rate", 1),
        ("logging_steps", 5),
        ("bf16", False),
        ("gradient_checkpointing", True),
        ("lr_scheduler_type", "cosine"),
        ("lr_scheduler_kwargs", {"num_cycles": 2}),
        ("report_to", "none"),
        ("report_to", ["none"]),
        ("eval_steps", None),
        ("debug", ["underflow_overflow"]),
        ("parallelism_config", None),
    ],
)
@pytest.mark.parametrize(("section", "config"), SECTIONS)
def test_a_value_of_the_right_type_arrives_in_trls_configuration(section, config, key, value):
    arguments = given(section.model_validate({key: value}))
    assert arguments == {key: value}
    arrived = getattr(config(output_dir="unused", use_cpu=True, **arguments), key)
    assert arrived == ([] if key == "report_to" else value)  # "none" stands for an empty list there


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", True),
        ("max_steps", "10"),
        ("max_steps", 1.0),
        ("max_steps", 1e3),
        ("max_steps", None),
        ("learning_rate", True),
        ("learning_rate", "1e-4"),
        ("logging_steps", False),
        ("bf16", 1),
        ("bf16", "yes"),
        ("lr_scheduler_type", 3),
        ("lr_scheduler_kwargs", ["a"]),
        ("report_to", 3),
        ("report_to", [3]),
        ("parallelism_config", {"dp_size": 2}),
        ("learning_rat", 1e-4),
        ("output_dir", "there"),
        ("seed", 1),
    ],
)
@pytest.mark.parametrize("section", [SftTrainerArgs, GrpoTrainerArgs])
def test_a_value_of_another_type_and_an_unknown_key_are_refused(section, key, value):
    with pytest.raises(ValidationError):
        section.model_validate({key: value})


def test_each_section_has_the_fields_of_its_own_trainer():
    assert "num_generations" in GrpoTrainerArgs.model_fields and "packing" in SftTrainerArgs.model_fields
    for section, key in [(SftTrainerArgs, "num_generations"), (GrpoTrainerArgs, "packing")]:
        with pytest.raises(ValidationError):
            section.model_validate({key: 2})


def test_only_what_the_recipe_says_is_handed_on():
    assert given(SftTrainerArgs()) == {} == given(GrpoTrainerArgs())
    default = SFTConfig(output_dir="unused", use_cpu=True).weight_decay
    assert given(SftTrainerArgs.model_validate({"weight_decay": default})) == {"weight_decay": default}


def test_a_recipe_is_loaded_without_making_trls_configurations(small, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("made")

    monkeypatch.setattr(SFTConfig, "__init__", refuse)
    monkeypatch.setattr(GRPOConfig, "__init__", refuse)
    recipe = load(small, ["stages.sft.trainer.bf16=true"])
    assert given(recipe.stage("sft").trainer) == {"max_steps": 2, "learning_rate": 1e-3, "bf16": True}
