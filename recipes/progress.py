"""One line that says where a run is: stage, step, speed, time left."""

import sys
import time
from typing import Any

from transformers import TrainerCallback

from .run_folder import RunFolder

PLAIN_LINE_EVERY_S = 15.0


class Progress:
    """Rewrites one line on a terminal; elsewhere prints a line every few seconds, and the last."""

    def __init__(self, stage: str, total: int, unit: str = "step", start: int = 0) -> None:
        """start: how many were done before."""
        self.stage, self.total, self.unit, self.start = stage, total, unit, start
        self.live = sys.stderr.isatty()
        self.started = self.printed = time.monotonic()
        self.width = 0

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if not self.live and done < self.total and now - self.printed < PLAIN_LINE_EVERY_S:
            return
        self.printed = now
        line = f"{self.stage}: {self.unit} {done}/{self.total}"
        if done > self.start:
            pace = (now - self.started) / (done - self.start)
            line += f", {_pace(pace, self.unit)}, {_clock((self.total - done) * pace)} left"
        line += f"  {note}" if note else ""
        if self.live:
            sys.stderr.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.live and self.width:
            sys.stderr.write("\n")


class Report(TrainerCallback):
    """Carries a trainer's steps to the progress line and its logs to metrics.jsonl."""

    def __init__(self, stage: str, folder: RunFolder, shown: tuple[str, ...]) -> None:
        self.stage, self.folder, self.shown = stage, folder, shown
        self.note = ""
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.progress = Progress(self.stage, state.max_steps, start=state.global_step)
        self.progress.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(state.global_step, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {key: _number(value) for key, value in (logs or {}).items()}
        self.folder.log(self.stage, state.global_step, values)
        self.note = "  ".join(f"{key} {values[key]:.3g}" for key in self.shown if isinstance(values.get(key), float))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress.close()


def _number(value: Any) -> Any:
    """Trainers log some numbers as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _pace(seconds: float, unit: str) -> str:
    return f"{seconds:.1f} s/{unit}" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.1f} {unit}s/s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
