"""A reward function tried on a few completions whose worth is known, before anything is trained on it."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import fmean
from typing import Any

from ..rl import CertificateTask, Guarded
from ..rl.evaluation import completion_text
from ..rl.rewards import final_answer
from ..rl.tasks.base import Instance
from .own import is_own
from .rows import Row
from .schema import Rl

ROWS = 4
DUNNO = "I do not know."
GOLD_COLUMNS = ("answer", "solution", "ground_truth")
# Rewards that pay for other things than a right answer, or that need a trainer.
NOT_JUDGED = ("format", "random", "wrong_label", "sorted_preface", "curriculum")


def faults_of_reward(
    reward: Callable[..., Any],
    rows: Sequence[Mapping[str, Any]],
    right: Sequence[Sequence[str]],
    wrong: Sequence[str] = (),
) -> Iterator[str]:
    """What is wrong with a reward, tried on right, wrong, empty and truncated completions.

    rows: the columns of some rows, `prompt` among them. right: for each known form of a right completion, one a row; a
    reward of the user's own may know just one of the forms. wrong: one completion a row that is known to be wrong;
    without it each row gets the right completion of another. Found are exceptions, deadlines missed, replies that are
    no rewards, and a wrong, empty or truncated completion that is paid as much as a right one.
    """
    best, form = -inf, list[str]()
    for texts in right:
        pay, fault = _pay(reward, rows, texts, "right")
        if fault:
            yield fault
            return
        best, form = max((best, form), (fmean(pay), list(texts)), key=lambda pair: pair[0])
    for kind, texts in _others(form, wrong, len(rows)).items():
        pay, fault = _pay(reward, rows, texts, kind)
        if fault:
            yield fault
            return
        if form and fmean(pay) >= best:
            yield (
                f"the reward pays {_article(kind)} {kind} completion {fmean(pay):g} and a right one {best:g}; where it "
                f"asks for another form, give the rows a column 'completion' that holds a right one (tried as right: "
                f"{form[0][:80]!r})"
            )


def rows_to_try(stage: Rl, rows: Sequence[Row], task: CertificateTask | None) -> list[list[Row]]:
    """Some rows of each kind: those of one kind have the same ones of the columns that hold a right answer.

    Rows of several files may have different columns, and a reward that reads one of them knows nothing of the others.
    Rows without a gold answer, which reward math leaves out, are tried only where there are no others.
    """
    if task is not None:
        return [list(rows[:ROWS])]
    math = stage.reward == "math"
    columns = [stage.reward_options.get("column", "answer")] if math else ["completion", *GOLD_COLUMNS]
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        few = kinds.setdefault(tuple(name for name in columns if row.get(name) is not None), [])
        if len(few) < ROWS:
            few.append(row)
    if math and len(kinds) > 1:
        kinds.pop((), None)
    return list(kinds.values())


def right_forms(stage: Rl, rows: Sequence[Row], task: CertificateTask | None) -> list[list[str]]:
    """For each form of a right completion that is known of these rows, one completion a row."""
    if task is not None:
        return [[task.completion(task.instance_from_json(row["instance"])) for row in rows]]
    if all(row.get("completion") is not None for row in rows):
        return [[completion_text(row["completion"]) for row in rows]]
    column = stage.reward_options.get("column", "answer") if stage.reward == "math" else _gold_column(rows)
    if column is None or not all(row.get(column) is not None for row in rows):
        return []
    golds = [str(row[column]) for row in rows]
    if not is_own(stage.reward):
        return [[f"\\boxed{{{final_answer(gold)}}}" for gold in golds]]
    boxed = [gold if "\\boxed{" in gold else f"\\boxed{{{gold.strip().strip('$')}}}" for gold in golds]
    return [golds, boxed, [f"<answer>{gold}</answer>" for gold in golds]]


def _gold_column(rows: Sequence[Row]) -> str | None:
    return next((name for name in GOLD_COLUMNS if all(row.get(name) is not None for row in rows)), None)


def wrong_texts(rows: Sequence[Row], task: CertificateTask) -> list[str]:
    """For each row a completion in the task's form of which neither the answer nor the certificate is right.

    The right completion of another row will not do: two instances may share an answer, or a certificate.
    """
    instances = [task.instance_from_json(row["instance"]) for row in rows]
    return [_wrong_text(task, instance) for instance in instances]


def _wrong_text(task: CertificateTask, instance: Instance) -> str:
    right, every = task.solution(instance).certificate, tuple(range(1, instance.n + 1))
    for ids in (right[:-1], every, *((row,) for row in every), right[:1]):
        text = task.write(instance, ids)
        mark = task.mark(instance, text)
        if not mark.answer_right and not mark.certificate_right:
            return text
    return DUNNO


def _others(right: Sequence[str], wrong: Sequence[str], size: int) -> dict[str, list[str]]:
    found = {"wrong": list(wrong) or [DUNNO] * size, "empty": [""] * size}
    if right:
        found["truncated"] = [text[: len(text) // 2] for text in right]
        turned = [*right[1:], right[0]]
        if not wrong and all(a != b for a, b in zip(right, turned, strict=True)):
            found["wrong"] = turned  # each gets the right completion of another row
    return found


def _pay(
    reward: Callable[..., Any], rows: Sequence[Mapping[str, Any]], texts: Sequence[str], kind: str
) -> tuple[list[float], str]:
    """The pay of one completion a row, called as TRL calls; or what went wrong."""
    chat = isinstance(rows[0]["prompt"], list)
    completions: list[Any] = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    outcomes: dict[str, list[Any]] = {}
    logs: dict[str, Any] = {"log_extra": outcomes.__setitem__} if isinstance(reward, Guarded) else {}
    # An unguarded reward may do whatever it does; its exceptions are what is looked for here.
    try:
        pay = reward(prompts=[row["prompt"] for row in rows], completions=completions, **columns, **logs)
        if inspect.iscoroutine(pay):
            import asyncio

            pay = asyncio.run(pay)
        pay = list(pay)
        numbers = [0.0 if value is None else float(value) for value in pay]
    except Exception as error:
        return [], f"the reward fails on {_article(kind)} {kind} completion: {type(error).__name__}: {error}"
    bad = [outcome for outcome in outcomes.get("guard", ()) if outcome != "scored"]
    if bad and isinstance(reward, Guarded):
        return [], f"the reward fails on {_article(kind)} {kind} completion ({bad[0]}): {reward.last_error}"
    odd = next((number for number in numbers if not isfinite(number)), None)
    if odd is not None:
        return [], f"the reward gives {odd} for {_article(kind)} {kind} completion; a finite number or None is needed"
    if len(numbers) != len(texts):
        return [], f"the reward gives {len(numbers)} values for {len(texts)} completions; one each is needed"
    return numbers, ""


def _article(kind: str) -> str:
    return "an" if kind == "empty" else "a"
