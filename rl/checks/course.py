"""What the log says of the samples of a run: do right answers lose their certificates, and is a heuristic followed?

Both read what `Monitored` logs, so they need no completions, and they go on where a run is continued.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..statistics import difference_of_means, mean_interval
from .result import CheckResult, judge, not_run, severity

LEAST = 9  # log entries: three in each third
FOLLOWS = "follows"  # Monitored logs "<task>/follows/<heuristic>"


def gap_rise(logs: Sequence[Mapping[str, Any]], name: str, threshold: float = 0.1) -> CheckResult:
    """Has the gap between right answers and right certificates widened while training?

    logs: the trainer's log entries in order. name: the gap there, such as "lis/all/gap". value: the mean of the last
    third of the entries minus that of the first, with Welch's interval over entries; threshold 0.1. details: both
    means. n counts entries, each a mean over many completions, so that entries that are all alike leave a point.
    Not run under 9 entries.
    """
    values = _series(logs, name)
    if len(values) < LEAST:
        return not_run("gap_rise", f"{len(values)} log entries with {name!r}, {LEAST} are needed", len(values))
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    value, low, high = difference_of_means(last, first)
    verdict = judge((low, high), threshold, high_is_good=False)
    return CheckResult(
        "gap_rise", value, (low, high), len(values), threshold, verdict, {"start": fmean(first), "end": fmean(last)}
    )


def followed(logs: Sequence[Mapping[str, Any]], task: str, threshold: float = 0.0) -> CheckResult:
    """At the end of training, is a heuristic followed more often than the truth where the two differ?

    logs: the trainer's log entries in order, with what `Monitored` logs as "<task>/follows/<heuristic>": of the samples
    on which this heuristic is not optimal, the share that state its ids minus the share that state an optimum. value:
    its mean over the last third of the entries, with Student's interval over entries, of the heuristic with the worst
    verdict, of several the one where it is largest; threshold 0. details: each heuristic at the start and at the end. n
    counts entries, as in `gap_rise`. Not run under 9 entries of every heuristic.
    """
    start = f"{task}/{FOLLOWS}/"
    names = sorted({name for log in logs for name in log if name.startswith(start)})
    series = {name.removeprefix(start): values for name in names if len(values := _series(logs, name)) >= LEAST}
    if not series:
        return not_run("followed", f"no heuristic has {LEAST} log entries under {start!r}", len(logs))
    table = {}
    for name, values in series.items():
        third = len(values) // 3
        value, low, high = mean_interval(values[-third:])
        table[name] = {"start": fmean(values[:third]), "end": value, "ci": (low, high), "entries": len(values)}
    verdicts = {name: judge(found["ci"], threshold, high_is_good=False) for name, found in table.items()}
    worst = max(table, key=lambda name: (severity(verdicts[name]), table[name]["end"]))
    found, verdict = table[worst], verdicts[worst]
    details = {"heuristic": worst, "heuristics": table}
    return CheckResult("followed", found["end"], found["ci"], found["entries"], threshold, verdict, details)


def _series(logs: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(log[name]) for log in logs if isinstance(log.get(name), (int, float))]
