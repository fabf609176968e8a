"""Rewards in the form that TRL's trainers call: from a task's own check, and from math-verify for other data."""

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from numbers import Real
from typing import Any
from zlib import crc32

from .errors import RlError
from .evaluation import completion_text, mark_each
from .guard import Guarded
from .tasks import get_task
from .tasks.base import CertificateTask, Mark
from .tasks.options import unknown
from .tasks.preface import stated_order
from .tasks.splits import whole

__all__ = ["KINDS", "PARTS", "BoxedFormat", "CertificateReward", "Guarded", "MathReward", "RandomReward"]

SHAPED_POWER = 5
FIRST, THEN, SWITCH_AT = "sorted_preface", "answer", 20  # of a curriculum


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
    - "shaped":      1[ŝ feasible] * (value(ŝ) / a*) ** 5; the inverse ratio where fewer is better.
    - "sorted_preface": 1[the text says it sorted all ids and they stand in the task's order], see
      `tasks.preface` (r_sort). Alone it teaches to write the sorted list as the answer.
    - "mixture":     the mean of the kinds in `weights`, weighted; by default answer, ids_exact and, in a task
      that sorts, sorted_preface, equally. {"answer": 0.9, "format": 0.1} is r_ans+fmt of the paper.
    - "curriculum":  the kind `first` (sorted_preface) for the first `switch_at` (20) optimiser steps, then the
      kind `then` (answer). Needs TRL's `trainer_state`, which the asynchronous trainers do not give.

    Controls, which say how much of a gain the training itself makes, without any teaching:

    - "format":      1[both blocks can be read].
    - "random":      1 with probability 1/2, whatever the text; drawn from a stream of `seed` that goes on from
      call to call, so equal texts get different rewards. It reads nothing, so it needs no `Guarded`, whose
      children would each begin that stream anew.
    - "wrong_label": 1[â = a* + 1 or a* - 1], one of the two fixed for each instance.

    Sources: arXiv 2510.27044, section 2 (answer, ids_exact, ids_prefix, sorted_preface, mixture, curriculum);
    arXiv 2511.07317, RLVE (shaped, power 5; RLVE gives -1 and -0.5 to unreadable and infeasible answers, here
    both are 0 so that every reward stays in [0, 1]); arXiv 2506.10947 (controls). Departure: "certificate",
    the ids kinds and "shaped" pay 0 where either block cannot be read, see `krontune.rl.tasks.parsing`.
    ids_exact and ids_prefix mean what the paper means only where optima are unique.

    A call returns one float for each completion and never raises on what a completion says. Where TRL gives
    `log_metric`, it logs `<task>/answer_accuracy`, `<task>/certificate_accuracy`, `<task>/gap` (their
    difference) and `<task>/parse_failure`, once per completion, since TRL averages over calls. Where it gives
    `log_extra`, the completions table gets a column `verdict`. Picklable; named `<task>_<kind>`.

    Raises RlError for an unknown task or kind, weights that are no mixture, sorted_preface for a task that
    sorts nothing, options of another kind, and when called without the columns it needs.
    """

    def __init__(
        self,
        task: CertificateTask | str,
        kind: str = "certificate",
        *,
        weights: Mapping[str, float] | None = None,
        first: str | None = None,
        then: str | None = None,
        switch_at: int | None = None,
        seed: int = 0,
    ):
        if kind not in KINDS:
            raise unknown("reward kind", kind, KINDS)
        self.task = get_task(task) if isinstance(task, str) else task
        if not isinstance(self.task, CertificateTask):
            raise RlError(f"task must be the name of a task or what get_task gives, got {task!r}")
        options = {"weights": weights, "first": first, "then": then, "switch_at": switch_at}
        for name, value in options.items():
            if value is not None and kind != ("mixture" if name == "weights" else "curriculum"):
                raise RlError(f"{name} is an option of another reward than {kind!r}: leave it out, or name that reward")
        self.kind = kind
        self.weights = _mixture(weights, self.task) if kind == "mixture" else {}
        self.first, self.then = FIRST if first is None else first, THEN if then is None else then
        self.switch_at = SWITCH_AT if switch_at is None else whole("switch_at", switch_at)
        for part in (self.first, self.then) if kind == "curriculum" else (kind, *self.weights):
            if kind == "curriculum" and part not in PARTS:
                raise unknown("stage of a curriculum", part, PARTS)
            if part == "sorted_preface" and not _sorts(self.task):
                raise RlError(f"task {self.task.name!r} sorts nothing, so it has no reward {part!r}")
        self._coin = random.Random(seed)
        self.__name__ = f"{self.task.name}_{kind}"

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        instance: Sequence[Any] | None = None,
        trainer_state: Any = None,
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
        if self.kind == "curriculum" and trainer_state is None:
            raise RlError("a curriculum needs trainer_state, which TRL's asynchronous trainers do not give")
        pay = self._payment(trainer_state)
        paid, verdicts = [], []
        for mark in mark_each(self.task, instance, completions):
            paid.append(pay(self.task, mark))
            if log_extra is not None:
                verdicts.append(mark.verdict)
            if log_metric is not None:
                self._log(mark, log_metric)
        if log_extra is not None:
            log_extra("verdict", verdicts)
        return paid

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of kind "random" is, for a run that is continued."""
        return {"coin": self._coin.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        version, words, spare = state["coin"]
        self._coin.setstate((version, tuple(words), spare))  # a list where it came from a file

    def _payment(self, trainer_state: Any) -> Callable[[CertificateTask, Mark], float]:
        if self.kind == "mixture":
            return self._mixed
        if self.kind == "random":
            return lambda task, mark: float(self._coin.random() < 0.5)
        if self.kind == "curriculum":
            return PARTS[self.first if trainer_state.global_step < self.switch_at else self.then]
        return PARTS[self.kind]

    def _mixed(self, task: CertificateTask, mark: Mark) -> float:
        return sum(weight * PARTS[part](task, mark) for part, weight in self.weights.items())

    def _log(self, mark: Mark, log_metric: Callable[[str, float], None]) -> None:
        answer, certificate = float(mark.answer_right), float(mark.certificate_right)
        log_metric(f"{self.task.name}/answer_accuracy", answer)
        log_metric(f"{self.task.name}/certificate_accuracy", certificate)
        log_metric(f"{self.task.name}/gap", answer - certificate)
        log_metric(f"{self.task.name}/parse_failure", float(not mark.parsed.ok))


def certificate(task: CertificateTask, mark: Mark) -> float:
    """1[feasible and value = optimum]."""
    return float(mark.certificate_right)


def answer(task: CertificateTask, mark: Mark) -> float:
    """1[stated value = optimum]."""
    return float(mark.answer_right)


def ids_exact(task: CertificateTask, mark: Mark) -> float:
    """1[ids = the solver's certificate, in its order]."""
    return float(mark.parsed.ok and mark.parsed.ids == mark.solution.certificate)


def ids_prefix(task: CertificateTask, mark: Mark) -> float:
    """max(0, common prefix / L - 0.1 * 1[no ids, or another number of them than L])."""
    if not mark.parsed.ok or mark.parsed.ids is None:
        return 0.0
    stated, gold = mark.parsed.ids, mark.solution.certificate
    if not gold:  # to choose nothing is the optimum
        return float(not stated)
    common = 0
    while common < min(len(stated), len(gold)) and stated[common] == gold[common]:
        common += 1
    return max(0.0, common / len(gold) - 0.1 * (len(stated) != len(gold)))


def shaped(task: CertificateTask, mark: Mark) -> float:
    """1[feasible] * (value / optimum) ** 5, or (optimum / value) ** 5 where fewer is better."""
    if not mark.parsed.ok or mark.check is None or not mark.check.feasible:
        return 0.0
    if mark.check.optimal:
        return 1.0  # also where the optimum is 0
    found, best = mark.check.value, mark.solution.value
    return (best / found if task.fewest else found / best) ** SHAPED_POWER


def sorted_preface(task: CertificateTask, mark: Mark) -> float:
    """1[the order that the text says it sorted the ids into = the task's order]."""
    return float(stated_order(mark.text, mark.instance.n) == task.preface(mark.instance))


def format_only(task: CertificateTask, mark: Mark) -> float:
    """1[both blocks can be read]."""
    return float(mark.parsed.ok)


def wrong_label(task: CertificateTask, mark: Mark) -> float:
    """1[stated value = optimum + 1 or - 1], one of the two fixed for each instance."""
    up = mark.solution.value < 2 or crc32(task.key(mark.instance).encode()) % 2
    return float(mark.parsed.answer == mark.solution.value + (1 if up else -1))


PARTS: dict[str, Callable[[CertificateTask, Mark], float]] = {
    "certificate": certificate,
    "answer": answer,
    "ids_exact": ids_exact,
    "ids_prefix": ids_prefix,
    "shaped": shaped,
    "sorted_preface": sorted_preface,
    "format": format_only,
    "wrong_label": wrong_label,
}
KINDS = (*PARTS, "mixture", "curriculum", "random")


def _sorts(task: CertificateTask) -> bool:
    return type(task).preface is not CertificateTask.preface


def _mixture(weights: Mapping[str, float] | None, task: CertificateTask) -> dict[str, float]:
    """The weights, scaled to sum to 1."""
    if weights is None:
        weights = {"answer": 1, "ids_exact": 1, **({"sorted_preface": 1} if _sorts(task) else {})}
    if not isinstance(weights, Mapping):
        raise RlError(f'the weights of a mixture must be given like {{"answer": 0.9, "format": 0.1}}, got {weights!r}')
    for part in weights:
        if part not in PARTS:
            raise unknown("part of a mixture", part, PARTS)
    numbers = [weight for weight in weights.values() if isinstance(weight, Real) and isfinite(weight)]
    total = sum(numbers)
    if len(numbers) < len(weights) or not weights or min(numbers) < 0 or total <= 0:
        raise RlError(f"the weights of a mixture must be numbers, 0 or more and not all 0, got {dict(weights)}")
    return {part: weight / total for part, weight in weights.items()}


_LIST = re.compile(r"-?[0-9.]+(?:\s*,\s*-?[0-9.]+)+")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_RELATION = re.compile(r"[=<>]|\\(?:in|leq?|geq?|neq?|approx|sim|equiv)\b")
_BRACE = re.compile(r"[{}]")
_NAMING = re.compile(r"^\s*[A-Za-z]\s*=")


class MathReward:
    r"""1 where math-verify finds the last `\boxed{...}` equal to the row's gold answer, for data with such a column.

    column: where the gold answer stands: LaTeX, a bare number, or a solution that ends in one, see `final_answer`.
    Needs the extra `math`.

    math-verify has no time limit outside the main thread, and one completion like `\boxed{9^{9^{9^9}}}`
    freezes the process: always run it as `Guarded(MathReward())`. Stricter than math-verify where it was
    found to pay for nothing: only the text after the last `</think>` counts, all boxes there must agree, and
    a box that states a relation where the gold answer has none (`5=3`, `x\in\{3\}`) earns 0, except for one
    name in front (`x=3`). Left as they are: unevaluated sums and integrals count as their value.

    A call returns 1.0, 0.0, or None where the gold answer is missing, is neither text nor a finite number, or cannot
    be read by math-verify, so that TRL leaves the row out. Raises RlError without the column or the extra, and for a
    gold answer that is a list of numbers: math-verify compares lists as sets, so an order or a repetition would not
    count.
    """

    def __init__(self, column: str = "answer"):
        self.column = column
        self.__name__ = "math"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Loaded with math-verify where it is there, and that made ready by a first use, which takes up to a second: a
        guard's worker then does so once, outside any time limit."""
        self.__dict__.update(state)
        with suppress(ImportError):
            import math_verify  # noqa: F401

            self._one("1", r"\boxed{\frac{1}{2}}")

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float | None]:
        """One reward per completion."""
        if completions is None:
            raise RlError("a reward needs completions")
        if self.column not in columns:
            raise RlError(f"reward 'math' needs the data set's column {self.column!r} with the gold answers")
        golds = columns[self.column]
        if len(golds) != len(completions):
            raise RlError(f"column {self.column!r} has {len(golds)} gold answers for {len(completions)} completions")
        return [
            self._one(str(gold), completion_text(completion)) if _is_gold(gold) else None
            for gold, completion in zip(golds, completions, strict=True)
        ]

    def _one(self, gold: str, text: str) -> float | None:
        try:
            from math_verify import LatexExtractionConfig, parse, verify
        except ImportError as error:
            raise RlError("reward 'math' needs math-verify: pip install krontune[math]") from error
        for module in ("parser", "grader"):  # they warn in every process that its own time limit is off
            logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
        gold = final_answer(gold)
        if _LIST.fullmatch(gold.strip()) and not _THOUSANDS.fullmatch(gold.strip()):
            raise RlError(
                f"the gold answer {gold!r} is a list, which math-verify compares as a set: use another reward"
            )
        # None: math-verify's own time limit works in the main thread only, and would cancel any alarm set there
        how: dict[str, Any] = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None}
        truth = parse(f"\\boxed{{{gold}}}", **how)
        if not truth:
            return None
        stated = set(_boxes(text[text.rfind("</think>") + 1 :]))
        if len(stated) != 1:
            return 0.0
        box = stated.pop()
        if not _RELATION.search(gold):
            box = _NAMING.sub("", box)
            if _RELATION.search(box):
                return 0.0
        found = parse(f"\\boxed{{{box}}}", **how)
        return float(bool(found) and verify(truth, found, timeout_seconds=None))


def final_answer(gold: str) -> str:
    r"""The answer of a gold text: its last `\boxed{...}`, else what follows its last `####` (as in GSM8K), else all.

    Raises RlError for a text of several lines that marks no answer so: read as one expression it would pay at random.
    """
    boxes = _boxes(gold)
    if boxes:
        return boxes[-1]
    _, mark, last = gold.rpartition("####")
    answer = (last if mark else gold).strip().strip("$")
    if "\n" in answer:
        raise RlError(
            f"the gold answer {answer[:80]!r} is a text of several lines; give the answer alone, or mark it with "
            "\\boxed{...} or ####"
        )
    return answer


def _is_gold(value: Any) -> bool:
    """Whether it can be an answer: text or a finite number, and no None, which str() would make a word of."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return isfinite(value)
    return isinstance(value, str)


class RandomReward:
    """1 with probability 1/2, whatever the text: the control of any reward (arXiv 2506.10947).

    Drawn from a stream of `seed` that goes on from call to call. It reads nothing, so it needs no `Guarded`.
    """

    def __init__(self, seed: int = 0):
        self._coin = random.Random(seed)
        self.__name__ = "random"

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, for a run that is continued."""
        return {"coin": self._coin.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        version, words, spare = state["coin"]
        self._coin.setstate((version, tuple(words), spare))  # a list where it came from a file

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """One reward per completion."""
        return [float(self._coin.random() < 0.5) for _ in completions or ()]


class BoxedFormat:
    r"""1 where the text after the last `</think>` has a `\boxed{...}`, whatever is in it: a control of `MathReward`."""

    __name__ = "boxed_format"

    def __call__(
        self, prompts: Sequence[Any] | None = None, completions: Sequence[Any] | None = None, **columns: Any
    ) -> list[float]:
        """One reward per completion."""
        texts = [completion_text(completion) for completion in completions or ()]
        return [float(bool(_boxes(text[text.rfind("</think>") + 1 :]))) for text in texts]


def _boxes(text: str) -> list[str]:
    r"""The contents of all closed `\boxed{...}` that stand in no other one, in linear time."""
    opener, found, place = "\\boxed{", [], 0
    while (place := text.find(opener, place)) >= 0:
        start = place + len(opener)
        depth = 1
        for brace in _BRACE.finditer(text, start):
            depth += 1 if brace.group() == "{" else -1
            if not depth:
                found.append(text[start : brace.start()].strip())
                break
        else:
            return found
        place = brace.end()
    return found
