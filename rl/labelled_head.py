"""TRL's fused language-model head, without the positions that nothing is learned from.

TRL promises to project only positions with a label, and does so where Triton runs. Elsewhere it projects all of them:
on a CPU a prompt of 90 tokens with an answer of 25 then costs the head four times what it should.
"""

import functools
from typing import Any

from peft import PeftModel
from torch.nn.functional import pad

IGNORED = -100
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's output


def score_labelled_only(model: Any) -> None:
    """Have a model that TRL gave its fused head score labelled positions alone on a CPU: the same results.

    For what `SFTTrainer` and `GRPOTrainer` make of their model; call it on `trainer.model`. Calls without
    `fused_lm_head=True` and calls on other devices are left as they are.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    scored_everywhere = model.forward

    @functools.wraps(scored_everywhere)  # `generate` reads the signature
    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None, **others: Any):
        if not fused_lm_head or model.device.type != "cpu":
            given = {"fused_lm_head": fused_lm_head or None, "labels": labels, "shift_labels": shift_labels}
            others |= {name: value for name, value in given.items() if value is not None}
            return scored_everywhere(*args, **others)
        following = pad(labels[:, 1:], (0, 1), value=IGNORED) if shift_labels is None else shift_labels
        mask = following != IGNORED  # (B, T)

        def keep_labelled(module: Any, inputs: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = outputs.last_hidden_state[mask][None]  # (1, labels, H)
            return outputs

        hook = model.base_model.register_forward_hook(keep_labelled)
        try:
            scored = scored_everywhere(*args, fused_lm_head=True, shift_labels=following[mask][None], **others)
        finally:
            hook.remove()
        shown = mask.shape[1] - (shift_labels is None)
        for name in PER_TOKEN:
            if (value := scored[name] if name in scored else None) is not None:
                scored[name] = value.new_zeros(mask.shape).masked_scatter(mask, value)[:, :shown]
        scored.label_mask = mask[:, :shown]
        return scored

    model.forward = forward
