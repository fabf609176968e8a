"""The verify stage: every model of the run on the same held-out instances, beside the known heuristics."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data_selection.selection import write_atomic
from ..rl import CertificateReward, checks, heuristic_table
from ..rl.checks import CheckResult
from ..rl.evaluation import mark_all, summarise
from ..rl.generation import generate
from ..rl.statistics import paired_difference
from ..rl.tasks import CertificateTask, Instance
from .progress import Progress
from .rl import make_task
from .rows import fingerprint
from .run_folder import RunFolder
from .schema import Recipe, Verify
from .training import ADAPTER, load_recipe_base

RESULT = "verify.json"


def run_verify(recipe: Recipe, stage: Verify, run: RunFolder, adapters: list[str]) -> None:
    """Score the base and the adapters of these stages; answers are kept in one file a model."""
    folder = run.begin("verify")
    settings = stage.task or recipe.stage("rl").task
    task = make_task(settings)
    instances = task.instances(stage.instances, settings.n, stage.seed, "test", settings.discriminating)
    run.add_data("verify", rows=len(instances), sha256=fingerprint({"instance": task.to_json(i)} for i in instances))
    base, tokenizer = load_recipe_base(recipe.base)

    models, right, found = {}, {}, []
    names = ["base", *adapters]
    last = [name for name in names if "-" not in name][-1]  # no control
    for name in names:
        model = base if name == "base" else PeftModel.from_pretrained(base, str(run.path / name / ADAPTER))

        def answer(asked: Sequence[Instance], label: str = f"verify {name}", model: Any = model) -> list[str]:
            progress = Progress(label, len(asked), "answer")
            texts = generate(
                model,
                tokenizer,
                [task.prompt(instance) for instance in asked],
                max_new_tokens=stage.max_new_tokens,
                batch_size=stage.batch_size,
                dense=recipe.base.dense_generation,
                on_batch=progress.update,
            )
            progress.close()
            return texts

        answers = answer(instances)
        if name == last:
            found = _checks(stage, settings.n, task, instances, answers, answer)
        if isinstance(model, PeftModel):
            model.unload()  # gives the base its own layers back
        rows = [{"instance": task.to_json(i), "answer": a} for i, a in zip(instances, answers, strict=True)]
        _write_lines(folder / f"{name}.jsonl", rows)
        marks = mark_all(task, instances, answers)
        models[name] = summarise(marks).to_dict()
        right[name] = [mark.certificate_right for mark in marks]

    weights = "dense, de-quantised and merged" if recipe.base.dense_generation else "as loaded"
    heuristics = {name: result.to_dict() for name, result in heuristic_table(task, instances).items()}
    result = {
        "task": settings.model_dump(),
        "instances": len(instances),
        "weights": weights,
        "models": models,
        "changes": _changes(right),
        "heuristics": heuristics,
    }
    if found:
        about = {"stage": "verify", "model": last, "task": settings.model_dump(), "instances": len(instances)}
        result["checks"] = checks.write_report(found, folder / "rlvr_report.json", about)["checks"]
    write_atomic(folder / RESULT, json.dumps(result, indent=2).encode())
    run.finish("verify", certificate={name: value["certificate"]["value"] for name, value in models.items()})


def _changes(right: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """How the certificates of a stage differ from those of the stage before it and of its control.

    right: one flag an instance, the same instances for every model. The intervals are of a paired bootstrap.
    """
    stages = [name for name in right if "-" not in name]
    pairs = [*zip(stages[:-1], stages[1:], strict=True)]
    pairs += [(name, name.split("-")[0]) for name in right if "-" in name]
    found = []
    for before, after in pairs:
        value, low, high = paired_difference(right[after], right[before])
        found.append({"from": before, "to": after, "value": value, "low": low, "high": high, "n": len(right[after])})
    return found


def _checks(
    stage: Verify,
    n: list[int],
    task: CertificateTask,
    instances: list[Instance],
    answers: list[str],
    answer: Callable[..., list[str]],
) -> list[CheckResult]:
    """The checks that the recipe asks for, in its order: of the task, of these answers, or of new ones."""
    reward = CertificateReward(task)
    ways: dict[str, Callable[[], CheckResult]] = {
        "soundness": lambda: checks.soundness(task, n),
        "verifier": lambda: checks.verifier(reward, task, n),
        "heuristics": lambda: checks.heuristics(task, reward, n),
        "shortcut_ceiling": lambda: checks.shortcut_ceiling(task, n),
        "symmetry": lambda: checks.symmetry(task, instances, lambda asked: answer(asked, "check symmetry")),
        "size_ladder": lambda: checks.size_ladder(task, lambda asked: answer(asked, "check size"), stage.sizes),
    }
    of_answers = ("triplet", "attribution", "heuristic_agreement", "feature_probe", "process_claims")
    ways |= {name: lambda name=name: getattr(checks, name)(task, instances, answers) for name in of_answers}
    return [ways[name]() for name in stage.checks]


def verification(run_path: Path) -> dict[str, Any]:
    """What the verify stage wrote."""
    return json.loads((run_path / "verify" / RESULT).read_text())


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
