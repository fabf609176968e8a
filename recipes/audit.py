"""The checks before training, on the task, the data and the reward of a recipe's rl stage."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from ..data_selection import DataSelectionError
from ..data_selection.files import write_atomic
from ..data_selection.texts import row_text
from ..rl import CertificateTask, Guarded, RlError, checks
from ..rl.checks import CheckResult
from ..rl.checks.result import not_run
from ..rl.checks.rows import held_out_overlap, pay_rows, rows_heuristics, rows_soundness, rows_verifier
from ..rl.rewards import THEN
from .faults import Fault, RecipeError
from .links import feeder, rl_of, sources_behind
from .masking import without_secrets
from .pool import rows_file
from .prompts import read_prompts
from .reward_trial import GOLD_COLUMNS, ROWS, right_forms
from .rewards import make_reward
from .rl import make_task, training_rows
from .rows import Row, source_rows
from .schema import Recipe, Rl, Sft, Verify

FILE_WIDTH = 120
NO_MODEL = "an audit loads no model; a verify stage with samples makes it of the model that the rl stage begins with"


def audit(recipe: Recipe) -> list[CheckResult]:
    """Soundness, verifier, heuristics, shortcut ceiling and contamination, each with its own verdict.

    Over a task they are those of `krontune.rl.checks`; over data of one's own, where no task knows the near misses,
    they are made from the rows, see `krontune.rl.checks.rows`. Nothing is trained and no model is loaded, so that
    `headroom`, which asks one, is not run and says what would run it.

    Raises:
        RecipeError: there is no rl stage, or its task, data or reward cannot be built.
    """
    stages = [stage for stage in recipe.stages if isinstance(stage, Rl)]
    if not stages:
        raise RecipeError([Fault(recipe.where(("stages",)), "there is no rl stage, so there is no reward to audit")])
    found: list[CheckResult] = []
    for stage in stages:
        mine = [*_of_stage(recipe, stage), not_run("headroom", NO_MODEL)]
        # With one there is nothing to tell apart.
        named = {"stage": recipe.name_of(stage)} if len(stages) > 1 else {}
        found += [replace(one, details={**named, **one.details}) for one in mine]
    with _told_of(recipe, stages[0]):
        found.append(held_out_overlap(_held_out(recipe), training_texts(recipe)))
    return without_secrets(found)


@contextmanager
def _told_of(recipe: Recipe, stage: Rl) -> Iterator[None]:
    """What cannot be made or read, and what code of the user's own raises, is a fault of the stage."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, RlError | DataSelectionError | OSError) else f"{type(error).__name__}: "
        where = recipe.where(("stages", recipe.place(stage), "stage"))
        raise RecipeError([Fault(where, kind + " ".join(str(error).split()))]) from error


def _of_stage(recipe: Recipe, stage: Rl) -> list[CheckResult]:
    with _told_of(recipe, stage):
        task = None if stage.task is None else make_task(stage.task)
        rows = [] if task is not None else [dict(row) for row in training_rows(stage, recipe.seed)]
        reward, name = _judged(stage, task, recipe.seed)
        try:
            if task is None or stage.task is None:
                return _of_rows(stage, reward, rows)
            n = stage.task.n
            for size in (n, n[-1]):
                task.instances(1, size, recipe.seed)  # nothing can be trained, or checked, where there are none
            of_reward = [
                _explained(tried("verifier", lambda: checks.verifier(reward, task, n)), reward),
                tried("heuristics", lambda: checks.heuristics(task, reward, n)),
            ]
            named = [replace(one, details={**name, **one.details}) for one in of_reward]
            sound = tried("soundness", lambda: checks.soundness(task, n))
            return [sound, *named, tried("shortcut_ceiling", lambda: checks.shortcut_ceiling(task, n))]
        finally:
            if isinstance(reward, Guarded):
                reward.close()


def _judged(stage: Rl, task: CertificateTask | None, seed: int) -> tuple[Any, dict[str, str]]:
    """The reward to audit, and what to call it where that is not plain: of a curriculum what it pays in the end, since
    a curriculum pays nothing without a trainer."""
    reward = make_reward(stage, task, seed)
    if stage.reward != "curriculum":
        return reward, {}
    last = str(stage.reward_options.get("then", THEN))
    then = stage.model_copy(update={"reward": last, "reward_options": {}})
    return make_reward(then, task, seed), {"reward": f"{last}, which the curriculum pays in the end"}


def _explained(result: CheckResult, reward: Any) -> CheckResult:
    """With the last message of a reward that failed."""
    if not isinstance(reward, Guarded) or not result.details.get("failures"):
        return result
    return replace(result, details={**result.details, "last_error": reward.last_error})


def tried(name: str, way: Callable[[], CheckResult]) -> CheckResult:
    """What a check cannot do with this task or these answers is said in the report; the others are not lost for it."""
    try:
        return way()
    except RlError as error:
        return not_run(name, str(error))


def _of_rows(stage: Rl, reward: Any, rows: list[Row]) -> list[CheckResult]:
    if not rows:
        raise RlError("the data has no rows")
    rows = _known(stage, rows)
    right = _right(stage, reward, rows)
    if not right:
        why = "no right completion is known: give the rows a column 'completion', or answers in 'answer'"
        return [not_run(name, why, len(rows)) for name in ("soundness", "verifier", "heuristics")]
    return [
        rows_soundness(rows, right),
        _explained(rows_verifier(reward, rows, right), reward),
        rows_heuristics(reward, rows, right),
        not_run("shortcut_ceiling", "rows of data have no features that were told from the answer", len(rows)),
    ]


def _known(stage: Rl, rows: list[Row]) -> list[Row]:
    """Those that have the column of right answers which most have; all, where none has any."""
    columns = [stage.reward_options.get("column", "answer")] if stage.reward == "math" else list(GOLD_COLUMNS)
    parts = [[row for row in rows if row.get(name) is not None] for name in ("completion", *columns)]
    return max(parts, key=len) or rows


def _right(stage: Rl, reward: Any, rows: list[Row]) -> list[str]:
    """A right completion for each row, in the form that the reward pays best."""
    forms = right_forms(stage, rows, None)
    if len(forms) < 2:
        return forms[0] if forms else []
    pays = [fmean(float(pay or 0) for pay in pay_rows(reward, rows[:ROWS], form[:ROWS])) for form in forms]
    return forms[pays.index(max(pays))]


def _held_out(recipe: Recipe) -> list[str]:
    """The prompts of the verify stages."""
    prompts = []
    for verify in recipe.stages:
        if isinstance(verify, Verify):
            settings = verify.task or rl_of(recipe, verify).task
            asked = make_task(settings)
            instances = asked.instances(verify.instances, settings.n, verify.seed, "test", settings.discriminating)
            prompts += [asked.prompt(one) for one in instances]
    return list(dict.fromkeys(prompts))


def training_texts(recipe: Recipe, run: Path | None = None, before: Verify | None = None) -> Iterator[str]:
    """Whatever the recipe trains on, or the stages before `before`, one text at a time: the rows of sft stages, and
    then the prompts of rl stages.

    Where sft takes what was selected, those are the picks of `run`, or the whole pool where there is no run or it has
    none yet; and so with what a dedup stage kept.

    Raises:
        RlError, DataSelectionError: as the stages raise where data cannot be made or read.
    """
    stages = recipe.stages if before is None else recipe.stages[: recipe.place(before)]
    for sft in stages:
        if isinstance(sft, Sft):
            fed_by = feeder(recipe, sft)
            made = None if fed_by is None or run is None else rows_file(run, recipe.name_of(fed_by))
            there = made is not None and made.is_file()
            for source in [str(made)] if there else sources_behind(recipe, sft):
                yield from (row_text(row, "data") for row in source_rows(source, "data"))
    for rl in stages:
        if isinstance(rl, Rl) and rl.task is not None:
            task = make_task(rl.task)
            drawn = task.instances(rl.instances, rl.task.n, recipe.seed, "train", rl.task.discriminating)
            yield from (task.prompt(one) for one in drawn)
        elif isinstance(rl, Rl):
            for row in read_prompts(rl.data or (), rl.instruction):
                prompt = row["prompt"]
                yield prompt if isinstance(prompt, str) else row_text({"messages": prompt}, "data")


def write_audit(results: Sequence[CheckResult], recipe: Recipe, out: Path) -> str:
    """Write the report, whole or not at all, and return its text."""
    found = checks.report(results, {"stage": "audit", "recipe": recipe.name})
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_atomic(out, text.encode())
    return text


def print_audit(results: Sequence[CheckResult]) -> None:
    """A table, and below it a line of evidence for each check that did not pass."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)
    table = Table(title="checks before training, each for itself", title_justify="left")
    for column in ("check", "value", "95 % interval", "N", "threshold", "verdict"):
        table.add_column(column, justify="left" if column == "check" else "right")
    for one in results:
        interval = "" if one.ci is None else f"[{one.ci[0]:.3f}, {one.ci[1]:.3f}]"
        value, threshold = ("" if x is None else f"{x:.3f}" for x in (one.value, one.threshold))
        table.add_row(_name(one), value, interval, str(one.n), threshold, one.verdict)
    console.print(table)
    for one in results:
        if one.verdict != "pass":
            console.print(f"{_name(one)}: {_why(one)}", soft_wrap=True, highlight=False)


def _name(result: CheckResult) -> str:
    stage = result.details.get("stage")
    return result.name.replace("_", " ") + (f" ({stage})" if stage else "")


def _why(result: CheckResult) -> str:
    """What of the evidence speaks against it."""
    details = result.details
    if "reason" in details:
        return str(details["reason"])
    if result.name == "soundness":
        faults = {name: found["count"] for name, found in details.get("faults", {}).items()}
        return str(faults or {"prompts with several answers": details["contradictions"]})
    if result.name == "verifier":
        return "; ".join(_verifier_faults(details)) or f"slow: {details['latency']['p99_ms']:.0f} ms for a text"
    if result.name == "heuristics":
        return f"{details['best']!r} earns {result.value:.2f} of what a solution earns"
    if result.name == "shortcut_ceiling":
        return f"features of the input alone give the right answer in {result.value:.2f} of the instances"
    return f"{result.value:.3f} of the held-out prompts stand in what is trained on, e.g. {details['examples'][:1]}"


def _verifier_faults(details: dict[str, Any]) -> Iterator[str]:
    kinds = details["kinds"].items()
    paid = {kind: f"{one['paid']} of {one['texts']}" for kind, one in kinds if one["must_pay"] is False and one["paid"]}
    missed = [kind for kind, one in kinds if one["must_pay"] and one["paid"] < one["texts"]]
    if paid:
        yield "pays what is wrong: " + ", ".join(f"{kind} ({count})" for kind, count in paid.items())
    if missed:
        yield f"does not pay all of: {', '.join(missed)}"
    if details["failures"]:
        last = f"; the last: {details['last_error']}" if details.get("last_error") else ""
        yield "fails: " + ", ".join(f"{what} {count} times" for what, count in details["failures"].items()) + last
    if details["unstable"]:
        yield f"pays {details['unstable']} texts differently from call to call"


def must_stop(results: Sequence[CheckResult]) -> bool:
    return any(one.verdict == "fail" for one in results)
