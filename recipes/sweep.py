"""`sweep:` one recipe with several values of some keys, each combination a run of its own."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .chain import Run, run
from .compare import compare
from .errors import explain
from .faults import Fault, RecipeError
from .loader import point
from .preflight import check
from .processes import processes
from .run_folder import RunError, WrongFolder
from .schema import Recipe

PAGE = "sweep.html"


def points(recipe: Recipe) -> dict[str, Recipe]:
    """Each combination of the values under `sweep`, by a short name, in the order of the product.

    Raises:
        RecipeError: a combination is no recipe; the faults of all are told.
    """
    found, faults = {}, []
    if recipe.sweep and (recipe.hub.repo or recipe.hub.dataset):
        where = recipe.where(("hub", "repo" if recipe.hub.repo else "dataset"))
        message = (
            "the runs of a sweep would share it; leave it out, and push the run you want: krontune push RUN --repo"
        )
        raise RecipeError([Fault(where, message)])
    for values in itertools.product(*recipe.sweep.values()):
        given = dict(zip(recipe.sweep, values, strict=True))
        try:
            name = point_name(given)
            if name in found:
                raise RecipeError(
                    [
                        Fault(
                            recipe.where(("sweep",)),
                            f"two combinations are called {name}: give each value once, and files names of their own",
                        )
                    ]
                )
            found[name] = point(recipe, given)
        except RecipeError as error:
            faults += error.faults
    if faults:
        raise RecipeError(faults)
    return found


def point_name(given: dict[str, Any]) -> str:
    """`learning_rate=0.0001,r=8`: the last word of each path where that tells them apart, else all of it."""
    last = [path.rpartition(".")[2] for path in given]
    words = last if len(set(last)) == len(last) else list(given)
    text = ",".join(f"{word}={_short(value)}" for word, value in zip(words, given.values(), strict=True))
    return re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def run_sweep(recipe: Recipe, out_dir: str | Path | None = None, say: Callable[[str], None] = print) -> list[Run]:
    """Run each point in `out_dir`/<point> (default: runs/<name>), and print one table of all.

    A stage that two points have in common, made from the same, is run once and linked. A point that fails is told at
    the end and does not stop the others; run again, and the sweep goes on.

    Raises:
        RecipeError: a point cannot run as it stands; nothing was started.
        WrongFolder: the folder holds a single run.
        RunError: points failed; the others are finished. Or a launcher has started several processes.
    """
    if processes().count > 1:
        raise RunError(
            "a sweep runs its points in one process; to run them in several, launch them one by one, with the values "
            "as overrides and without sweep"
        )
    folder = Path(out_dir or Path("runs") / recipe.name)
    if (folder / "recipe.yaml").is_file():
        raise WrongFolder(f"{folder} holds a single run. Nothing was changed. Give another folder with --out.")
    todo = points(recipe)
    faults = [fault for one in todo.values() for fault in check(one)]
    if faults:
        raise RecipeError(faults)
    done: list[Run] = []
    failed: dict[str, str] = {}
    for name, one in todo.items():
        say(f"{name}:")
        try:
            done.append(run(one, folder / name, say, share=[folder / other for other in todo if other != name]))
        except Exception as error:  # whatever it is, the other points can still be run
            failed[name] = explain(error)[0]
            say(f"{name}: failed: {failed[name]}")
    if done:
        compare([one.path for one in done], folder / PAGE)
    if failed:
        told = "\n".join(f"{name}: {why}" for name, why in failed.items())
        raise RunError(f"{len(failed)} of {len(todo)} points of the sweep failed; run again to go on.\n{told}")
    return done
