"""What a check says, and the report over many of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import RlError

SCHEMA_VERSION = 1
VERDICTS = ("pass", "warn", "fail", "not run")


@dataclass(frozen=True)
class CheckResult:
    """One check: what was measured, how surely, on how much, against what, and the evidence.

    value: the measured number, None where the check was not run. ci: its 95 % interval. n: the independent
    items behind it (instances, not samples of one instance). threshold: what the verdict compares with.
    verdict: "pass" and "fail" where the whole interval lies on the good or the bad side of the threshold,
    "warn" where it covers the threshold, "not run" with details["reason"]; a check that departs from this
    rule says so. details: everything else, ready for JSON.
    """

    name: str
    value: float | None
    ci: tuple[float, float] | None
    n: int
    threshold: float | None
    verdict: str
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise RlError(f"unknown verdict {self.verdict!r}; verdicts: {', '.join(VERDICTS)}")


def judge(ci: tuple[float, float], threshold: float, high_is_good: bool = True) -> str:
    """The verdict on an interval: "pass", "fail", or "warn" where it covers the threshold."""
    low, high = ci if high_is_good else (-ci[1], -ci[0])
    limit = threshold if high_is_good else -threshold
    if low >= limit:
        return "pass"
    return "fail" if high < limit else "warn"


def severity(verdict: str) -> int:
    """0 for "pass", 1 for "warn", 2 for "fail", -1 for "not run": of several parts the worst decides."""
    return {"not run": -1, "pass": 0, "warn": 1, "fail": 2}[verdict]


def not_run(name: str, reason: str, n: int = 0) -> CheckResult:
    """The result of a check that has too little to say anything."""
    return CheckResult(name, None, None, n, None, "not run", {"reason": reason})


def report(results: Sequence[CheckResult], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report as plain data: schema version, krontune's version, `about`, counts of verdicts, the checks.

    There is no blended score: a run with one "fail" has failed in that one respect, and the reader is told in
    which. Infinite and undefined numbers become None, so that any JSON reader takes it.
    """
    checks = [_plain(asdict(result)) for result in results]
    return {
        "schema_version": SCHEMA_VERSION,
        "krontune": version("krontune"),
        "about": _plain(dict(about or {})),
        "verdicts": {verdict: sum(result.verdict == verdict for result in results) for verdict in VERDICTS},
        "checks": checks,
    }


def write_report(
    results: Sequence[CheckResult], path: str | Path, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes `report(results, about)` as JSON (by name `rlvr_report.json`) and returns it."""
    data = report(results, about)
    Path(path).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return _plain(value.tolist())
    return str(value)
