"""Tasks whose answers carry a certificate that can be checked."""

import inspect
from importlib import import_module
from typing import Any

from ..errors import RlError
from .activity import Activity
from .activity_weighted import WeightedActivity
from .base import CertificateTask, Check, Instance, Mark, Parsed, Solution
from .countdown import Countdown
from .knapsack import Knapsack
from .lis import Lis
from .options import unknown

__all__ = [
    "TASKS",
    "Activity",
    "CertificateTask",
    "Check",
    "Countdown",
    "Instance",
    "Knapsack",
    "Lis",
    "Mark",
    "Parsed",
    "Solution",
    "WeightedActivity",
    "get_task",
]

TASKS: dict[str, type[CertificateTask]] = {
    task.name: task for task in (Activity, WeightedActivity, Countdown, Knapsack, Lis)
}


def get_task(name: str, **options: Any) -> CertificateTask:
    """The task called `name`, made with its `options` (for "lis": `values`, `unique`, `paper_compat`).

    name: one of `TASKS`, or "package.module:Class" for a CertificateTask of your own, which imports that
    module and so runs its code. Raises RlError for an unknown name or option, with the allowed ones and the
    nearest guess, and for a path that leads to no task.
    """
    kind = None
    if isinstance(name, str):
        kind = _imported(name) if ":" in name else TASKS.get(name)
    if kind is None:
        raise unknown("task", name, TASKS)
    if inspect.isabstract(kind):
        raise RlError(f"task {name!r} lacks methods that a task has: {', '.join(sorted(kind.__abstractmethods__))}")
    allowed = list(inspect.signature(kind).parameters)
    for option in options:
        if option not in allowed:
            raise RlError(f"task {name!r}: {unknown('option', option, allowed)}")
    return kind(**options)


def _imported(path: str) -> type[CertificateTask]:
    module, _, name = path.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RlError(f"no task at {path!r} ({error}): write package.module:Class, importable from here") from error
    if not (isinstance(kind, type) and issubclass(kind, CertificateTask)):
        raise RlError(f"{path!r} is no subclass of krontune.rl.tasks.CertificateTask")
    return kind
