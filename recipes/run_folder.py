"""The run folder: what was asked, what was done, and where a cut run continues."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from ..data_selection.selection import write_atomic
from .content import Inputs, key_of
from .faults import RecipeError
from .masking import hidden, hide, learn, masked
from .processes import processes
from .schema import Hub, Recipe, Rl, Sft
from .trainer_args import given
from .yaml12 import is_plain_text, read

PACKAGES = ("krontune", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "numpy")
LOCK, METRICS, BEGUN, TRAINER = ".lock", "metrics.jsonl", "begun", "trainer"


class RunError(RuntimeError):
    """A run cannot begin or go on; the message says why, what is kept and what to do."""


class WrongFolder(RunError):
    """The run folder belongs to something else; nothing in it was changed."""


class RunFolder:
    """`recipe.yaml` as resolved, `run.json`, `metrics.jsonl`, and one folder a stage with a marker `done`.

    The marker is written last and at once, so a stage is either done or begins again. It holds what the stage was made
    from, see `expect`: a finished stage that is run again because that has changed is moved to `<stage>.old-<key>`,
    and taken back from there where it is wanted again. Nothing is written before the folder is entered with `with`,
    which also keeps other runs out of it.

    Raises:
        WrongFolder: the folder holds a recipe of another name, or other files, or another run is writing to it.
    """

    def __init__(self, path: str | Path, recipe: Recipe) -> None:
        self.path, self.recipe = Path(path), recipe
        self.processes = processes()
        self.recipe_text = recipe_text(recipe)
        self._refuse_other()
        self.record: dict[str, Any] = {"name": recipe.name, "seed": recipe.seed, "stages": {}, "data": {}}
        self._read_record()
        self._expected: dict[str, Inputs] = {}
        self._added: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self._refuse_other()  # another run may have come and gone since
            self._read_record()
            if "recipe_sha256" not in self.record or not (self.path / "recipe.yaml").is_file():
                self.write_recipe()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def write_recipe(self) -> None:
        """Put the recipe in, in the place of the one before, and its seed and hash into the record."""
        kept = self.path / "recipe.yaml"
        if not kept.is_file() or kept.read_text(encoding="utf-8") != self.recipe_text:
            write_atomic(kept, self.recipe_text.encode())
        digest = hashlib.sha256(self.recipe_text.encode()).hexdigest()
        if self.record.get("recipe_sha256") != digest:
            self.record |= {"seed": self.recipe.seed, "recipe_sha256": digest}
            self._circumstances()

    def _refuse_other(self) -> None:
        kept = self.path / "recipe.yaml"
        if kept.is_file():
            try:
                name = read(kept.read_bytes(), str(kept)).data.get("name")
            except RecipeError as error:
                raise WrongFolder(
                    f"{kept} is damaged ({error}). Nothing was changed; give another with --out"
                ) from error
            if name != self.recipe.name:
                raise WrongFolder(
                    f"{self.path} holds a run of another recipe, {name!r}, and this one is {self.recipe.name!r}. "
                    "Nothing was changed. Give another folder with --out, or delete this one."
                )
        elif self.path.exists() and not _is_empty(self.path):
            raise WrongFolder(f"{self.path} exists and is no run folder. Nothing was changed; give another with --out.")

    def is_done(self, stage: str) -> bool:
        return (self.path / stage / "done").is_file() and stage in self.record["stages"]

    def mark(self, stage: str) -> dict[str, Any]:
        """What the marker of a finished stage says; `inputs` is missing from one of an early version."""
        return json.loads((self.path / stage / "done").read_text(encoding="utf-8"))

    def expect(self, stage: str, inputs: Inputs) -> Path | None:
        """Say what the stage is going to be made from. Of a cut attempt at something else nothing is kept, but for its
        checkpoints: it is moved aside, to the folder that is returned, and taken back where it is wanted again."""
        self._expected[stage] = inputs
        key, folder = key_of(inputs), self.path / stage
        begun, moved = folder / BEGUN, None
        if begun.is_file() and begun.read_text() != key and any(folder.glob(f"{TRAINER}/*")):
            moved = self._move(stage, begun.read_text())
        old = self.old(stage, key)
        if (old / BEGUN).is_file():
            self.set_aside(stage)
            shutil.rmtree(folder, ignore_errors=True)
            lines = (old / METRICS).read_text(encoding="utf-8").splitlines()
            old.rename(folder)
            self._keep_metrics([*self._metric_lines(), *lines])
        return moved

    def key(self, stage: str) -> str | None:
        """The hash of what the stage is made from; None where nobody has said it."""
        return key_of(self._expected[stage]) if stage in self._expected else None

    def date(self, stage: str, inputs: Inputs) -> None:
        """Add to the marker of a finished stage what it was made from, as far as that is known."""
        self._mark(stage, {**self.mark(stage), "key": key_of(inputs), "inputs": inputs})

    def begin(
        self,
        stage: str,
        keep: Collection[str] = (),
        step: int = 0,
        seconds: float = 0.0,
        reuse: Collection[str] = (),
    ) -> Path:
        """The folder for the stage, empty but for the parts named in `keep`, if the attempt that left them was made
        from the same, and in `reuse`, from whatever. What else a cut attempt left is removed, also its metrics of steps
        after `step`; a finished stage is moved aside. seconds: that the attempt took up to there."""
        folder = self.path / stage
        aside = self.set_aside(stage)
        folder.mkdir(exist_ok=True)
        key, begun = self.key(stage), folder / BEGUN
        same = key is None or (begun.is_file() and begun.read_text() == key)
        kept = {*reuse, *(keep if same else ())}
        for part in folder.iterdir():
            if part.name not in kept:
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
        for part in reuse:
            if aside is not None and (aside / part).exists():
                (aside / part).rename(folder / part)
        if key is not None:
            write_atomic(begun, key.encode())
        self.record["stages"].pop(stage, None)
        self._keep_metrics([line for line in self._metric_lines() if _stands(line, stage, step)])
        self._added = {}
        self._circumstances()
        self._started = time.monotonic() - seconds
        return folder

    def finish(self, stage: str, **facts: Any) -> None:
        """Record what the stage did, then mark it as done."""
        seconds = round(time.monotonic() - self._started, 1)
        self.record["stages"][stage] = {"seconds": seconds, "git": self.record["git"], **facts}
        self._write_record()
        mark = {"finished": _now(), "seconds": seconds}
        if stage in self._expected:
            known = {"record": self.record["stages"][stage], "data": self._added}
            mark |= {"key": self.key(stage), "inputs": self._expected[stage], **known}
        self._mark(stage, mark)
        (self.path / stage / BEGUN).unlink(missing_ok=True)

    def _mark(self, stage: str, mark: dict[str, Any]) -> None:
        write_atomic(self.path / stage / "done", json.dumps(hidden(mark)).encode())

    def set_aside(self, stage: str) -> Path | None:
        """Move a finished stage to a folder named after what it was made from, with its metrics; None where there is
        none. It is no part of the run from then on."""
        if not (self.path / stage / "done").is_file():
            return None
        return self._move(stage, self._key_of_done(stage))

    def aside(self, stage: str) -> Path:
        """Where a finished stage is going to be moved."""
        return self.old(stage, self._key_of_done(stage))

    def _key_of_done(self, stage: str) -> str:
        mark = self.mark(stage)
        return mark.get("key") or key_of(mark)

    def _move(self, stage: str, key: str) -> Path:
        aside = self.old(stage, key)
        shutil.rmtree(aside, ignore_errors=True)  # which was made from the same
        lines = [line for line in self._metric_lines() if _stage_of(line) == stage]
        write_atomic(self.path / stage / METRICS, "".join(f"{line}\n" for line in lines).encode())
        (self.path / stage).rename(aside)
        self._keep_metrics([line for line in self._metric_lines() if _stage_of(line) not in (stage, None)])
        self.record["stages"].pop(stage, None)
        self._write_record()
        return aside

    def old(self, stage: str, key: str) -> Path:
        return self.path / f"{stage}.old-{key[:8]}"

    def take(self, stage: str, source: Path, metrics: Path) -> None:
        """Make the finished stage in the folder `source`, with its lines of `metrics`, the one of this run. It is
        moved, unless it belongs to another run, which keeps it."""
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        lines = [line for line in lines if _stage_of(line) == stage]
        self.set_aside(stage)
        shutil.rmtree(self.path / stage, ignore_errors=True)
        (source.rename if source.parent == self.path else _linked(source))(self.path / stage)
        (self.path / stage / METRICS).unlink(missing_ok=True)
        mark = self.mark(stage)
        self.record["stages"][stage] = mark["record"]
        self.record["data"] |= mark["data"]
        kept = [line for line in self._metric_lines() if _stage_of(line) not in (stage, None)]
        self._keep_metrics([*kept, *lines])
        self._write_record()
        os.utime(self.path / stage / "done")  # it is the latest now, for the adapter that is put forward

    def _metric_lines(self) -> list[str]:
        file = self.path / METRICS
        return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []

    def _keep_metrics(self, lines: list[str]) -> None:
        if lines != self._metric_lines():
            write_atomic(self.path / METRICS, "".join(f"{line}\n" for line in lines).encode())

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        line = json.dumps(hidden({"stage": stage, "step": step, **metrics}), default=lambda value: hide(str(value)))
        with (self.path / METRICS).open("a") as file:
            file.write(line + "\n")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._metric_lines() if _stage_of(line) == stage]

    def add_data(self, name: str, **facts: Any) -> None:
        self.record["data"][name] = self._added[name] = facts
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
        write_atomic(self.path / "run.json", json.dumps(hidden(self.record), indent=2).encode())


class Follower(RunFolder):
    """The folder of a run to a process that only trains along: it reads what the first has written, and writes nothing.

    On several machines it has to be one that all of them see.
    """

    def __init__(self, path: str | Path, recipe: Recipe) -> None:
        self.path, self.recipe = Path(path), recipe
        self.processes = processes()
        self.record: dict[str, Any] = {"stages": {}, "data": {}}

    def key(self, stage: str) -> str | None:
        return None

    def finish(self, stage: str, **facts: Any) -> None:
        pass

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        pass

    def add_data(self, name: str, **facts: Any) -> None:
        pass


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, with overrides and krontune's defaults; of a trainer the given keys. `load` reads it back,
    without the keys and passwords."""
    content = recipe.model_dump(exclude=None if recipe.sweep else {"sweep"})
    for stage, values in zip(recipe.stages, content["stages"], strict=True):
        if isinstance(stage, Sft | Rl):
            values["trainer"] = given(stage.trainer)
        for key in ("credit", "risk", "guard"):
            if isinstance(values.get(key), dict):
                values[key] = given(getattr(stage, key))
    content["stages"] = [{"stage": values["stage"], **values} for values in content["stages"]]
    if recipe.hub == Hub():  # nothing is pushed; folders of recipes that knew no such section stay valid
        del content["hub"]
    learn(content)
    return yaml_text(masked(content))


def yaml_text(content: Any) -> str:
    """As YAML that `load` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes where our reader takes it for something else: 12e4 is text to PyYAML, a number to it."""

    def represent_text(self, text: str) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain_text(text) else "'")


_Dumper.add_representer(str, _Dumper.represent_text)


def _linked(source: Path) -> Callable[[Path], Any]:
    """Copies a folder; on the same disk the files are linked, which takes no room."""

    def link(file: str, to: str) -> None:
        try:
            os.link(file, to) if Path(file).name != "done" else shutil.copy2(file, to)
        except OSError:
            shutil.copy2(file, to)

    return lambda to: shutil.copytree(source, to, copy_function=link)


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
