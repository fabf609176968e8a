"""What can be foretold from the look of an instance: the shortcut ceiling, and the feature probe with its control."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import RlError
from ..statistics import bootstrap_interval, wilson_interval
from ..tasks.base import CertificateTask, Instance
from .reading import clusters, read
from .result import CheckResult, judge, not_run

TREES = 150
FEWEST = 40


def shortcut_ceiling(
    task: CertificateTask,
    n: Sequence[int] = (5, 16),
    train: int = 1200,
    test: int = 300,
    threshold: float = 0.5,
    seed: int = 0,
) -> CheckResult:
    """How well a random forest that runs no algorithm guesses the optimum from features of the input.

    It learns from `train` instances of the training split and is tested on `test` of the test split, both of
    n[0] to n[1] rows; once more trained on the smaller two thirds of the sizes and tested on the larger
    (details["length_shift"]). A model whose answer accuracy does not exceed `value` has shown nothing that
    the look of the input does not give. details["constant"]: the best constant for each n, learnt alike.
    Departure from the plain verdict: "warn" and never "fail" above `threshold`, since that speaks against a
    reward on the answer and not against the task. Needs scikit-learn.
    """
    low, high = n
    learn = task.instances(train, (low, high), seed, "train")
    ask = task.instances(test, (low, high), seed, "test")
    right = _guess(task, learn, ask)
    value = float(np.mean(right))
    ci = wilson_interval(int(sum(right)), len(right))
    details: dict[str, Any] = {"constant": float(np.mean(_constant(task, learn, ask))), "train": train, "test": test}
    cut = low + (2 * (high - low)) // 3
    if cut < high:
        small = [one for one in learn if one.n <= cut]
        large = [one for one in ask if one.n > cut]
        if small and large:
            shifted = _guess(task, small, large)
            interval = wilson_interval(int(sum(shifted)), len(shifted))
            details["length_shift"] = {"value": float(np.mean(shifted)), "ci": interval, "n": len(shifted), "cut": cut}
    verdict = "pass" if judge(ci, threshold, high_is_good=False) == "pass" else "warn"
    return CheckResult("shortcut_ceiling", value, ci, test, threshold, verdict, details)


def feature_probe(
    task: CertificateTask, instances: Sequence[Any], answers: Sequence[Any], threshold: float = 0.3, limit: int = 1500
) -> CheckResult:
    """Can the model's errors be foretold from the input? With the control that makes the question fair.

    A random forest predicts, by cross-validation over instances, three numbers: from `task.features` the
    stated answer and the true optimum (the control), and from them and what each heuristic of the task would
    answer the error, stated minus optimum. The published probe (arXiv 2510.27044, section 3.5 and appendix E)
    looks at the stated answer alone; but a perfect solver's answers are as predictable as the optimum is, see
    docs/probe.md.

    value: R2 of the error, 0 where there are none, 1 where it is always the same; threshold 0.3: above it a rule, and
    not noise, makes the errors. Right answers with wrong certificates have no errors: this check does not see them,
    `triplet` and `attribution` do. details: r2_answer, r2_truth (control), excess = r2_answer - r2_truth, error_rate.
    Unreadable answers are left out; at most `limit` answers are used, evenly spaced. Not run under 40 instances. Needs
    scikit-learn.
    """
    known, marks = read(task, instances, answers)
    kept = [i for i, mark in enumerate(marks) if mark.parsed.answer is not None]
    kept = [kept[i] for i in np.linspace(0, len(kept) - 1, min(limit, len(kept))).astype(int)] if kept else []
    groups = clusters(task, [known[i] for i in kept])
    size = len(set(groups))
    if size < FEWEST:
        return not_run("feature_probe", f"{size} instances with a readable answer, {FEWEST} are needed", size)
    stated = np.array([float(marks[i].parsed.answer or 0) for i in kept])  # (N,)
    stated = np.clip(stated, -1e6, 1e6)
    truth = np.array([float(marks[i].solution.value) for i in kept])  # (N,)
    x = _matrix(task, [known[i] for i in kept])  # (N, F)
    error = stated - truth
    r2_error, ci = _r2(np.hstack([x, _answers(task, [known[i] for i in kept])]), error, groups)
    if error[0] and np.ptp(error) == 0:
        r2_error, ci = 1.0, wilson_interval(size, size)
    r2_answer, r2_truth = _r2(x, stated, groups)[0], _r2(x, truth, groups)[0]
    details = {
        "r2_answer": r2_answer,
        "r2_truth": r2_truth,
        "excess": r2_answer - r2_truth,
        "error_rate": float((error != 0).mean()),
        "answers": len(kept),
    }
    verdict = judge(ci, threshold, high_is_good=False)
    return CheckResult("feature_probe", r2_error, ci, size, threshold, verdict, details)


def _answers(task: CertificateTask, instances: Sequence[Instance]) -> np.ndarray:
    """(N, heuristics): the value of each heuristic's ids, or their number where they are infeasible."""
    known: dict[str, list[float]] = {}
    for one in instances:
        if task.key(one) not in known:
            ids = [rule(one) for rule in task.heuristics.values()]
            found = [task.check(one, own) for own in ids]
            known[task.key(one)] = [
                float(c.value if c.feasible else len(own)) for c, own in zip(found, ids, strict=True)
            ]
    return np.array([known[task.key(one)] for one in instances])


def _matrix(task: CertificateTask, instances: Sequence[Instance]) -> np.ndarray:
    known: dict[str, list[float]] = {}
    for one in instances:
        if task.key(one) not in known:
            known[task.key(one)] = list(task.features(one).values())
    return np.array([known[task.key(one)] for one in instances])


def _guess(task: CertificateTask, learn: Sequence[Instance], ask: Sequence[Instance]) -> list[bool]:
    forest = _ensemble().RandomForestClassifier(TREES, min_samples_leaf=2, random_state=0)
    with warnings.catch_warnings():  # a value may be as rare as it likes
        warnings.filterwarnings("ignore", message="The number of unique classes")
        forest.fit(_matrix(task, learn), [task.solution(one).value for one in learn])
    guesses = forest.predict(_matrix(task, ask))
    return [bool(guess == task.solution(one).value) for guess, one in zip(guesses, ask, strict=True)]


def _constant(task: CertificateTask, learn: Sequence[Instance], ask: Sequence[Instance]) -> list[bool]:
    """Right or wrong of the most frequent optimum of each n."""
    seen: dict[int, list[int]] = {}
    for one in learn:
        seen.setdefault(one.n, []).append(task.solution(one).value)
    best = {size: max(set(values), key=values.count) for size, values in seen.items()}
    return [best.get(one.n) == task.solution(one).value for one in ask]


def _r2(x: np.ndarray, y: np.ndarray, groups: list[int]) -> tuple[float, tuple[float, float]]:
    """Cross-validated R2 and its interval by bootstrap over instances; 0 where y never varies."""
    if np.ptp(y) == 0:
        return 0.0, wilson_interval(0, max(groups) + 1)
    from sklearn.model_selection import GroupKFold

    guess = np.empty_like(y)
    for learn, ask in GroupKFold(5).split(x, y, groups):
        forest = _ensemble().RandomForestRegressor(TREES, min_samples_leaf=2, max_features="sqrt", random_state=42)
        guess[ask] = forest.fit(x[learn], y[learn]).predict(x[ask])
    count = max(groups) + 1
    columns = [np.bincount(groups, weights=w, minlength=count) for w in ((y - guess) ** 2, y, y**2, np.ones_like(y))]
    items = np.stack(columns, axis=1)  # (instances, 4)

    def r2(means: np.ndarray) -> np.ndarray:
        rest, first, second, weight = means.T
        spread = second - first**2 / weight
        varies = spread > 1e-9  # a resample without errors has nothing to foretell
        return np.where(varies, 1 - rest / np.where(varies, spread, 1.0), 0.0)

    low, high = bootstrap_interval(items, r2, resamples=1000)
    return float(r2(items.mean(axis=0, keepdims=True))[0]), (float(low), float(high))


def _ensemble() -> Any:
    try:
        from sklearn import ensemble
    except ImportError as error:
        raise RlError("this check needs scikit-learn: pip install scikit-learn") from error
    return ensemble
