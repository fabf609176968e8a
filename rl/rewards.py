"""Rewards from a task's own check, in the form that TRL's trainers call."""

from collections.abc import Callable, Sequence
from typing import Any

from .errors import RlError
from .evaluation import mark_all
from .tasks import get_task
from .tasks.base import CertificateTask, Mark

SHAPED_POWER = 5


class CertificateReward:
    r"""A reward function for TRL (GRPOTrainer and its asynchronous kin) from a certificate task.

    task: a task, or its name. The data set needs the task's `instance` column (`task.dataset` makes it). With
    a* the optimum, s* the certificate of the task's own solver and L its length; â the number in `\answer{}`
    and ŝ the list in `\ids{}`, in the order stated:

    - "certificate": 1[ŝ feasible and value(ŝ) = a*]. Any optimal certificate counts, in any order.
    - "answer":      1[â = a*]; it looks at nothing else, so a right guess pays (r_ans of the paper).
    - "ids_exact":   1[ŝ = s*], order included (r_ids,exa).
    - "ids_prefix":  max(0, m / L - 0.1 * 1[ŝ empty or |ŝ| != L]), m the length of the longest common prefix
      of ŝ and s* (r_ids,pre). It pays 0.9 for s* followed by anything.
    - "shaped":      1[ŝ feasible] * (value(ŝ) / a*) ** 5.

    Sources: arXiv 2510.27044, section 2 (answer, ids_exact, ids_prefix); arXiv 2511.07317, RLVE (shaped,
    power 5; RLVE gives -1 and -0.5 to unreadable and infeasible answers, here both are 0 so that every reward
    stays in [0, 1]). Departure: all kinds but "answer" pay 0 where either block cannot be read, see
    `krontune.rl.tasks.parsing`. ids_exact and ids_prefix mean what the paper means only where optima are
    unique.

    A call returns one float for each completion and never raises on what a completion says. Where TRL gives
    `log_metric`, it logs `<task>/answer_accuracy`, `<task>/certificate_accuracy`, `<task>/gap` (their
    difference) and `<task>/parse_failure`, once per completion, since TRL averages over calls. Where it gives
    `log_extra`, the completions table gets a column `verdict`. Picklable; named `<task>_<kind>`.

    Raises RlError for an unknown task or kind, and when called without the `instance` column.
    """

    def __init__(self, task: CertificateTask | str, kind: str = "certificate"):
        if kind not in KINDS:
            raise RlError(f"unknown reward kind {kind!r}; kinds: {', '.join(KINDS)}")
        self.task = get_task(task) if isinstance(task, str) else task
        self.kind = kind
        self.__name__ = f"{self.task.name}_{kind}"

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        instance: Sequence[Any] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward per completion, in [0, 1]. `prompts` and further columns are not read."""
        if completions is None:
            raise RlError("a reward needs completions")
        if instance is None:
            raise RlError(
                f"reward {self.__name__!r} needs the data set's column 'instance': make the data set with "
                "task.dataset(...), or keep that column"
            )
        marks = mark_all(self.task, instance, completions)
        if log_extra is not None:
            log_extra("verdict", [mark.verdict for mark in marks])
        if log_metric is not None:
            for mark in marks:
                self._log(mark, log_metric)
        return [KINDS[self.kind](mark) for mark in marks]

    def _log(self, mark: Mark, log_metric: Callable[[str, float], None]) -> None:
        answer, certificate = float(mark.answer_right), float(mark.certificate_right)
        log_metric(f"{self.task.name}/answer_accuracy", answer)
        log_metric(f"{self.task.name}/certificate_accuracy", certificate)
        log_metric(f"{self.task.name}/gap", answer - certificate)
        log_metric(f"{self.task.name}/parse_failure", float(not mark.parsed.ok))


def certificate(mark: Mark) -> float:
    """1[feasible and value = optimum]."""
    return float(mark.certificate_right)


def answer(mark: Mark) -> float:
    """1[stated count = optimum]."""
    return float(mark.answer_right)


def ids_exact(mark: Mark) -> float:
    """1[ids = the solver's certificate, in its order]."""
    return float(mark.parsed.ok and mark.parsed.ids == mark.solution.certificate)


def ids_prefix(mark: Mark) -> float:
    """max(0, common prefix / L - 0.1 * 1[no ids, or another number of them than L])."""
    if not mark.parsed.ok or mark.parsed.ids is None:
        return 0.0
    stated, gold = mark.parsed.ids, mark.solution.certificate
    common = 0
    while common < min(len(stated), len(gold)) and stated[common] == gold[common]:
        common += 1
    return max(0.0, common / len(gold) - 0.1 * (len(stated) != len(gold)))


def shaped(mark: Mark) -> float:
    """1[feasible] * (value / optimum) ** 5."""
    if not mark.parsed.ok or mark.check is None or not mark.check.feasible:
        return 0.0
    return (mark.check.value / mark.solution.value) ** SHAPED_POWER


KINDS: dict[str, Callable[[Mark], float]] = {
    "certificate": certificate,
    "answer": answer,
    "ids_exact": ids_exact,
    "ids_prefix": ids_prefix,
    "shaped": shaped,
}
