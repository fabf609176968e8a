"""Run a recipe: its stages in order, each once."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare import PAGE, publish
from .faults import RecipeError
from .preflight import check
from .rl import run_rl
from .run_folder import RunError, RunFolder
from .schema import AdaptInfSelect, Recipe, Rl, Select, Sft
from .select import run_select
from .select_adapt_inf import run_adapt_inf
from .sft import run_sft
from .training import ADAPTER
from .verify import run_verify


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and `run.json` as a dict."""

    path: Path
    record: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The trained adapter, as `peft` reads it."""
        return self.path / ADAPTER


def run(recipe: Recipe, out_dir: str | Path | None = None, say: Callable[[str], None] = print) -> Run:
    """Run the stages that are not done yet, in `out_dir` (default: runs/<name>).

    A stage that was cut begins again; a finished one is skipped.

    Raises:
        RecipeError: the recipe cannot run as it stands; nothing was started.
        RunError: the folder belongs to another run, or several processes were started; nothing was written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("krontune runs in one process; start it without a launcher, or with --num_processes 1")
    folder = RunFolder(out_dir or Path("runs") / recipe.name, recipe)
    steps = list(_steps(recipe, folder))
    if not all(folder.is_done(name) for name, _ in steps):
        faults = check(recipe)
        if faults:
            raise RecipeError(faults)
    with folder:
        ran = False
        for name, step in steps:
            if folder.is_done(name) and not ran:  # what stands on a stage that ran anew is run anew too
                say(f"{name}: done before, skipped")
                continue
            ran = True
            step()
            seconds = folder.record["stages"][name]["seconds"]
            say(f"{name}: done in {seconds:.0f} s")
        _publish_adapter(recipe, folder)
        if ran or not (folder.path / PAGE).is_file():
            publish(folder.path)
        return Run(folder.path, folder.record)


def _steps(recipe: Recipe, folder: RunFolder) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each piece of work that is done or not: a stage, or a control of one."""
    adapters: list[str] = []
    for stage in recipe.stages:
        if isinstance(stage, AdaptInfSelect):
            yield "select", lambda s=stage: run_adapt_inf(recipe, s, folder)
        elif isinstance(stage, Select):
            yield "select", lambda s=stage: run_select(recipe, s, folder)
        elif isinstance(stage, Sft):
            for control in [None, *stage.controls]:
                name = f"sft-{control}" if control else "sft"
                yield name, lambda s=stage, c=control: run_sft(recipe, s, folder, c)
                adapters.append(name)
        elif isinstance(stage, Rl):
            for control in [None, *stage.controls]:
                name = f"rl-{control}" if control else "rl"
                yield name, lambda s=stage, c=control: run_rl(recipe, s, folder, c)
                adapters.append(name)
        else:
            yield "verify", lambda s=stage, a=tuple(adapters): run_verify(recipe, s, folder, list(a))


def _publish_adapter(recipe: Recipe, folder: RunFolder) -> None:
    """Copy the last trained adapter to where users look for it."""
    trained = [stage.stage for stage in recipe.stages if stage.stage in ("sft", "rl")]
    if not trained:
        return
    source = folder.path / trained[-1]
    if (folder.path / ADAPTER).is_dir():
        if (folder.path / ADAPTER).stat().st_mtime >= (source / "done").stat().st_mtime:
            return
        shutil.rmtree(folder.path / ADAPTER)
    beside = folder.path / f".{ADAPTER}"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source / ADAPTER, beside)
    os.utime(beside)  # copytree keeps the times of its source
    beside.rename(folder.path / ADAPTER)
