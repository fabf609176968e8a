"""A TRL callback: stops a run that earns nothing from the start, and warns of a collapse while it happens."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from .during import collapse
from .result import CheckResult

logger = logging.getLogger(__name__)


class Alarms(TrainerCallback):
    """Watches the log of a TRL trainer. Add it with `callbacks=[Alarms()]`.

    stop_on_zero: end training where every reward of the first log entry is 0 (mean and spread): then the
        verifier, the form of the answer or the task is wrong, and no step can learn. With several steps to a
        log entry, that entry is the first look there is.
    stop_on_collapse: end training where `collapse` fails; without it the log carries a warning, once.

    After training: `logs` (all entries), `stopped` (why it ended the run, or "") and `result()`.
    """

    def __init__(self, stop_on_zero: bool = True, stop_on_collapse: bool = False):
        self.stop_on_zero = stop_on_zero
        self.stop_on_collapse = stop_on_collapse
        self.logs: list[dict[str, Any]] = []
        self.stopped = ""
        self._warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Looks at one log entry."""
        if not logs or "reward" not in logs:
            return
        self.logs.append({"step": state.global_step, **logs})
        if len(self.logs) == 1 and self.stop_on_zero and not logs["reward"] and not logs.get("reward_std"):
            self._stop(
                control,
                "every reward of the first batch is 0: look at a few completions, try the reward on a right answer "
                "(krontune.rl.checks.verifier), train on worked examples first or make the task easier",
            )
        found = collapse(self.logs)
        if found.verdict == "fail" and not self._warned:
            self._warned = True
            why = f"collapsed at step {state.global_step}: {', '.join(found.details['collapsed'])}"
            if self.stop_on_collapse:
                self._stop(control, why)
            else:
                logger.warning("%s", why)

    def state_dict(self) -> dict[str, Any]:
        """What a run that is continued needs."""
        return {"logs": self.logs, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.logs, self._warned = list(state["logs"]), state["warned"]

    def _stop(self, control: Any, why: str) -> None:
        self.stopped = why
        control.should_training_stop = True
        logger.error("training stopped: %s", why)

    def result(self) -> CheckResult:
        """The zero-reward stop as a check: value is the mean reward of the first batch."""
        if not self.logs:
            return CheckResult("first_batch", None, None, 0, None, "not run", {"reason": "nothing was logged"})
        first = self.logs[0]
        dead = not first["reward"] and not first.get("reward_std")
        return CheckResult(
            "first_batch", float(first["reward"]), None, 1, 0.0, "fail" if dead else "pass", {"stopped": self.stopped}
        )
