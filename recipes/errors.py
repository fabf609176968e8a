"""Any error as one message for the person at the terminal."""

import errno

from ..adapters import AdapterError, BaseModelError
from ..data_selection import DataSelectionError
from ..rl import RlError
from .faults import RecipeError
from .run_folder import RunError, WrongFolder

SPOKEN = (AdapterError, BaseModelError, DataSelectionError, RlError, RunError)


def explain(error: Exception) -> tuple[str, bool]:
    """The message, and whether the recipe (or the folder it is to run in) is what is wrong."""
    if isinstance(error, RecipeError | WrongFolder):
        return str(error), True
    if isinstance(error, SPOKEN):
        return str(error), False
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device ({error.filename}); free some and run the same command to go on", False
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
    return f"the run failed: {reason}\nFinished stages are kept. Run again with --traceback to see where it happened.", False
