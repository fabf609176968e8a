"""Checks on instances the model was not trained on: mirrored ones, and larger ones."""

from collections.abc import Sequence
from typing import Any

from ..errors import RlError
from ..statistics import clustered_mean
from ..tasks.base import CertificateTask
from ..tasks.splits import stream
from .reading import Policy, clusters, mark, rate, read, result, unordered
from .result import CheckResult, judge, not_run

SELF_CONSISTENT = 0.1  # under it, answers to the unchanged instance agree so seldom that nothing can be compared


def symmetry(
    task: CertificateTask,
    instances: Sequence[Any],
    policy: Policy,
    names: Sequence[str] | None = None,
    share: float = 0.9,
    seed: int = 0,
) -> CheckResult:
    """Does the answer follow when the instance is changed in a way that provably keeps the solution?

    Each instance is put to the policy as it is, twice, and once for each symmetry of the task (or those in
    `names`). Consistent: the ids of the changed instance are the mapped ids of the original, as a set, or both
    are optimal (where optima are several). value: the consistent share under the symmetry where it is lowest.
    threshold: `share` times the control, which is how often the second answer to the unchanged instance agrees
    with the first, so that mere noise of sampling is not taken for a shortcut; where even that is under 0.1,
    the verdict is "warn", since such answers have nothing that could be consistent. details: `repeated` (the
    control), for each symmetry `consistent`, `accuracy` on its instances and `shortcut` (right on the
    original, wrong on its twin), and the accuracy on the originals.
    Source of the idea: Helff et al., arXiv 2604.15149; the control is ours.
    Not run for a task without symmetries. Raises RlError for names that the task does not have.
    """
    chosen = list(task.symmetries) if names is None else list(names)
    if unknown := sorted(set(chosen) - set(task.symmetries)):
        has = ", ".join(task.symmetries) or "none"
        raise RlError(f"unknown symmetries {', '.join(unknown)}; task {task.name!r} has {has}")
    if not chosen:
        return not_run("symmetry", f"task {task.name!r} names no symmetries", len(instances))
    originals, _ = read(task, instances, [None] * len(instances))
    twins, maps = [], []
    for name in chosen:
        for place, instance in enumerate(originals):
            twin, carry = task.symmetries[name](stream("symmetry", seed, name, place), instance)
            twins.append(twin)
            maps.append(carry)
    size = len(originals)
    asked = [*originals, *originals, *twins]
    _, both = read(task, asked, list(policy(asked)))
    marks = both[:size] + both[2 * size :]
    groups = clusters(task, originals)
    repeated = rate([_follows(both[i], both[size + i], tuple) for i in range(size)], groups)
    threshold = share * repeated["value"]
    right = [one.certificate_right for one in marks[:size]]
    table: dict[str, Any] = {}
    for number, name in enumerate(chosen):
        changed = marks[size * (number + 1) : size * (number + 2)]
        carried = maps[size * number : size * (number + 1)]
        same = [_follows(marks[i], changed[i], carried[i]) for i in range(size)]
        lost = [right[i] and not changed[i].certificate_right for i in range(size)]
        table[name] = {
            "consistent": rate(same, groups),
            "accuracy": rate([one.certificate_right for one in changed], groups),
            "shortcut": rate(lost, groups),
        }
    worst = min(table, key=lambda name: table[name]["consistent"]["value"])
    details = {"worst": worst, "symmetries": table, "accuracy": rate(right, groups), "repeated": repeated}
    measured = table[worst]["consistent"]
    verdict = judge(measured["ci"], threshold) if repeated["value"] >= SELF_CONSISTENT else "warn"
    return result("symmetry", measured, threshold, verdict, details)


def _follows(original: Any, changed: Any, carry: Any) -> bool:
    if original.certificate_right and changed.certificate_right:
        return True
    if original.parsed.ids is None or changed.parsed.ids is None:
        return False
    return unordered(carry(original.parsed.ids)) == unordered(changed.parsed.ids)


def size_ladder(
    task: CertificateTask,
    policy: Policy,
    sizes: Sequence[int] = (8, 16, 32, 64),
    per_size: int = 64,
    margin: float = 0.1,
    seed: int = 0,
) -> CheckResult:
    """Accuracy of the certificate as instances grow, beside the curves of the task's heuristics.

    `per_size` test instances of each size are put to the policy. Each heuristic's certificate accuracy is
    computed on the same instances; a heuristic that is optimal on all of them is the algorithm, not a
    shortcut, and is named in details["optimal"]. value: at the largest size, the accuracy minus the best
    heuristic's, paired over instances; threshold `margin`. details: the curves, and `nearest`, the heuristic
    whose curve is closest to the model's (mean distance over sizes): if it is close, it is the suspect.
    """
    instances = [one for size in sizes for one in task.instances(per_size, size, seed, "test")]
    _, marks = read(task, instances, list(policy(instances)))
    right = [one.certificate_right for one in marks]
    known = {
        name: [mark(task, one, rule(one)).certificate_right for one in instances]
        for name, rule in task.heuristics.items()
    }
    optimal = [name for name, flags in known.items() if all(flags)]
    known = {name: flags for name, flags in known.items() if name not in optimal}
    curves = {name: _curve(flags, per_size) for name, flags in known.items()}
    own = _curve(right, per_size)
    last = slice(len(instances) - per_size, None)
    best = max(known, key=lambda name: sum(known[name][last]), default=None)
    floor = known[best][last] if best else [False] * per_size
    difference = [float(a) - float(b) for a, b in zip(right[last], floor, strict=True)]
    value, low, high, n = clustered_mean(difference, range(per_size), lowest=-1.0)
    details = {
        "sizes": list(sizes),
        "accuracy": [rate(right[i : i + per_size], list(range(per_size))) for i in range(0, len(right), per_size)],
        "heuristics": curves,
        "optimal": optimal,
        "best_heuristic": best,
        "nearest": min(curves, key=lambda name: _distance(curves[name], own), default=None),
    }
    measured = {"value": value, "ci": (low, high), "n": n}
    return result("size_ladder", measured, margin, judge((low, high), margin), details)


def discriminating(
    task: CertificateTask,
    policy: Policy,
    n: Sequence[int] = (8, 16),
    size: int = 64,
    threshold: float = 0.1,
    seed: int = 0,
) -> CheckResult:
    """Accuracy of the certificate where every heuristic of the task is wrong.

    `size` test instances of n[0] to n[1] rows on which no heuristic is optimal are put to the policy. A policy
    made of these heuristics, in whatever mixture, is right on none of them. value: the share with a right
    certificate; threshold 0.1. Such instances are harder than others for an honest solver too, so compare
    with the accuracy of another model here and not with this model's elsewhere. Not run where n is too small
    for such instances to be found.
    """
    try:
        instances = task.instances(size, tuple(n), seed, "test", discriminating=True)
    except RlError as error:
        return not_run("discriminating", f"instances on which every heuristic is wrong are too rare: {error}")
    _, marks = read(task, instances, list(policy(instances)))
    measured = rate([one.certificate_right for one in marks], clusters(task, instances))
    details = {"n": list(n), "parse_failure": rate([not one.parsed.ok for one in marks], range(size))}
    return result("discriminating", measured, threshold, judge(measured["ci"], threshold), details)


def _curve(flags: Sequence[bool], per_size: int) -> list[float]:
    return [sum(flags[i : i + per_size]) / per_size for i in range(0, len(flags), per_size)]


def _distance(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first)
