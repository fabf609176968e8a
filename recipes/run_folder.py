"""The run folder: what was asked, what was done, and where a cut run continues."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from ..data_selection.selection import write_atomic
from .schema import Recipe, Rl, Sft
from .trainer_args import given
from .yaml12 import is_plain_text

PACKAGES = ("krontune", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "numpy")
LOCK = ".lock"


class RunError(RuntimeError):
    """A run cannot begin or go on; the message says why, what is kept and what to do."""


class WrongFolder(RunError):
    """The run folder belongs to something else; nothing in it was changed."""


class RunFolder:
    """`recipe.yaml` as resolved, `run.json`, `metrics.jsonl`, and one folder a stage with a marker `done`.

    The marker is written last and at once, so a stage is either done or begins again. Nothing is written before the
    folder is entered with `with`, which also keeps other runs out of it.

    Raises:
        WrongFolder: the folder holds another recipe, or other files, or another run is writing to it.
    """

    def __init__(self, path: str | Path, recipe: Recipe) -> None:
        self.path = Path(path)
        self.recipe_text = recipe_text(recipe)
        self._refuse_other()
        self.record: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, "stages": {}, "data": {}}
        self._read_record()

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self._refuse_other()  # another run may have come and gone since
            if not (self.path / "recipe.yaml").is_file():
                write_atomic(self.path / "recipe.yaml", self.recipe_text.encode())
            self._read_record()
            if "recipe_sha256" not in self.record:
                self.record["recipe_sha256"] = hashlib.sha256(self.recipe_text.encode()).hexdigest()
                self._circumstances()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def _refuse_other(self) -> None:
        kept = self.path / "recipe.yaml"
        if kept.is_file():
            text = kept.read_text(encoding="utf-8")
            if text != self.recipe_text:
                raise WrongFolder(
                    f"{self.path} holds a run of another recipe, or of this one with other values "
                    f"({_first_difference(text, self.recipe_text)}). Nothing was changed. Give another folder with "
                    "--out, or delete this one."
                )
        elif self.path.exists() and not _is_empty(self.path):
            raise WrongFolder(f"{self.path} exists and is no run folder. Nothing was changed; give another with --out.")

    def is_done(self, stage: str) -> bool:
        return (self.path / stage / "done").is_file() and stage in self.record["stages"]

    def key(self, stage: str) -> str | None:
        """What the stage's result depends on, as one hash."""
        return hashlib.sha256(self.recipe_text.encode()).hexdigest()

    def begin(self, stage: str, keep: Collection[str] = (), step: int = 0, seconds: float = 0.0) -> Path:
        """The folder for the stage, empty but for the parts named in `keep`; what else an earlier, cut attempt left is
        removed, also its metrics of the steps after `step`. seconds: that the attempt took up to there."""
        folder = self.path / stage
        for part in folder.iterdir() if folder.is_dir() else ():
            if part.name not in keep:
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
        folder.mkdir(exist_ok=True)
        metrics = self.path / "metrics.jsonl"
        if metrics.is_file():
            lines = [line for line in metrics.read_text().splitlines() if _stands(line, stage, step)]
            write_atomic(metrics, "".join(f"{line}\n" for line in lines).encode())
        self._circumstances()
        self._started = time.monotonic() - seconds
        return folder

    def finish(self, stage: str, **facts: Any) -> None:
        """Record what the stage did, then mark it as done."""
        seconds = round(time.monotonic() - self._started, 1)
        self.record["stages"][stage] = {"seconds": seconds, "git": self.record["git"], **facts}
        self._write_record()
        write_atomic(self.path / stage / "done", json.dumps({"finished": _now(), "seconds": seconds}).encode())

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        line = json.dumps({"stage": stage, "step": step, **metrics}, default=str)
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(line + "\n")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if _stage_of(line) == stage]

    def add_data(self, name: str, **facts: Any) -> None:
        self.record["data"][name] = facts
        self._write_record()

    def _read_record(self) -> None:
        file = self.path / "run.json"
        if not file.is_file():
            return
        try:
            self.record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(
                f"{file} is damaged ({error}). Delete it to run all stages again, or put back a copy of it."
            ) from error

    def _circumstances(self) -> None:
        """Versions, machine and commit of the stage that begins; what is done keeps its own commit."""
        self.record.update(_environment())
        self._write_record()

    def _write_record(self) -> None:
        write_atomic(self.path / "run.json", json.dumps(self.record, indent=2).encode())


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, with overrides and krontune's defaults; of a trainer the given keys. `load` reads it back."""
    content = recipe.model_dump()
    for stage, values in zip(recipe.stages, content["stages"], strict=True):
        if isinstance(stage, Sft | Rl):
            values["trainer"] = given(stage.trainer)
        for key in ("credit", "risk", "guard"):
            if isinstance(values.get(key), dict):
                values[key] = given(getattr(stage, key))
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes where our reader takes it for something else: 12e4 is text to PyYAML, a number to it."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain_text(text) else "'")


_Dumper.add_representer(str, _Dumper.represent_text)


def _stage_of(line: str) -> str | None:
    """The stage of a metrics line; None for a line that was cut while it was written."""
    try:
        return json.loads(line)["stage"]
    except (ValueError, KeyError):
        return None


def _stands(line: str, stage: str, step: int) -> bool:
    """Whether a metrics line is whole and not of the steps of the stage after this one."""
    whose = _stage_of(line)
    return whose is not None and (whose != stage or json.loads(line)["step"] <= step)


def _is_empty(path: Path) -> bool:
    """A folder with nothing in it but what a run cut in its first moments leaves: the lock, unfinished files."""
    return path.is_dir() and all(f.name == LOCK or f.match(".*.tmp") for f in path.iterdir())


def _lock(folder: Path) -> int:
    """Held until the process ends, however it ends."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise WrongFolder(f"another krontune runs in {folder}; wait for it, or give another with --out") from None
    except (ImportError, OSError):  # neither on Windows nor on every network drive
        pass
    return handle


def _first_difference(old: str, new: str) -> str:
    pairs = zip([*old.splitlines(), ""], [*new.splitlines(), ""], strict=False)
    was, now = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return f"{was.strip() or 'nothing'!r} there, {now.strip() or 'nothing'!r} now"


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "last_started": _now(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the working directory's repository, and whether it has uncommitted changes."""
    try:
        commit, status = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
