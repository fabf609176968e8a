"""Any error as one message for the person at the terminal."""

import errno
import os

from .faults import RecipeError
from .processes import AnotherProcessFailed, processes

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def explain(error: Exception) -> tuple[str, bool]:
    """The message, and whether the recipe (or the folder it is to run in) is what is wrong."""
    if isinstance(error, RecipeError):
        return str(error), True
    if isinstance(error, AnotherProcessFailed):
        return str(error), False
    # Whatever else is raised comes from what the imports below have loaded already.
    from ..adapters import AdapterError, BaseModelError
    from ..data_selection import DataSelectionError
    from ..rl import RlError
    from .run_folder import RunError, WrongFolder

    if isinstance(error, WrongFolder):
        return str(error), True
    if isinstance(error, AdapterError | BaseModelError | DataSelectionError | RlError | RunError):
        return str(error), False
    text = str(error).strip().splitlines()
    # Libraries that write from compiled code raise errors of their own, which only quote the system's.
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"no space left on the device{where}; free some and run the same command to go on", False
    if processes().count > 1 and any(words in str(error) for words in PEER_GONE):
        return (
            "another process of the run ended without a word; it may have been killed because memory ran out. "
            "Finished stages are kept, and training goes on from its last checkpoint: run the same command again."
        ), False
    reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
    kept = "Finished stages are kept. Run again with --traceback to see where it happened."
    return f"the run failed: {reason}\n{kept}", False
