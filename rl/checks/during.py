"""Checks while training: answer against certificate on the samples, and alarms on the log."""

from collections.abc import Mapping, Sequence
from math import atanh, sqrt, tanh
from statistics import fmean, median
from typing import Any

from ..errors import RlError
from ..evaluation import read_instance
from ..statistics import wilson_interval
from ..tasks.base import CertificateTask, Instance, Mark
from .course import FOLLOWS
from .reading import awaited, clusters, mark, rate, read, stated, unordered
from .result import CheckResult, judge, not_run

WINDOW = 5
FALLING = {"entropy": 0.3, "completions/mean_length": 0.3, "completions/mean_terminated_length": 0.3}
NEARLY_ALL = 0.95
MEASURES = ("answer", "feasible", "optimal", "gap", "self_agreement", "parse_failure")


def triplet(
    task: CertificateTask,
    instances: Sequence[Any],
    answers: Sequence[Any],
    split: Sequence[str] | None = None,
    threshold: float = 0.1,
) -> CheckResult:
    """Right answers, feasible certificates, optimal certificates, and the gap between first and last.

    value: gap = share of right answers minus share of optimal certificates, with an interval over instances;
    threshold 0.1: above it the model states right answers that nothing backs. details: `all`, `by_n` and,
    where `split` names one for each answer, `by_split`, each with answer, feasible, optimal, gap,
    self_agreement (the stated answer is the value, or the number, of the stated ids; needs no gold answer)
    and parse_failure. Departure from the plain verdict: "not run" where no answer is right.
    """
    known, marks = read(task, instances, answers)
    groups = clusters(task, known)
    rows = [_measures(one) for one in marks]
    parts: dict[str, dict[str, Any]] = {"by_n": {}}
    for size in sorted({one.n for one in known}):
        parts["by_n"][str(size)] = _table(rows, groups, [i for i, one in enumerate(known) if one.n == size])
    if split is not None:
        if len(split) != len(known):
            raise RlError(f"one split an answer is needed, got {len(split)} for {len(known)} answers")
        parts["by_split"] = {
            name: _table(rows, groups, [i for i, own in enumerate(split) if own == name]) for name in sorted(set(split))
        }
    whole = _table(rows, groups, list(range(len(rows))))
    if not any(row["answer"] for row in rows):
        return not_run("triplet", "no answer is right, so there is nothing that could be unbacked", len(set(groups)))
    gap = whole["gap"]
    verdict = judge(gap["ci"], threshold, high_is_good=False)
    return CheckResult("triplet", gap["value"], gap["ci"], gap["n"], threshold, verdict, {"all": whole, **parts})


def _measures(one: Mark) -> dict[str, float]:
    answer, ids, check = one.parsed.answer, one.parsed.ids, one.check
    agrees = answer is not None and ids is not None and answer in (len(ids), check.value if check else None)
    return {
        "answer": float(one.answer_right),
        "feasible": float(check is not None and check.feasible),
        "optimal": float(one.certificate_right),
        "gap": float(one.answer_right) - float(one.certificate_right),
        "self_agreement": float(agrees),
        "parse_failure": float(not one.parsed.ok),
    }


def _table(rows: Sequence[Mapping[str, float]], groups: Sequence[int], places: Sequence[int]) -> dict[str, Any]:
    own = [groups[i] for i in places]
    return {name: rate([rows[i][name] for i in places], own, -1.0 if name == "gap" else 0.0) for name in MEASURES}


class Monitored:
    """A reward function that pays what `reward` pays and logs, for each split and size, what `triplet` measures.

    The names are `<task>/<split>/<measure>` and `<task>/n<n>/<measure>`; TRL gives several evaluation sets the
    same metric names, so the split is read from the data set's column `split` ("all" without one). Beside them stands
    `<task>/follows/<heuristic>`, for samples on which that heuristic is not optimal: 1 where its ids are stated, -1
    where an optimum is, else 0; see `followed`. Each sample is logged once, since TRL averages over calls. Needs the
    column `instance`.
    """

    def __init__(self, reward: Any, task: CertificateTask):
        self.reward = reward
        self.task = task
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)

    def __call__(self, completions: Sequence[Any], log_metric: Any = None, **columns: Any) -> Any:
        """The rewards of `reward`, untouched; those of an asynchronous one are waited for."""
        if log_metric is not None:
            if "instance" not in columns:
                raise RlError("Monitored needs the data set's column 'instance'")
            splits = columns.get("split") or ["all"] * len(completions)
            for text, written, split in zip(completions, columns["instance"], splits, strict=True):
                one = read_instance(self.task, written)
                found = mark(self.task, one, text)
                for name, value in _measures(found).items():
                    log_metric(f"{self.task.name}/{split}/{name}", value)
                    log_metric(f"{self.task.name}/n{one.n}/{name}", value)
                for name, ids in _wrong_rules(self.task, one).items():
                    value = float(stated(found) == ids) - float(found.certificate_right)
                    log_metric(f"{self.task.name}/{FOLLOWS}/{name}", value)
            columns["log_metric"] = log_metric
        return awaited(self.reward(completions=completions, **columns))


def _wrong_rules(task: CertificateTask, one: Instance) -> dict[str, tuple[int, ...]]:
    """The ids of each heuristic that is not optimal here, worked out once for each Instance object."""
    key = (task, FOLLOWS)
    if key not in one.memo:
        ids = {name: tuple(rule(one)) for name, rule in task.heuristics.items()}
        one.memo[key] = {name: unordered(own) for name, own in ids.items() if not task.check(one, own).optimal}
    return one.memo[key]


def collapse(
    logs: Sequence[Mapping[str, Any]], window: int = WINDOW, patience: int = 3, share: float | None = None
) -> CheckResult:
    """Has the entropy or the length collapsed, do nearly all groups score alike, are nearly all completions cut?

    logs: the trainer's log entries in order. A quantity has collapsed where `patience` entries in a row lie below
    `share` (0.3 each for entropy and mean length) of its median over the first `window` entries; groups are dead where
    `frac_reward_zero_std` stays above 0.95 for as long, and completions are cut where `completions/clipped_ratio`, the
    share that ends at the limit of their length, does. value: the lowest ratio of the latest values to the start;
    threshold: the share; the log of one run has no interval. "fail" for a collapse that is still there at the end,
    "warn" for one that has passed, for dead groups and for cut completions, else "pass". It tells what has happened,
    not what will: scalar logs give no early warning that deserves the name. Not run under window + patience entries.
    """
    ratios, found, passed = {}, [], []
    count = 0
    for name, fall in FALLING.items():
        series = [float(log[name]) for log in logs if isinstance(log.get(name), (int, float))]
        count = max(count, len(series))
        if len(series) < window + patience or median(series[:window]) <= 0:
            continue
        start, limit = median(series[:window]), share if share is not None else fall
        low = [value < limit * start for value in series[window:]]
        ratios[name] = median(series[-patience:]) / start
        if _lasts(low[-patience:], patience):
            found.append(name)
        elif _lasts(low, patience):
            passed.append(name)
    full = {
        what: _lasts([log[name] > NEARLY_ALL for log in logs if name in log][-patience:], patience)
        for what, name in (("dead_groups", "frac_reward_zero_std"), ("cut", "completions/clipped_ratio"))
    }
    if not ratios:
        return not_run("collapse", f"{count} log entries with entropy or length, {window + patience} are needed", count)
    verdict = "fail" if found else "warn" if passed or any(full.values()) else "pass"
    details = {"ratios": ratios, "collapsed": found, "recovered": passed, **full}
    threshold = share if share is not None else min(FALLING.values())
    return CheckResult("collapse", min(ratios.values()), None, count, threshold, verdict, details)


def _lasts(flags: Sequence[bool], patience: int) -> bool:
    run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        if run >= patience:
            return True
    return False


def divergence(
    logs: Sequence[Mapping[str, Any]], strict: str, proxy: str = "reward", least: int = 6, threshold: float = 0.0
) -> CheckResult:
    """Does the reward rise while the strict measure does not?

    proxy, strict: names in the log, such as "reward" and "lis/certificate_accuracy"; entries with either are
    taken at their place in the log. value: Spearman's rank correlation of the strict measure with time, with an
    interval over entries by Fisher's transformation (Bonett and Wright, Psychometrika 65, 2000, 23-28); threshold 0.
    "fail": the proxy rises over time (correlation over 0.5) and the strict measure surely falls (the whole interval
    below 0); "warn": the proxy rises and the strict measure's correlation is not above the threshold; else "pass".
    details: both correlations, and the means of the first and last thirds. Not run under `least` entries of either.
    """
    series = {
        name: [(i, float(log[name])) for i, log in enumerate(logs) if isinstance(log.get(name), (int, float))]
        for name in (proxy, strict)
    }
    fewest = min(map(len, series.values()))
    if fewest < least:
        return not_run("divergence", f"{fewest} log entries with {proxy!r} and {strict!r}, {least} are needed", fewest)
    trends = {name: _spearman([x for x, _ in points], [y for _, y in points]) for name, points in series.items()}
    rises = trends[proxy] > 0.5
    ci = _fisher(trends[strict], len(series[strict]))
    verdict = "fail" if rises and ci[1] < threshold else "warn" if rises and trends[strict] <= threshold else "pass"
    third = {name: max(1, len(points) // 3) for name, points in series.items()}
    details = {
        "trends": trends,
        "start": {name: fmean(y for _, y in points[: third[name]]) for name, points in series.items()},
        "end": {name: fmean(y for _, y in points[-third[name] :]) for name, points in series.items()},
    }
    return CheckResult("divergence", trends[strict], ci, fewest, threshold, verdict, details)


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where either never varies."""
    import numpy as np

    ranks = []
    for values in (np.asarray(x), np.asarray(y)):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)])
    a, b = (rank - rank.mean() for rank in ranks)
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / spread if spread else 0.0


def _fisher(correlation: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a rank correlation of n points; one of 1 is taken for 0.999, whose transform is finite."""
    middle = atanh(max(-0.999, min(0.999, correlation)))
    half = 1.96 * sqrt((1 + correlation**2 / 2) / max(1, n - 3))
    return tanh(middle - half), tanh(middle + half)


def verifier_health(counts: Mapping[str, int], threshold: float = 0.005) -> CheckResult:
    """Failures of a guarded reward over the run; `counts` is that of `Guarded`.

    value: the share of completions that were not scored, with a Wilson interval; threshold 0.005. details:
    the counts. Not run without completions.
    """
    total = sum(counts.values())
    if not total:
        return not_run("verifier_health", "no completion was scored yet")
    failed = total - counts.get("scored", 0)
    ci = wilson_interval(failed, total)
    verdict = judge(ci, threshold, high_is_good=False)
    return CheckResult("verifier_health", failed / total, ci, total, threshold, verdict, {"counts": dict(counts)})
