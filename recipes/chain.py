"""Run a recipe: its stages in order, each once."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data_selection import DataSelectionError
from .card import CARD
from .compare import PAGE, publish
from .content import listed
from .dedup import run_dedup
from .errors import explain
from .faults import RecipeError
from .history import History
from .lifelong import is_sequence
from .masking import hide
from .names import TRAINED, parts
from .precision import recipe_plan
from .preflight import check
from .processes import processes
from .rl import run_rl
from .run_folder import Follower, RunError, RunFolder
from .schema import Recipe, Rl, Sft
from .schema_rows import AdaptInfSelect, Dedup, Select
from .select import run_select
from .select_adapt_inf import run_adapt_inf
from .sft import run_sft
from .steps import Step, steps
from .trainer_args import given
from .training import ADAPTER
from .verify import run_verify

COLLECTIVE_TIMEOUT_S = 1800.0  # transformers' default


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
        RunError: the recipe is a sweep, see `run_sweep`, or the folder belongs to another run; nothing was written.
        AnotherProcessFailed: of those that a launcher has started, see `krontune.recipes.processes`.

    Where a launcher has started several processes, all call it with the same. The first reads and writes the folder,
    decides what is to be done and does what is no training; the others train along.
    """
    if recipe.sweep:
        raise RunError("the recipe has a sweep, which is many runs; run_sweep runs them")
    path, others = Path(out_dir or Path("runs") / recipe.name), processes()
    try:
        others.join(_collective_timeout(recipe))
        if others.first:
            record = _lead(recipe, path, say, share)
        else:
            record = _follow(recipe, Follower(path, recipe))
        others.collect(None)  # the first leaves last
        return Run(path, record)
    except BaseException as error:
        others.fail(2 if isinstance(error, Exception) and explain(error)[1] else 1)
        raise


def _lead(recipe: Recipe, path: Path, say: Callable[[str], None], share: Sequence[Path]) -> dict[str, Any]:
    folder = RunFolder(path, recipe)
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
            if folder.processes.count > 1 and _takes_one_process(recipe, step):
                raise RunError(
                    f"{step.name}: adapt_inf scores and warms up in one process; run the recipe without a launcher "
                    "until this stage is done, then go on with one"
                )
            history.expect(step, say)
            if folder.processes.count > 1 and not isinstance(step.stage, Select | Dedup):
                recipe_plan(recipe.base, path)  # which the others then read
            if isinstance(step.stage, Sft | Rl):
                folder.processes.agree(lambda name=step.name: name)
            _do(recipe, step, folder)
            seconds = folder.record["stages"][step.name]["seconds"]
            say(f"{step.name}: done in {seconds:.0f} s")
        _publish_adapter(recipe, folder)
        if moved or not (folder.path / PAGE).is_file():
            publish(folder.path)
        folder.processes.agree(lambda: None)
        record = folder.processes.agree(lambda: folder.record)
    _push(recipe, path, say)
    return record


def _push(recipe: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Where the recipe says so. What the run found stays found where the Hub does not take it."""
    if recipe.hub.repo is None and recipe.hub.dataset is None:
        return
    from .hub import push

    try:
        push(path, say=say)
    except (RunError, ValueError, OSError) as error:
        say(hide(str(error)))


def _follow(recipe: Recipe, folder: Follower) -> dict[str, Any]:
    """Train what the first process trains, until it has no more."""
    named = {step.name: step for step in steps(recipe)}
    while (name := folder.processes.agree(_asked_of_the_first)) is not None:
        _do(recipe, named[name], folder)
    return folder.processes.agree(_asked_of_the_first)


def _asked_of_the_first() -> Any:
    raise AssertionError("only the first process decides")


def _collective_timeout(recipe: Recipe) -> float:
    """The longest that the recipe gives to a collective; the group of processes is made once for all stages."""
    stated = [given(stage.trainer).get("ddp_timeout", 0) for stage in recipe.stages if isinstance(stage, Sft | Rl)]
    return max(stated, default=0) or COLLECTIVE_TIMEOUT_S


def _takes_one_process(recipe: Recipe, step: Step) -> bool:
    return isinstance(step.stage, AdaptInfSelect) or isinstance(step.stage, Sft) and is_sequence(recipe, step.stage)


def _do(recipe: Recipe, step: Step, folder: RunFolder) -> None:
    try:
        _do_step(recipe, step, folder)
    except DataSelectionError as error:  # which does not know whose rows it speaks of
        raise DataSelectionError(f"{step.name}: {error}") from error


def _do_step(recipe: Recipe, step: Step, folder: RunFolder) -> None:
    if isinstance(step.stage, Dedup):
        run_dedup(recipe, step, folder)
    elif isinstance(step.stage, AdaptInfSelect):
        run_adapt_inf(recipe, step, folder)
    elif isinstance(step.stage, Select):
        run_select(recipe, step, folder)
    elif isinstance(step.stage, Sft):
        run_sft(recipe, step, folder)
    elif isinstance(step.stage, Rl):
        run_rl(recipe, step, folder)
    else:
        run_verify(recipe, step, folder)


def _publish_adapter(recipe: Recipe, folder: RunFolder) -> None:
    """Copy the last trained adapter to where users look for it, unless it is there; where nothing is trained, remove
    what an earlier recipe put there."""
    public, beside = folder.path / ADAPTER, folder.path / f".{ADAPTER}"
    trained = [name for name in recipe.names if parts(name).kind in TRAINED]
    source = folder.path / trained[-1] / ADAPTER if trained else None
    if source is not None and _files_of(public) == _files_of(source):
        return
    shutil.rmtree(public, ignore_errors=True)
    if source is not None:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        beside.rename(public)


def _files_of(adapter: Path) -> dict[str, str]:
    """The digest of each file but the card, which is written anew where the adapter is published."""
    found = (path for path in adapter.glob("*") if path.is_file() and path.name != CARD)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
