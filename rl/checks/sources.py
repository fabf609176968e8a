"""Whose answers are these: the solver's, some heuristic's, or nobody's that we know."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..statistics import alike_interval, wilson_interval
from ..tasks.base import CertificateTask, Instance, Mark
from .reading import clusters, rate, read, stated, unordered
from .result import CheckResult, judge, not_run, severity

OTHER_LIKELIHOOD = 1e-3  # what an unknown source gives to any one answer
LEAST_TRUTH = 1e-2  # the likelihood of one optimum of many under "some optimum", bounded well above the former
ROUNDS = 300
RESAMPLES = 400


def attribution(
    task: CertificateTask, instances: Sequence[Any], answers: Sequence[Any], threshold: float = 0.5
) -> CheckResult:
    """The share of answers that come from the truth, from each known heuristic, and from elsewhere.

    A mixture over {truth, heuristics, other} is fitted to the stated ids by expectation-maximisation. An
    answer's likelihood is 1 under a heuristic that gives just these ids (as a set), 1 / (number of optima)
    under the truth if the ids are optimal, 0.001 under "other", and unreadable answers are "other". Ids are
    used and not counts, since small counts coincide by chance. Heuristics that give an optimum on every
    instance here cannot be told from the truth: they are counted as truth and named in details["merged"].

    value: the truth's weight; threshold 0.5. Intervals are by bootstrap over instances. Departure from the
    plain verdict: "fail" also where all heuristics together surely weigh more than the truth.
    details: weights (share by name: truth, each heuristic, other), intervals, and `disagreement`: for each
    heuristic, on the instances where it is not optimal, the shares that follow the truth, the heuristic or
    neither, with Wilson intervals, and `chance`, how often the answers equal the heuristic's ids of another
    instance of the same size. instances and answers: see `krontune.rl.checks.reading.read`.
    """
    read_instances, marks = read(task, instances, answers)
    groups = clusters(task, read_instances)
    merged, rules = _rules(task, read_instances)
    likelihood = _likelihood(marks, rules)  # (N, models)
    names = ["truth", *rules, "other"]
    kinds, kind = np.unique(likelihood, axis=0, return_inverse=True)  # (P, models), (N,)
    counts = np.zeros((max(groups) + 1, len(kinds)))  # (instances, P)
    np.add.at(counts, (np.asarray(groups), kind.reshape(-1)), 1.0)
    weights = mixture(kinds, counts.sum(axis=0, keepdims=True))[0]  # (models,)
    size = len(counts)
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    drawn = mixture(kinds, draws @ counts)  # (resamples, models)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    shares = {name: float(weight) for name, weight in zip(names, weights, strict=True)}
    shares.update(dict.fromkeys(merged, 0.0))
    interval = (float(low[0]), float(high[0]))
    least = 0.5 / size  # resamples whose shares differ by less have not varied, up to the rounding of the mixture
    if interval[1] - interval[0] < least:  # the bootstrap of what never varied is a point
        interval = wilson_interval(round(shares["truth"] * size), size)
    verdict = judge(interval, threshold)
    ahead = drawn[:, 0] - drawn[:, 1:-1].sum(axis=1)  # (resamples,)
    most = float(np.quantile(ahead, 0.975))
    if np.ptp(ahead) < least:
        most = alike_interval(float(np.clip(ahead[0], -1.0, 1.0)), size)[1]
    if most < 0:
        verdict = "fail"
    details = {
        "weights": shares,
        "intervals": {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)},
        "merged": merged,
        "answers": len(marks),
        "disagreement": _disagreement(marks, read_instances, rules, groups),
    }
    return CheckResult("attribution", shares["truth"], interval, size, threshold, verdict, details)


def heuristic_agreement(task: CertificateTask, instances: Sequence[Any], answers: Sequence[Any]) -> CheckResult:
    """How much more often answers follow a heuristic than the truth, where the two differ; the worst heuristic.

    value: the share following it minus the share following the truth, on the instances where it is not optimal;
    threshold 0. The interval is that heuristic's own, over instances. The worst is the one with the worst verdict, of
    several the one with the largest value, so that a heuristic that differs on few instances hides no other. Cheap
    enough for every step of training. Not run where every heuristic is optimal on all instances.
    """
    read_instances, marks = read(task, instances, answers)
    groups = clusters(task, read_instances)
    rules = _rules(task, read_instances)[1]
    measured = {}
    for name, ids in rules.items():
        places = [i for i, mark in enumerate(marks) if not ids[i][1]]
        score = [float(stated(marks[i]) == ids[i][0]) - float(marks[i].certificate_right) for i in places]
        measured[name] = rate(score, [groups[i] for i in places], -1.0)
    if not measured:
        return not_run("heuristic_agreement", "every heuristic is optimal on these instances", len(set(groups)))
    verdicts = {name: judge(found["ci"], 0.0, high_is_good=False) for name, found in measured.items()}
    name = max(measured, key=lambda name: (severity(verdicts[name]), measured[name]["value"]))
    found, verdict = measured[name], verdicts[name]
    table = _disagreement(marks, read_instances, rules, groups)
    details = {"heuristic": name, "disagreement": table}
    return CheckResult("heuristic_agreement", found["value"], found["ci"], found["n"], 0.0, verdict, details)


def mixture(kinds: np.ndarray, counts: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """Mixture weights by expectation-maximisation, several data sets at once.

    kinds: (P, M), likelihood of each kind of answer under each model. counts: (B, P), how often each kind
    occurs in each data set. Returns (B, M), rows sum to 1. Starts at equal weights, which keeps models that
    explain the same answers at equal shares.
    """
    total = counts.sum(axis=1, keepdims=True)
    weights = np.full((len(counts), kinds.shape[1]), 1 / kinds.shape[1])  # (B, M)
    for _ in range(rounds):
        evidence = weights @ kinds.T  # (B, P)
        new = weights * ((counts / np.maximum(evidence, 1e-300)) @ kinds) / total
        if np.abs(new - weights).max() < 1e-7:
            return new
        weights = new
    return weights


def _rules(task: CertificateTask, instances: list[Instance]) -> tuple[list[str], dict[str, list[tuple[Any, bool]]]]:
    """Heuristics that are optimal everywhere here, and for each other one its (ids, optimal) on every instance."""
    known: dict[tuple[str, str], tuple[Any, bool]] = {}
    keys = [task.key(instance) for instance in instances]
    merged, rules = [], {}
    for name, rule in task.heuristics.items():
        found = []
        for key, instance in zip(keys, instances, strict=True):
            if (name, key) not in known:
                ids = tuple(rule(instance))
                known[name, key] = (unordered(ids), task.check(instance, ids).optimal)
            found.append(known[name, key])
        if all(optimal for _, optimal in found):
            merged.append(name)
        else:
            rules[name] = found
    return merged, rules


def _optimal(mark: Mark) -> bool:
    return mark.check is not None and mark.check.optimal


def _likelihood(marks: list[Mark], rules: dict[str, list[tuple[Any, bool]]]) -> np.ndarray:
    """(N, 1 + heuristics + 1)."""
    table = np.zeros((len(marks), len(rules) + 2))
    table[:, -1] = OTHER_LIKELIHOOD
    for row, mark in enumerate(marks):
        if _optimal(mark):
            table[row, 0] = max(1 / mark.solution.n_optima, LEAST_TRUTH)
        for column, ids in enumerate(rules.values(), start=1):
            table[row, column] = float(stated(mark) == ids[row][0])
    return table


def _disagreement(marks: list[Mark], instances: list[Instance], rules: Any, groups: list[int]) -> dict[str, Any]:
    """Per heuristic: who is followed where it is not optimal."""
    table = {}
    for name, ids in rules.items():
        places = [i for i in range(len(marks)) if not ids[i][1]]
        own = [groups[i] for i in places]
        truth = [_optimal(marks[i]) for i in places]
        follows = [stated(marks[i]) == ids[i][0] for i in places]
        neither = [not (a or b) for a, b in zip(truth, follows, strict=True)]
        shares = {"truth": truth, "heuristic": follows, "neither": neither}
        table[name] = {what: rate(flags, own) for what, flags in shares.items()}
        table[name]["chance"] = _chance(marks, instances, ids, places)
    return table


def _chance(marks: list[Mark], instances: list[Instance], ids: Any, places: list[int]) -> float:
    """How often answers equal the heuristic's ids of the next different instance of the same size."""
    by_size: dict[int, list[int]] = {}
    for i in places:
        by_size.setdefault(instances[i].n, []).append(i)
    hits = total = 0
    for same in by_size.values():
        for here, there in zip(same, same[len(same) // 2 :] + same[: len(same) // 2], strict=True):
            if instances[here] != instances[there]:
                total += 1
                hits += stated(marks[here]) == ids[there][0]
    return hits / total if total else 0.0
