"""Tasks whose answers carry a certificate that can be checked."""

import inspect
from difflib import get_close_matches
from typing import Any

from ..errors import RlError
from .base import CertificateTask, Check, Instance, Mark, Parsed, Solution
from .lis import Lis

__all__ = ["TASKS", "CertificateTask", "Check", "Instance", "Lis", "Mark", "Parsed", "Solution", "get_task"]

TASKS: dict[str, type[CertificateTask]] = {"lis": Lis}


def get_task(name: str, **options: Any) -> CertificateTask:
    """The task called `name`, made with its `options` (for "lis": `values`, `unique`).

    Raises RlError for an unknown name or option, with the allowed ones and the nearest guess.
    """
    if name not in TASKS:
        raise RlError(f"unknown task {name!r}{_guess(name, list(TASKS))}; tasks: {', '.join(TASKS)}")
    allowed = list(inspect.signature(TASKS[name]).parameters)
    for option in options:
        if option not in allowed:
            raise RlError(
                f"task {name!r} has no option {option!r}{_guess(option, allowed)}; options: {', '.join(allowed)}"
            )
    return TASKS[name](**options)


def _guess(word: object, allowed: list[str]) -> str:
    near = get_close_matches(str(word), allowed, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
