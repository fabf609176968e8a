"""Checkpoints inside the sft and rl stages: taken whole or not at all, with everything that a stage needs to go on as
if it had not been cut.

The Trainer saves weights, optimiser, schedule and the states of chance. What it forgets is put into the mark that is
written last: the loss and the metrics since the last log line, counted tokens, and what the stage's own objects know.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data_selection.selection import write_atomic
from .masking import hidden
from .run_folder import TRAINER

MARK = "complete.json"
STATE = "state_{}.json"  # of a process that is not the first
SAVING = ("save_strategy", "save_steps", "save_total_limit")

# A twentieth of the steps, and of the checkpoints the last two: the one that is written while the other is whole.
DEFAULTS = {"save_strategy": "steps", "save_steps": 0.05, "save_total_limit": 2}


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    seconds: float
    """Of training up to here."""
    state: dict[str, Any]
    processes: int = 1


def saving(given: Mapping[str, Any]) -> dict[str, Any]:
    """How the Trainer saves: the recipe's keys over our defaults, with never less than two checkpoints kept."""
    found = DEFAULTS | {key: given[key] for key in SAVING if key in given}
    if isinstance(found["save_total_limit"], int):
        found["save_total_limit"] = max(2, found["save_total_limit"])
    return found


def last_checkpoint(stage: Path, key: str | None) -> Checkpoint | None:
    """The last whole checkpoint in the folder of a stage that was made for `key`; those that are not are removed."""
    found = []
    for path in (stage / TRAINER).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        mark = _read(path)
        if mark is None or mark["key"] != key:
            shutil.rmtree(path)
        else:
            found.append(Checkpoint(path, mark["step"], mark["seconds"], mark["state"], mark.get("processes", 1)))
    return max(found, key=lambda one: one.step, default=None)


def of_rank(last: Checkpoint | None, rank: int) -> Checkpoint | None:
    """The same with the state of that process."""
    if last is None or rank == 0:
        return last
    return replace(last, state=json.loads((last.path / STATE.format(rank)).read_text(encoding="utf-8")))


def _read(path: Path) -> dict[str, Any] | None:
    """The mark of a checkpoint; None where there is none, or a file is not as it was."""
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
        whole = all(_digest(path / name) == digest for name, digest in mark["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return mark if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints(TrainerCallback):
    """Marks the checkpoints of one trainer, and restores from one what the Trainer does not.

    It stands before the callbacks that read the log. `train` sets `trainer`.
    """

    def __init__(
        self, key: str | None, last: Checkpoint | None, given: Mapping[str, Any], objects: Mapping[str, Stateful] = {}
    ) -> None:
        """given: the recipe's trainer keys. objects: by name, what else has a state that the training changes."""
        self.key, self.last, self.objects = key, last, objects
        self.asked_for = any(key in given for key in SAVING)
        self.trainer: Any = None
        self.started = time.monotonic() - (last.seconds if last else 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.last is None:
            return
        for name, one in self.objects.items():
            one.load_state_dict(self.last.state["objects"][name])
        saved, trainer = self.last.state, self.trainer
        trainer._tr_loss += saved["loss"]
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        trainer._initial_global_step = 0  # the mean loss at the end is over all steps
        trainer._metrics["train"].update(saved["metrics"])
        trainer._total_train_tokens = saved["tokens"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_the_last(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_out_the_last(control)

    def _leave_out_the_last(self, control: Any) -> None:
        """At the end the stage saves its adapter; from there the Trainer cannot go on, it would take one step more."""
        if control.should_training_stop:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop or args.save_only_model:
            return
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not state.is_world_process_zero:
            write_atomic(path / STATE.format(args.process_index), json.dumps(self._state(), default=float).encode())
        self.trainer.accelerator.wait_for_everyone()  # each process has written its files
        if not state.is_world_process_zero:
            return
        mark = {
            "key": self.key,
            "step": state.global_step,
            "processes": args.world_size,
            "seconds": time.monotonic() - self.started,
            "files": {str(file.relative_to(path)): _digest(file) for file in path.rglob("*") if file.is_file()},
            "state": self._state(),
        }
        write_atomic(path / MARK, json.dumps(mark, default=float).encode())

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "metrics": dict(trainer._metrics["train"]),
            "tokens": trainer._total_train_tokens,
            "objects": {name: hidden(one.state_dict()) for name, one in self.objects.items()},
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The last line's speed is that of all steps, so its time must be, too."""
        if self.last is None or not logs or "train_runtime" not in logs:
            return
        whole = logs["train_runtime"] + self.last.seconds
        for key in ("train_samples_per_second", "train_steps_per_second"):
            logs[key] = logs[key] * logs["train_runtime"] / whole
        logs["train_runtime"] = whole


def remove_checkpoints(stage: Path) -> None:
    for path in (stage / TRAINER).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path)
    (stage / TRAINER / "README.md").unlink(missing_ok=True)  # TRL's card, written with each
    if (stage / TRAINER).is_dir() and not any((stage / TRAINER).iterdir()):
        (stage / TRAINER).rmdir()
