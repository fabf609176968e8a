"""The verify stage: every model of the run on the same held-out instances, beside the known heuristics."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data_selection.selection import write_atomic
from ..rl import checks, heuristic_table, score
from ..rl.evaluation import mark_all
from ..rl.plots import draw_completion
from ..rl.statistics import bootstrap_interval, paired_difference
from .links import rl_of
from .masking import without_secrets
from .models import Model
from .names import is_control, parts
from .rl import make_credit, make_task
from .rows import fingerprint
from .run_folder import RunFolder
from .schema import Recipe, Rl, Verify
from .steps import Step
from .training import load_recipe_base
from .verify_checks import ALL, Answers, after_answers, curves, while_loaded

RESULT, ANSWERS = "verify.json", "answers"


def run_verify(recipe: Recipe, step: Step, run: RunFolder) -> None:
    """Score the base and the adapters of the stages before, and check the last that is no control.

    Answers are kept in one file a model; whatever a model was asked before the stage was cut, or by an earlier verify
    stage, is not asked again.
    """
    stage = step.stage
    assert isinstance(stage, Verify)
    folder = run.begin(step.name, reuse=(ANSWERS,))
    earlier = [run.path / name / ANSWERS for name in _verified_before(recipe, stage)]
    settings = stage.task or rl_of(recipe, stage).task
    task = make_task(settings)
    instances = task.instances(stage.instances, settings.n, stage.seed, "test", settings.discriminating)
    run.add_data(step.name, rows=len(instances), sha256=fingerprint({"instance": task.to_json(i)} for i in instances))
    base = cache(lambda: load_recipe_base(recipe.base, run.path))

    names = ["base", *step.adapters]
    last = [name for name in names if not is_control(name)][-1]
    said = Answers(task, settings.n, instances, last)
    found, picture = {}, None
    prompts, solutions = [task.prompt(one) for one in instances], [task.completion(one) for one in instances]
    sure = {}
    for name in names:
        model = Model.of_stage(name, recipe, stage, run.path, [folder / ANSWERS, *earlier], base)
        said.greedy[name] = model.ask("greedy", prompts)
        sure[name] = model.probabilities(prompts, solutions)
        if stage.samples:
            repeated = [prompt for prompt in prompts for _ in range(stage.samples)]
            drawn = model.ask("samples", repeated, temperature=stage.temperature)
            said.samples[name] = [drawn[i : i + stage.samples] for i in range(0, len(drawn), stage.samples)]
        if name == last:
            found = while_loaded(recipe, stage, run.path, said, model)
            picture = _credit_picture(recipe, model, said, folder)
        model.close()
        rows = [{"instance": task.to_json(i), "answer": a} for i, a in zip(instances, said.greedy[name], strict=True)]
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    found |= after_answers(recipe, stage, said)
    order = dict.fromkeys(one for name in stage.checks for one in (ALL if name == "all" else (name,)))
    order |= dict.fromkeys(found)  # headroom, which may be made without being asked for
    ordered = [result for name in order for result in found[name]]
    models = {
        name: {**score(task, instances, answers).to_dict(), "solution": _mean(sure[name])}
        for name, answers in said.greedy.items()
    }
    right = {
        name: [mark.certificate_right for mark in mark_all(task, instances, answers)]
        for name, answers in said.greedy.items()
    }
    result = {
        "task": settings.model_dump(),
        "instances": len(instances),
        "weights": "dense, de-quantised and merged" if recipe.base.dense_generation else "as loaded",
        "models": models,
        "changes": _changes(right, sure),
        "heuristics": {name: one.to_dict() for name, one in heuristic_table(task, instances).items()},
        "samples": curves(said),
        "temperature": stage.temperature,
        "credit_picture": picture,
    }
    if ordered:
        about = {"stage": step.name, "model": last, "task": settings.model_dump(), "instances": len(instances)}
        result["checks"] = checks.write_report(without_secrets(ordered), folder / "rlvr_report.json", about)["checks"]
    write_atomic(folder / RESULT, json.dumps(result, indent=2).encode())
    run.finish(step.name, certificate={name: value["certificate"]["value"] for name, value in models.items()})


def _verified_before(recipe: Recipe, stage: Verify) -> list[str]:
    return [name for name in recipe.names[: recipe.place(stage)] if parts(name).kind == "verify"]


def _changes(right: dict[str, list[bool]], sure: dict[str, list[float]]) -> list[dict[str, Any]]:
    """How a stage differs from the one before it and from its control: in certificates, and in `solution`, the
    probability of the worked solution.

    right, sure: one value an instance, the same instances for every model. The intervals are of a paired bootstrap.
    """
    stages = [name for name in right if not is_control(name)]
    pairs = [*zip(stages[:-1], stages[1:], strict=True)]
    pairs += [(name, parts(name).stage) for name in right if is_control(name)]
    found = []
    for before, after in pairs:
        value, low, high = paired_difference(right[after], right[before])
        solution = _mean([a - b for a, b in zip(sure[after], sure[before], strict=True)])
        change = {"from": before, "to": after, "value": value, "low": low, "high": high, "n": len(right[after])}
        found.append({**change, "solution": solution})
    return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """The mean over instances with its bootstrap interval."""
    low, high = bootstrap_interval([[value] for value in values], lambda means: means[:, 0])
    return {"value": fmean(values), "low": float(low), "high": float(high), "n": len(values)}


def _credit_picture(recipe: Recipe, model: Model, said: Answers, folder: Path) -> str | None:
    """Draws one answer as token credit sees it, where the rl stage used it: a right one, if there is any."""
    rl = recipe.stage(model.name)
    if not isinstance(rl, Rl) or rl.credit is None or make_credit(rl).strategy == "off":
        return None
    answers = said.greedy[model.name]
    marks = [said.task.mark(one, text) for one, text in zip(said.instances, answers, strict=True)]
    written = [i for i, mark in enumerate(marks) if mark.text.strip()]
    if not written:
        return None
    place = next((i for i in written if marks[i].certificate_right), written[0])
    loaded, tokenizer = model.loaded
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": said.task.prompt(said.instances[place])}],
        add_generation_prompt=True,
        tokenize=False,
    )
    drawn = draw_completion(loaded, tokenizer, prompt, answers[place], make_credit(rl), width=640)
    write_atomic(folder / "credit.svg", drawn.encode())
    return "credit.svg"


def verification(run_path: Path, name: str) -> dict[str, Any]:
    """What the verify stage of this name wrote."""
    return json.loads((run_path / name / RESULT).read_text(encoding="utf-8"))
