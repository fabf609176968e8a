"""TRL's GRPO trainer with fast rollouts from a quantised, adapted model."""

from contextlib import nullcontext
from typing import Any

from trl import GRPOTrainer

from ..adapters.dense import dense_weights


class DenseRolloutGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, unchanged but for the weights it samples with: see `krontune.adapters.dense_weights`.

    The policy that samples and the one that learns are the same up to the rounding of one weight to bfloat16. With
    vLLM, which holds its own weights, this class changes nothing.

    Args:
        dense_rollouts: sample with dense weights.
        All others: of `trl.GRPOTrainer`.
    """

    def __init__(self, *args: Any, dense_rollouts: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dense_rollouts = dense_rollouts and not self.use_vllm

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with dense_weights(self.accelerator.unwrap_model(self.model)) if self.dense_rollouts else nullcontext():
            return super()._generate_single_turn(*args, **kwargs)
