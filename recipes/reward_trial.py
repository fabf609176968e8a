"""A reward function tried on a few completions whose worth is known, before anything is trained on it."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from statistics import fmean
from typing import Any

from ..rl import CertificateTask, Guarded
from ..rl.evaluation import completion_text
from .own import is_own
from .rows import Row
from .schema import Rl

ROWS = 4
GOLD_COLUMNS = ("answer", "solution", "ground_truth")
# Rewards that pay for other things than a right answer, or that need a trainer.
NOT_JUDGED = ("format", "random", "wrong_label", "sorted_preface", "curriculum")


def faults_of_reward(
    reward: Callable[..., Any], rows: Sequence[Mapping[str, Any]], right: Sequence[Sequence[str]]
) -> Iterator[str]:
    """What is wrong with a reward, tried on right, wrong, empty and truncated completions.

    rows: the columns of some rows, `prompt` among them. right: for each known form of a right completion, one a row; a
    reward of the user's own may know just one of the forms. Found are exceptions, deadlines missed, replies that are
    no rewards, and a wrong, empty or truncated completion that is paid as much as a right one.
    """
    best, form = -inf, list[str]()
    for texts in right:
        pay, fault = _pay(reward, rows, texts, "right")
        if fault:
            yield fault
            return
        best, form = max((best, form), (fmean(pay), list(texts)), key=lambda pair: pair[0])
    for kind, texts in _others(form, len(rows)).items():
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


def right_forms(stage: Rl, rows: Sequence[Row], task: CertificateTask | None) -> list[list[str]]:
    """For each form of a right completion that is known of these rows, one completion a row."""
    if task is not None:
        return [[task.completion(task.instance_from_json(row["instance"])) for row in rows]]
    if all("completion" in row for row in rows):
        return [[completion_text(row["completion"]) for row in rows]]
    column = stage.reward_options.get("column", "answer") if stage.reward == "math" else _gold_column(rows)
    if column is None or not all(column in row for row in rows):
        return []
    golds = [str(row[column]) for row in rows]
    boxed = [gold if "\\boxed{" in gold else f"\\boxed{{{gold.strip().strip('$')}}}" for gold in golds]
    return [boxed] if not is_own(stage.reward) else [golds, boxed, [f"<answer>{gold}</answer>" for gold in golds]]


def _gold_column(rows: Sequence[Row]) -> str | None:
    return next((name for name in GOLD_COLUMNS if all(name in row for row in rows)), None)


def _others(right: Sequence[str], size: int) -> dict[str, list[str]]:
    found = {"wrong": ["I do not know."] * size, "empty": [""] * size}
    if right:
        found["truncated"] = [text[: len(text) // 2] for text in right]
        turned = [*right[1:], right[0]]
        if all(a != b for a, b in zip(right, turned, strict=True)):
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
    if len(numbers) != len(texts):
        return [], f"the reward gives {len(numbers)} values for {len(texts)} completions; one each is needed"
    return numbers, ""


def _article(kind: str) -> str:
    return "an" if kind == "empty" else "a"
