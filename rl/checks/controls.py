"""What of a gain is due to the reward: the same recipe under rewards that carry no signal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RlError
from ..statistics import ALIKE, alike_interval, bootstrap_interval
from .result import CheckResult, judge, not_run


def spurious_controls(
    before: Sequence[float], after: Sequence[float], controls: Mapping[str, Sequence[float]], threshold: float = 0.0
) -> CheckResult:
    """The gain of the real run beyond the best control run, on the same evaluation instances.

    before, after: (N,) accuracy of each instance (0/1, or the mean of its samples) before training and after
    it. controls: name -> (N,) accuracy after the same recipe with a reward that knows nothing: "random",
    "format", "wrong". value: gain with the reward minus the largest gain with a control, threshold 0, by a
    paired bootstrap over instances that takes the largest control anew in each resample; where all of them
    agree, by `alike_interval`. details: the gains.
    It sees the chance of the instances, not that of the training run: one run each is one draw of the seed.
    Source: Shao et al., arXiv 2506.10947, where Qwen2.5-Math-7B gains 21.4 points on MATH-500 from random rewards.
    Raises RlError for lengths that differ; not run without controls.
    """
    if not controls:
        return not_run("spurious_controls", "no control run was made", len(before))
    lengths = {len(before), len(after), *map(len, controls.values())}
    if len(lengths) != 1 or not len(before):
        raise RlError(f"all runs need the same instances, 1 or more, got {sorted(lengths)}")
    columns = np.stack(
        [np.asarray(run, dtype=float) for run in (before, after, *controls.values())], axis=1
    )  # (N, 2 + C)

    def margin(means: Any) -> Any:
        return means[:, 1] - means[:, 2:].max(axis=1)  # what came before cancels

    low, high = bootstrap_interval(columns, margin)
    means = columns.mean(axis=0)
    ci = (float(low), float(high))
    if high - low < ALIKE:  # every resample said the same
        ci = alike_interval(ci[0], len(columns))
    gains = {"reward": means[1] - means[0], **dict(zip(controls, means[2:] - means[0], strict=True))}
    details = {"gains": {name: float(gain) for name, gain in gains.items()}}
    value = float(margin(means[None])[0])
    verdict = "warn" if ci[0] <= threshold <= ci[1] else judge(ci, threshold)
    return CheckResult("spurious_controls", value, ci, len(before), threshold, verdict, details)
