"""How good completions are, by the task's own check: pure scoring, with no model in it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from .errors import RlError
from .statistics import paired_difference, wilson_interval
from .tasks.base import CertificateTask, Instance, Mark


@dataclass(frozen=True)
class Rate:
    """A share, or a difference of two shares, with its 95 % interval (low, high) over n completions."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """Completions of a task, scored.

    n: completions. answer: the stated count is the optimum. certificate: both blocks were read and the ids
    are a feasible certificate of optimal value. parse_failure: a block is missing, malformed, repeated ids or
    blocks that disagree. These carry Wilson intervals. gap: answer - certificate on the same completions, the
    share of right counts that nothing backs (less the rare certificate under a wrong count), with a paired
    bootstrap interval.
    """

    n: int
    answer: Rate
    certificate: Rate
    parse_failure: Rate
    gap: Rate

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and numbers, for JSON."""
        return asdict(self)


def score(task: CertificateTask, instances: Sequence[Instance | str], completions: Sequence[Any]) -> Evaluation:
    """Scores one completion for each instance.

    instances: Instance objects, or the strings of the data set's `instance` column. completions: texts, or
    lists of chat messages. Repeat an instance to score several samples of it; the intervals then treat
    samples as independent, which makes them too narrow. Raises RlError where the two differ in length or are
    empty.
    """
    return summarise(mark_all(task, instances, completions))


def heuristic_table(task: CertificateTask, instances: Sequence[Instance | str]) -> dict[str, Evaluation]:
    """What each known heuristic of the task would score: the floors that a trained model has to clear.

    A heuristic's ids are written as a completion, with their number as the answer, and scored like any other.
    """
    read = [read_instance(task, instance) for instance in instances]
    return {
        name: score(task, read, [task.write(instance, rule(instance)) for instance in read])
        for name, rule in task.heuristics.items()
    }


def mark_all(task: CertificateTask, instances: Sequence[Instance | str], completions: Sequence[Any]) -> list[Mark]:
    """Marks one completion for each instance. Raises RlError for lengths that differ."""
    return list(mark_each(task, instances, completions))


def mark_each(task: CertificateTask, instances: Sequence[Instance | str], completions: Sequence[Any]) -> Iterator[Mark]:
    """`mark_all` one at a time: a tenth faster where marks are not kept, as the garbage collector has nothing to do."""
    if len(instances) != len(completions):
        raise RlError(
            f"one completion an instance is needed, got {len(completions)} completions for {len(instances)} instances"
        )
    for instance, completion in zip(instances, completions, strict=True):
        yield task.mark(read_instance(task, instance), completion_text(completion))


def summarise(marks: Sequence[Mark]) -> Evaluation:
    """The rates and the gap of marked completions. Raises RlError for none."""
    if not marks:
        raise RlError("nothing to score: give at least one completion")
    answer = [mark.answer_right for mark in marks]
    certificate = [mark.certificate_right for mark in marks]
    return Evaluation(
        n=len(marks),
        answer=_rate(answer),
        certificate=_rate(certificate),
        parse_failure=_rate([not mark.parsed.ok for mark in marks]),
        gap=Rate(*paired_difference(answer, certificate), len(marks)),
    )


def read_instance(task: CertificateTask, instance: Instance | str) -> Instance:
    """An Instance as it is; a string through `task.instance_from_json`, once while it is remembered.

    Raises RlError for anything else."""
    if isinstance(instance, Instance):
        return instance
    return _read(task, instance) if isinstance(instance, str) else task.instance_from_json(instance)


@lru_cache(maxsize=8192)
def _read(task: CertificateTask, text: str) -> Instance:
    """A group's completions share one Instance, and with it the solution that it remembers."""
    return task.instance_from_json(text)


def completion_text(completion: Any) -> str:
    """The text of a completion: a string, or the last assistant message of a list of chat messages.

    Content in parts gives its text parts joined; a completion without text (None, a bare tool call) gives "". Raises
    RlError for what is no completion.
    """
    if isinstance(completion, str):
        return completion
    try:
        said = [message for message in completion or () if message.get("role", "assistant") == "assistant"]
        content = said[-1].get("content") if said else None
        return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())
    except (AttributeError, TypeError):
        raise RlError(f"a completion is text or a list of chat messages, got {completion!r:.80}") from None


def _rate(flags: Sequence[bool]) -> Rate:
    right, n = sum(flags), len(flags)
    return Rate(right / n, *wilson_interval(right, n), n)
