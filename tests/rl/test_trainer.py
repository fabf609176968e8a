"""The seam in TRL that fast rollouts hang on."""

import inspect

import pytest
from trl import GRPOTrainer

from krontune.rl import trainer
from krontune.rl.trainer import DenseRolloutGRPOTrainer


def test_trl_still_generates_through_the_method_that_is_overridden():
    assert "_generate_single_turn" in vars(GRPOTrainer)
    assert "self._generate_single_turn(" in inspect.getsource(GRPOTrainer._generate)


@pytest.mark.parametrize("dense", [True, False])
def test_a_rollout_runs_inside_dense_weights_where_they_are_asked_for(dense, monkeypatch):
    entered = []

    class Recording:
        def __init__(self, model):
            self.model = model

        def __enter__(self):
            entered.append(self.model)

        def __exit__(self, *exception):
            entered.append("left")

    class Accelerator:
        def unwrap_model(self, model):
            return model

    monkeypatch.setattr(trainer, "dense_weights", Recording)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, *args: (list(entered), args))
    made = object.__new__(DenseRolloutGRPOTrainer)
    made.dense_rollouts, made.accelerator, made.model = dense, Accelerator(), "the model"
    made.share_prompts, made.use_vllm, made.rollout_cache = False, False, None
    seen, args = made._generate_single_turn("prompts", None)
    assert args == ("prompts", None)
    assert seen == (["the model"] if dense else []) and entered == (["the model", "left"] if dense else [])
