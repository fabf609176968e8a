"""Code of the user's own, which a recipe names by dotted path: `package.module:name`."""

import importlib
import os
import sys
from typing import Any

from ..rl import RlError


def is_own(name: str) -> bool:
    """Whether it is a dotted path, and none of the names that come with krontune."""
    return ":" in name


def import_own(path: str) -> Any:
    """The object at a dotted path. Modules are looked for where Python does, and last in the working folder.

    This runs the module: a recipe may name it only where its `allow` lists the path, which `load` sees to.

    Raises:
        RlError: there is no such module or name, or the module cannot be imported; the message says why.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the console script does not have it, and workers take this path over
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise RlError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(found, name):
        raise RlError(f"module {module!r} ({found.__file__}) has no {name!r}")
    return getattr(found, name)
