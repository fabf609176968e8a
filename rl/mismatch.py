"""Stops a run whose sampler and learner have drifted apart."""

from typing import Any

from transformers import TrainerCallback

from .errors import RlError

MEAN, MAX = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


class MismatchGuard(TrainerCallback):
    """Ends training where the engine that samples and the model that learns disagree. Add it to a GRPO trainer's
    `callbacks`.

    An engine with weights, kernels or a cache of its own gives the tokens that it samples other probabilities than the
    model that is updated on them; policy gradients hold for a small difference and collapse with a large one.

    limit: nats a token; of the mean absolute difference of the two log-probabilities over a log entry, logged as
        `sampling/sampling_logp_difference/mean`: by TRL on every sampled token where it samples with vLLM and
        `vllm_importance_sampling_correction` is on, and by `DenseRolloutGRPOTrainer` with a `rollout_cache`. Entries
        without it are passed over.

    After training: `worst` (the largest entry, None where none was measured) and `stopped` (why it ended the run, or
    "").

    Raises RlError: the limit is not above 0.
    """

    def __init__(self, limit: float) -> None:
        if not limit > 0:
            raise RlError(f"limit must be above 0, in nats a token, got {limit}")
        self.limit = limit
        self.worst: float | None = None
        self.stopped = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at one log entry."""
        value = (logs or {}).get(MEAN)
        if value is None:
            return
        self.worst = value if self.worst is None or not value <= self.worst else self.worst
        if not value <= self.limit and not self.stopped:  # NaN is above any limit
            self.stopped = (
                f"step {state.global_step}: the log-probabilities of sampler and learner differ by {value:.3g} nats a "
                f"token on average, above the limit of {self.limit:g}: sample with weights and a cache of the "
                "learner's precision, or raise the limit"
            )
            control.should_training_stop = True
