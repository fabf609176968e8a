"""Run a recipe: its stages in order, each once."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare import PAGE, publish
from .content import listed
from .faults import RecipeError
from .history import History
from .masking import hide
from .preflight import check
from .rl import run_rl
from .run_folder import RunError, RunFolder
from .schema import AdaptInfSelect, Recipe, Rl, Select, Sft
from .select import run_select
from .select_adapt_inf import run_adapt_inf
from .sft import run_sft
from .steps import Step, steps
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


def run(
    recipe: Recipe,
    out_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
    share: Sequence[Path] = (),
) -> Run:
    """Run the stages that are not done yet, in `out_dir` (default: runs/<name>).

    A stage that was cut goes on, or begins again where it has nothing to go on from. A finished one is skipped, unless
    something that it was made from has changed: then it runs again, and what it made before is moved aside.

    share: folders of other runs; a stage that one of them has made from the same is linked and not run.

    Raises:
        RecipeError: the recipe cannot run as it stands; nothing was started.
        RunError: the recipe is a sweep, see `run_sweep`; the folder belongs to another run; or several processes were
            started. Nothing was written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("krontune runs in one process; start it without a launcher, or with --num_processes 1")
    if recipe.sweep:
        raise RunError("the recipe has a sweep, which is many runs; run_sweep runs them")
    folder = RunFolder(out_dir or Path("runs") / recipe.name, recipe)
    todo, history = steps(recipe), History(folder)
    if any(history.changes(step) is not None for step in todo):
        faults = check(recipe)
        if faults:
            raise RecipeError(faults)
    with folder:
        history.settle()
        moved = history.leave_out(todo, say)
        for step in todo:
            changes = history.changes(step)
            if changes is None:
                say(f"{step.name}: done before, skipped")
                continue
            moved = True
            if history.take(step, share, say):
                continue
            if changes:
                kept = folder.aside(step.name).name
                say(f"{step.name}: {listed(changes)}, runs again; what it made before is kept in {kept}")
            history.expect(step, say)
            _do(recipe, step, folder)
            seconds = folder.record["stages"][step.name]["seconds"]
            say(f"{step.name}: done in {seconds:.0f} s")
        _publish_adapter(recipe, folder)
        if moved or not (folder.path / PAGE).is_file():
            publish(folder.path)
    _push(recipe, folder.path, say)
    return Run(folder.path, folder.record)


def _push(recipe: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Where the recipe says so. What the run found stays found where the Hub does not take it."""
    if recipe.hub.repo is None and recipe.hub.dataset is None:
        return
    from .hub import push

    try:
        push(path, say=say)
    except (RunError, ValueError, OSError) as error:
        say(hide(str(error)))


def _do(recipe: Recipe, step: Step, folder: RunFolder) -> None:
    if isinstance(step.stage, AdaptInfSelect):
        run_adapt_inf(recipe, step.stage, folder)
    elif isinstance(step.stage, Select):
        run_select(recipe, step.stage, folder)
    elif isinstance(step.stage, Sft):
        run_sft(recipe, step.stage, folder, step.control)
    elif isinstance(step.stage, Rl):
        run_rl(recipe, step.stage, folder, step.control)
    else:
        run_verify(recipe, step.stage, folder, list(step.needs))


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
