"""rlvr_report.json: what all stages of a run were checked for, before, during and after training, in one file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..data_selection.selection import write_atomic
from ..rl.checks.result import VERDICTS
from .masking import hidden, masked
from .names import order, parts
from .run_folder import RunError
from .verify import RESULT

REPORT_JSON = "rlvr_report.json"
SCHEMA_VERSION = 1
BEFORE = ("soundness", "verifier", "heuristics", "shortcut_ceiling", "headroom", "contamination")
DURING = ("first_batch", "collapse", "divergence", "gap_rise", "followed", "verifier_health")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds, read: `record` (run.json), `recipe`, `metrics`, `verified` (the result of each verify
    stage, by its name) and `report`; without secrets, see `masking`."""

    path: Path
    record: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    verified: dict[str, dict[str, Any]]
    report: dict[str, Any]

    @property
    def verify(self) -> dict[str, Any] | None:
        """The result of the last verify stage, or None."""
        return next(reversed(self.verified.values()), None)

    def names(self, *kinds: str) -> list[str]:
        """Of the finished stages of these kinds, and of their controls, in order."""
        return sorted((name for name in self.stages if parts(name).kind in kinds), key=order)

    @property
    def stages(self) -> dict[str, Any]:
        """What each finished stage recorded."""
        return self.record["stages"]

    def series(self, stage: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of one logged number."""
        return [
            (line["step"], line[key])
            for line in self.metrics
            if line["stage"] == stage and isinstance(line.get(key), int | float)
        ]


def read_run(path: str | Path) -> RunFiles:
    """Read a run folder, finished or not.

    Raises:
        RunError: it is no run folder, or a file of it is damaged.
    """
    path = Path(path)
    if not (path / "run.json").is_file() or not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} is no run folder: it has no run.json and recipe.yaml; give the folder of a run")
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        text = (path / "recipe.yaml").read_text(encoding="utf-8")
        done = sorted((name for name in record["stages"] if parts(name).kind == "verify"), key=order)
        results = {name: path / name / RESULT for name in done}
        verified = {name: json.loads(file.read_text("utf-8")) for name, file in results.items() if file.is_file()}
        report = run_report(path, record)
    except (ValueError, KeyError) as error:
        raise RunError(f"a file of {path} is damaged: {error}") from error
    written = yaml.safe_load(text)
    recipe = masked(written)
    if recipe != written:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    return RunFiles(path, hidden(record), recipe, text, list(_metrics(path)), hidden(verified), hidden(report))


def write_report(run: RunFiles) -> None:
    """Write the run's rlvr_report.json."""
    write_atomic(run.path / REPORT_JSON, (json.dumps(run.report, indent=1, allow_nan=False) + "\n").encode())


def run_report(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The stages' checks as one list: each with `stage`, `phase` ("before", "during", "after" the training) and, where
    it looked at a model, `model`. No blended score: `verdicts` counts them."""
    checks = []
    for stage in sorted(record["stages"], key=order):
        for file in sorted((path / stage).glob("*report.json")):
            part = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(part.get("checks"), list):
                continue  # another kind of report
            for one in part["checks"]:
                of_task = one["name"] in BEFORE and one["name"] != "contamination"
                model = None if of_task else part.get("about", {}).get("model")
                checks.append({"phase": _phase(one["name"]), "stage": stage, "model": model, **one})
    checks.sort(key=lambda one: ("before", "during", "after").index(one["phase"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "krontune": version("krontune"),
        "run": record["name"],
        "verdicts": {verdict: sum(one["verdict"] == verdict for one in checks) for verdict in VERDICTS},
        "checks": checks,
    }


def _phase(name: str) -> str:
    return "before" if name in BEFORE else "during" if name in DURING else "after"


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    file = path / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:  # cut while it was written
            continue
        if "stage" in found:
            yield found
