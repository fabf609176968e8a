"""The guard over sampler and learner, on log entries as TRL writes them with vLLM."""

from math import inf, nan
from types import SimpleNamespace

import pytest

from krontune.rl import MismatchGuard, RlError
from krontune.rl.mismatch import MEAN


def logged(guard: MismatchGuard, *values: float | None) -> list[bool]:
    """Whether training is to stop, after each entry."""
    control, stops = SimpleNamespace(should_training_stop=False), []
    for step, value in enumerate(values, 1):
        logs = {"reward": 0.5} if value is None else {"reward": 0.5, MEAN: value}
        guard.on_log(None, SimpleNamespace(global_step=step), control, logs=logs)
        stops.append(control.should_training_stop)
    return stops


def test_training_stops_at_the_first_entry_above_the_limit_and_says_which():
    guard = MismatchGuard(0.1)
    assert logged(guard, 0.02, None, 0.1, 0.11, 0.5) == [False, False, False, True, True]
    assert guard.worst == 0.5 and guard.stopped.startswith("step 4: ") and "0.11 nats a token" in guard.stopped


@pytest.mark.parametrize("broken", [nan, inf])
def test_a_difference_that_is_no_number_is_above_any_limit(broken):
    guard = MismatchGuard(10)
    assert logged(guard, 0.1, broken) == [False, True] and "above the limit of 10" in guard.stopped


def test_without_a_measured_difference_nothing_is_said():
    guard = MismatchGuard(0.1)
    assert logged(guard, None, None) == [False, False] and guard.worst is None and guard.stopped == ""


@pytest.mark.parametrize("limit", [0, -1, nan])
def test_a_limit_is_above_zero(limit):
    with pytest.raises(RlError, match="limit must be above 0, in nats a token"):
        MismatchGuard(limit)


def test_a_recipe_limits_only_what_is_measured(tmp_path):
    from krontune.recipes import RecipeError, load

    file = tmp_path / "r.yaml"
    stage = "{stage: rl, task: {name: lis, n: [3, 4]}, adapter: {}, max_mismatch: 0.1}"
    file.write_text(f"name: r\nbase: {{model: m}}\nstages: [{stage}]\n")
    for overrides in ([], ["stages.rl.trainer={use_vllm: true, vllm_importance_sampling_correction: false}"]):
        with pytest.raises(RecipeError, match="max_mismatch limits what is measured with use_vllm: true or with cache"):
            load(file, overrides)
    assert load(file, ["stages.rl.trainer.use_vllm=true"]).stage("rl").max_mismatch == 0.1


def test_trl_still_logs_under_this_name():
    import inspect

    from trl import GRPOTrainer

    assert f'"{MEAN}"' in inspect.getsource(GRPOTrainer)
