"""Code of the user's own, which a recipe names by dotted path: `package.module:name`."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..rl import RlError

# The context of a validation after which the caller asks `not_allowed` itself, to name the places in a file.
ALLOW_LATER = {"allow": "later"}


def is_own(name: str) -> bool:
    """Whether it is a dotted path, and none of the names that come with krontune."""
    return ":" in name


def not_allowed(recipe: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Code from outside krontune that a recipe names and does not say it may run: where in the recipe, and what."""
    base = recipe.base
    if base.trust_remote_code and base.model not in recipe.allow:
        yield (
            ("base", "trust_remote_code"),
            f"true runs the Python code that {base.model!r} brings along, which a recipe does only where it says so; "
            f"if you trust it, add at the top level: allow: [{base.model!r}]",
        )
    for number, stage in enumerate(recipe.stages):
        named = {}
        if stage.stage in ("rl", "verify") and stage.task is not None:
            named["task", "name"] = stage.task.name
        if stage.stage == "rl":
            named["reward",] = stage.reward
        for path, name in named.items():
            if is_own(name) and name not in recipe.allow:
                yield (
                    ("stages", number, *path),
                    f"{name!r} is code outside krontune, which a recipe runs only where it says so; if you trust it, "
                    f"add at the top level: allow: [{name!r}]",
                )


def import_own(path: str) -> Any:
    """The object at a dotted path. Modules are looked for where Python does, and last in the working folder.

    This runs the module: a recipe may name it only where its `allow` lists the path, see `not_allowed`.

    Raises:
        RlError: there is no such module or name, or the module cannot be imported; the message says why.
    """
    module, _, name = path.partition(":")
    _look_here_too()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise RlError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise RlError(f"module {module!r} ({source_of(path) or 'built in'}) has no {name!r}")
    return getattr(found, name)


def source_of(path: str) -> Path | None:
    """The file of the module at a dotted path, found without running any code; None where it cannot be found so."""
    top, *below = path.partition(":")[0].split(".")
    _look_here_too()
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None or not below:
        return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None
    for folder in found.submodule_search_locations or ():
        for file in (Path(folder, *below).with_suffix(".py"), Path(folder, *below, "__init__.py")):
            if file.is_file():
                return file
    return None


def _look_here_too() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the console script does not have it, and workers take this path over
    importlib.invalidate_caches()
