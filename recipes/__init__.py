"""What is run: one file from raw data to a checked, adapted model.

    from krontune import recipes
    run = recipes.run(recipes.load("quickstart"), "runs/quickstart")

Names are imported when first used: a recipe's trainer sections need TRL, which takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chain import Run, run
    from .faults import Fault, RecipeError
    from .hub import push
    from .loader import load
    from .needs import notes
    from .preflight import check
    from .run_folder import RunError
    from .schema import Recipe
    from .sweep import run_sweep

__all__ = ["Fault", "Recipe", "RecipeError", "Run", "RunError", "check", "load", "notes", "push", "run", "run_sweep"]

_HOME = {
    "Fault": ".faults",
    "Recipe": ".schema",
    "RecipeError": ".faults",
    "Run": ".chain",
    "RunError": ".run_folder",
    "check": ".preflight",
    "load": ".loader",
    "notes": ".needs",
    "push": ".hub",
    "run": ".chain",
    "run_sweep": ".sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
