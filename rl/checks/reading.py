"""What the checks share: reading answers of several forms, and rates over samples of the same instance."""

import asyncio
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RlError
from ..evaluation import completion_text, read_instance
from ..statistics import clustered_mean
from ..tasks.base import CertificateTask, Instance, Mark
from ..tasks.parsing import Parsed
from .result import CheckResult

_OPENER = re.compile(r"\\[A-Za-z]+\{")

Policy = Callable[[list[Instance]], Sequence[Any]]
"""Instances to answers: a sampler of completions, or one of `scripted_policies`."""


def read(task: CertificateTask, instances: Sequence[Any], answers: Sequence[Any]) -> tuple[list[Instance], list[Mark]]:
    """Instances and the marks of their answers, one answer each.

    An answer is a completion (text or chat messages), a sequence of row ids, or None for no answer. An
    instance is an Instance or the string of a data set's `instance` column; repeat it for several samples.
    Raises RlError for lengths that differ and for nothing to read.
    """
    if len(instances) != len(answers):
        raise RlError(f"one answer an instance is needed, got {len(answers)} answers for {len(instances)} instances")
    if not len(instances):
        raise RlError("nothing to check: give at least one instance")
    known: dict[str, Instance] = {}
    found = []
    for instance in instances:
        if isinstance(instance, str):
            if instance not in known:
                known[instance] = read_instance(task, instance)
            instance = known[instance]
        found.append(instance)
    return found, [mark(task, instance, answer) for instance, answer in zip(found, answers, strict=True)]


def mark(task: CertificateTask, instance: Instance, answer: Any) -> Mark:
    """The mark of one answer in any of the forms of `read`."""
    empty = task.mark(instance, "")
    if answer is None:
        return replace(empty, parsed=Parsed(None, None, "no answer"))
    if not isinstance(answer, str) and all(isinstance(item, int) for item in answer):
        ids = tuple(answer)
        check = task.check(instance, ids)
        return replace(empty, parsed=Parsed(ids, check.value if check.feasible else len(ids)), check=check)
    return task.mark(instance, completion_text(answer))


def awaited(paid: Any) -> Any:
    """What a reward function gave, which is a coroutine where it is asynchronous."""
    return asyncio.run(paid) if inspect.iscoroutine(paid) else paid


def states_rows(task: CertificateTask, instance: Instance) -> bool:
    """Whether a certificate of this task is a list of row ids (and not, say, an expression)."""
    return "\\ids{" in task.completion(instance)


def block_openers(task: CertificateTask, instance: Instance) -> list[str]:
    r"""The openers of the blocks in which a worked solution states its answer, in order: `\ids{`, `\answer{`."""
    return _OPENER.findall(task.completion(instance))


def unordered(ids: Sequence[int]) -> tuple[int, ...]:
    """What two certificates are compared by: order never matters."""
    return tuple(sorted(ids))


def stated(mark: Mark) -> tuple[int, ...] | None:
    """The ids of a mark as they are compared; None where none were read."""
    return None if mark.parsed.ids is None else unordered(mark.parsed.ids)


def clusters(task: CertificateTask, instances: Sequence[Instance]) -> list[int]:
    """The same number for the same instance, from 0, in order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(task.key(instance), len(numbers)) for instance in instances]


def rate(flags: Sequence[Any], groups: Sequence[int], lowest: float = 0.0) -> dict[str, Any]:
    """{"value", "ci", "n"}: the mean with an interval over groups (samples of one instance go together).

    lowest: the least that a flag could be; -1 for differences.
    """
    value, low, high, n = clustered_mean([float(flag) for flag in flags], groups, lowest=lowest)
    return {"value": value, "ci": (low, high), "n": n}


def result(name: str, measured: dict[str, Any], threshold: float, verdict: str, details: dict[str, Any]) -> CheckResult:
    """A CheckResult from a `rate`."""
    return CheckResult(name, measured["value"], measured["ci"], measured["n"], threshold, verdict, details)
