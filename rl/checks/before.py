"""Checks before training: is the task sound, what do shortcuts earn, is there room to learn, is it leaked?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, median
from typing import Any

from ..errors import RlError
from ..statistics import clustered_mean, wilson_interval
from ..tasks.base import CertificateTask, Check, Instance
from ..tasks.splits import SPLITS, stream
from .policies import scripted_policies
from .reading import awaited, mark
from .result import CheckResult, judge, not_run, severity

Reward = Callable[..., Any]  # a sequence of numbers and None, or a coroutine of one
SHIFTED = 0.1  # two seeds that share more than this at one distance give the same stream
ALL_BUT_ALL = 0.9  # a shortcut that surely earns more than this earns what the solution earns


def soundness(task: CertificateTask, n: Sequence[int] = (5, 12), size: int = 100, seed: int = 0) -> CheckResult:
    """Does the task keep its own promises, on `size` instances of each split?

    Looked for: a solver's certificate that its own check refuses, an optimum that is not unique where the task
    promises one, a heuristic that beats the "optimum", a worked completion that does not mark as optimal, an
    instance that JSON changes, a symmetry that changes the optimum of its own certificate, repeated instances, a
    key in two splits, and a seed s + 1 that gives the instances of s over again, at one distance from their place (the
    leak found in reasoning-gym 0.1.25, where they share 499 of 500; that two seeds share some of a small space, in any
    order, is chance). value: the share of instances with a fault, threshold 0; any fault fails. details: the faults by
    name, how often and an example each.
    """
    low, high = n
    faults: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    count = faulty = 0
    for split in SPLITS:
        instances = task.instances(size, (low, high), seed, split)
        keys = [task.key(one) for one in instances]
        count += len(instances)
        neighbours = {task.key(one): i for i, one in enumerate(task.instances(size, (low, high), seed + 1, split))}
        leaked = _at_one_distance(keys, neighbours)
        for place, (key, one) in enumerate(zip(keys, instances, strict=True)):
            found = _faults_of(task, one, stream("soundness", seed, place))
            found += ["repeated instances"] * (keys.count(key) > 1)
            found += ["a key in two splits"] * (seen.get(key, split) != split)
            found += ["seeds s and s + 1 share instances"] * (key in leaked)
            faulty += bool(found)
            for name in found:
                faults.setdefault(name, []).append(key)
        seen.update(dict.fromkeys(keys, split))
    details = {"faults": {name: {"count": len(found), "example": found[0]} for name, found in faults.items()}}
    verdict = "fail" if faults else "pass"
    return CheckResult("soundness", faulty / count, wilson_interval(faulty, count), count, 0.0, verdict, details)


def _at_one_distance(keys: Sequence[str], others: Mapping[str, int]) -> set[str]:
    """The keys that stand as far from their place in `others` as many more do; by chance each is as far as it will."""
    away = {key: others[key] - place for place, key in enumerate(keys) if key in others}
    if not away:
        return set()
    [(distance, often)] = Counter(away.values()).most_common(1)
    return {key for key, own in away.items() if own == distance} if often > max(2, SHIFTED * len(keys)) else set()


def _faults_of(task: CertificateTask, one: Instance, rng: Any) -> list[str]:
    found = []
    gold = task.solve(one)
    checked = task.check(one, gold.certificate)
    if not (checked.feasible and checked.optimal and checked.value == gold.value):
        found.append("the check refuses the solver's certificate")
    if task.options().get("unique") and not gold.unique:
        found.append("an optimum that is not unique")
    worked = task.mark(one, task.completion(one))
    if not (worked.certificate_right and worked.answer_right):
        found.append("the worked completion is not marked as right")
    if task.instance_from_json(task.to_json(one)) != one:
        found.append("JSON changes the instance")
    if any(_beats(task.check(one, rule(one)), gold.value, task.fewest) for rule in task.heuristics.values()):
        found.append("a heuristic beats the optimum")
    for symmetry in task.symmetries.values():
        twin, carry = symmetry(rng, one)
        if not task.check(twin, carry(gold.certificate)).optimal:
            found.append("a symmetry does not keep the optimum")
    return found


def _beats(check: Check, optimum: int, fewest: bool) -> bool:
    return check.feasible and (check.value < optimum if fewest else check.value > optimum)


def heuristics(
    task: CertificateTask,
    reward: Reward | None = None,
    n: Sequence[int] = (5, 16),
    size: int = 256,
    threshold: float = 0.5,
    seed: int = 0,
) -> CheckResult:
    """What shortcuts and lazy policies earn: the floor that a trained model has to clear.

    Every scripted policy but the perfect ones answers `size` test instances and is paid by `reward` (the certificate
    reward if not given; yours is called as TRL calls it, with the columns of `task.dataset`). value: the mean reward of
    the best of them, with an interval over instances, on the scale on which silence earns 0 and the worked solution 1
    (`Scale`); heuristics that are optimal on all these instances are the algorithm, not a shortcut, and stand in
    details["optimal"] instead. Departure from the plain verdict: above `threshold` (0.5) it is "warn", as easy
    instances are no fault of the reward, and "fail" where the whole interval lies above 0.9: then a shortcut earns what
    the solution earns. details["policies"]: reward as paid and on that scale, answer and certificate accuracy of each;
    `silence` and `solution`: what these are paid. "patience_tails" of "lis" earns 1 from a reward on the answer and
    little from one on the certificate.
    """
    from ..rewards import CertificateReward

    instances = task.instances(size, tuple(n), seed, "test")
    paid = reward if reward is not None else CertificateReward(task)

    def pay(texts: Sequence[str]) -> list[float]:
        return numbers(pay_of(paid, task, instances, texts))

    scale = Scale.of(pay([""] * size), pay([task.completion(one) for one in instances]))
    table: dict[str, Any] = {}
    for name, policy in scripted_policies(task, seed).items():
        if name in ("perfect", "noisy"):
            continue
        texts = list(policy(instances))
        earned = pay(texts)
        marks = [mark(task, one, text) for one, text in zip(instances, texts, strict=True)]
        value, low, high, _ = clustered_mean(scale.shares(earned), range(size))
        table[name] = {
            "reward": fmean(earned),
            "share": value,
            "ci": (low, high),
            "answer": fmean(one.answer_right for one in marks),
            "certificate": fmean(one.certificate_right for one in marks),
        }
    optimal = [name for name in task.heuristics if table[name]["certificate"] == 1.0]
    best = max((name for name in table if name not in optimal), key=lambda name: table[name]["share"])
    details = {"best": best, "optimal": optimal, **scale.to_dict(), "policies": table}
    verdict = floor_verdict(table[best]["ci"], threshold)
    return CheckResult("heuristics", table[best]["share"], table[best]["ci"], size, threshold, verdict, details)


@dataclass(frozen=True)
class Scale:
    """What a reward pays for silence and for right completions, by the median; so 0/1, -1/1 and 0/10 are judged alike.

    Where right completions earn no more than silence there is no scale, and what is paid counts as it is.
    """

    silence: float = 0.0
    solution: float = 1.0

    @classmethod
    def of(cls, silence: Sequence[float], solution: Sequence[float]) -> "Scale":
        return cls(median(silence), median(solution))

    @property
    def half(self) -> float:
        """Half way from silence to a right completion."""
        return (self.silence + self.solution) / 2 if self.solution > self.silence else 0.5

    def shares(self, paid: Sequence[float]) -> list[float]:
        """Each reward as a share of the way from silence to a right completion."""
        if self.solution <= self.silence:
            return list(paid)
        return [(one - self.silence) / (self.solution - self.silence) for one in paid]

    def to_dict(self) -> dict[str, float]:
        """For the evidence."""
        return {"silence": self.silence, "solution": self.solution}


def numbers(paid: Sequence[Any]) -> list[float]:
    """Rewards as numbers; None, which TRL leaves out, as 0."""
    return [0.0 if value is None else float(value) for value in paid]


def floor_verdict(ci: tuple[float, float], threshold: float) -> str:
    """That of `heuristics` and `rows_heuristics`."""
    if ci[0] > ALL_BUT_ALL:
        return "fail"
    return "pass" if judge(ci, threshold, high_is_good=False) == "pass" else "warn"


def called(reward: Reward, columns: Mapping[str, Any], size: int) -> list[Any]:
    """What a reward, synchronous or not, pays for `size` completions. Raises RlError for another number of values."""
    found = list(awaited(reward(**columns)))
    if len(found) != size:
        raise RlError(f"the reward gave {len(found)} values for {size} completions")
    return found


def pay_of(reward: Reward, task: CertificateTask, instances: Sequence[Instance], texts: Sequence[str]) -> list[Any]:
    """The rewards of completions, called as TRL calls on chat rows of `task.dataset`."""
    columns = {
        "prompts": [[{"role": "user", "content": task.prompt(one)}] for one in instances],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion": [[{"role": "assistant", "content": task.completion(one)}] for one in instances],
        "instance": [task.to_json(one) for one in instances],
        "optimum": [task.solution(one).value for one in instances],
        "n": [one.n for one in instances],
    }
    return called(reward, columns, len(texts))


def headroom(right: Sequence[Sequence[Any]], group_size: int = 8, threshold: float = 0.8) -> CheckResult:
    """The share of groups in which all samples score alike, so that GRPO learns nothing from them.

    right: (N, n) of 0 and 1, n >= group_size samples of the untrained model for each of N instances. An
    instance with c right samples gives a dead group of G with chance (C(c, G) + C(n - c, G)) / C(n, G), which
    is unbiased. value: the mean over instances, threshold 0.8. details: `all_wrong`, `all_right` (the two
    parts) and `solvable` (instances with at least one right sample). Raises RlError for fewer samples than G.
    """
    if not right or any(len(row) < group_size for row in right):
        raise RlError(f"headroom needs instances with at least group_size={group_size} samples each")
    wrong, solved = [], []
    for row in right:
        n, c = len(row), sum(map(int, row))
        wrong.append(comb(n - c, group_size) / comb(n, group_size))
        solved.append(comb(c, group_size) / comb(n, group_size))
    dead = [a + b for a, b in zip(wrong, solved, strict=True)]
    value, low, high, size = clustered_mean(dead, range(len(dead)))
    solvable = fmean(any(row) for row in right)
    details = {"all_wrong": fmean(wrong), "all_right": fmean(solved), "solvable": solvable, "group_size": group_size}
    verdict = judge((low, high), threshold, high_is_good=False)
    return CheckResult("headroom", value, (low, high), size, threshold, verdict, details)


def contamination(
    texts: Sequence[str],
    train: Sequence[str] = (),
    complete: Callable[[list[str]], Sequence[str]] | None = None,
    fresh: Sequence[str] = (),
    words: int = 13,
    share: float = 0.6,
    threshold: float = 0.1,
) -> CheckResult:
    """Has the model met the evaluation texts before?

    With `complete` and `fresh`: the first `share` of each text is given to `complete` (greedy decoding), and
    it is counted how often the rest comes back word for word; the same is done with `fresh` texts of the same
    kind that cannot have been seen. value: the difference, threshold 0.1. (Wu et al., arXiv 2507.10532, find
    54.6 % of MATH-500 completed so by Qwen2.5-Math-7B and 3.8 % by Llama-3.1-8B.) With `train`: value is the
    share of texts with a run of `words` words in common with a text of `train`, less the runs that more than
    half of `train` or of the texts has (the wording of the question). Where both were asked for, the one with
    the worse verdict decides, of two alike the larger value; details has both, and `decided_by`.
    """
    if not texts:
        raise RlError("contamination needs at least one evaluation text")
    details: dict[str, Any] = {}
    measured: dict[str, tuple[float, tuple[float, float]]] = {}
    if train:
        common = _runs_of(train, words) & _runs_of(texts, words)
        flags = [bool(_runs(text, words) & common) for text in texts]
        value, low, high, _ = clustered_mean(list(map(float, flags)), range(len(flags)))
        measured["overlap"] = value, (low, high)
        details["overlap"] = {"value": value, "ci": (low, high), "words": words}
    if complete is not None and fresh:
        seen, unseen = (_completed(complete, list(some), share) for some in (texts, fresh))
        measured["completed"] = _difference(seen, unseen)
        details["completed"] = {"texts": fmean(seen), "fresh": fmean(unseen), "share_given": share}
    if not details:
        return not_run("contamination", "give train texts, or complete= and fresh= texts", len(texts))
    verdicts = {name: judge(ci, threshold, high_is_good=False) for name, (_, ci) in measured.items()}
    worst = max(measured, key=lambda name: (severity(verdicts[name]), measured[name][0]))
    value, ci = measured[worst]
    details["decided_by"] = worst
    return CheckResult("contamination", value, ci, len(texts), threshold, verdicts[worst], details)


def _runs(text: str, words: int) -> set[tuple[str, ...]]:
    tokens = text.lower().split()
    return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}


def _runs_of(texts: Sequence[str], words: int) -> set[tuple[str, ...]]:
    counts: dict[tuple[str, ...], int] = {}
    for text in texts:
        for run in _runs(text, words):
            counts[run] = counts.get(run, 0) + 1
    return {run for run, count in counts.items() if len(texts) < 4 or count <= len(texts) / 2}


def _completed(complete: Any, texts: list[str], share: float) -> list[float]:
    """1 for each text whose rest came back word for word."""
    cuts = [max(1, round(share * len(text.split(" ")))) for text in texts]
    heads = [" ".join(text.split(" ")[:cut]) for text, cut in zip(texts, cuts, strict=True)]
    rests = [text.split(" ")[cut:] for text, cut in zip(texts, cuts, strict=True)]
    said = complete(heads)
    return [float(bool(rest) and reply.split()[: len(" ".join(rest).split())] == " ".join(rest).split())
            for rest, reply in zip(rests, said, strict=True)]  # fmt: skip


def _difference(first: list[float], second: list[float]) -> tuple[float, tuple[float, float]]:
    """Difference of two independent rates with Newcombe's interval (Statistics in Medicine 17, 1998, method 10)."""
    a, b = fmean(first), fmean(second)
    low_a, high_a = wilson_interval(round(sum(first)), len(first))
    low_b, high_b = wilson_interval(round(sum(second)), len(second))
    down = ((a - low_a) ** 2 + (high_b - b) ** 2) ** 0.5
    up = ((high_a - a) ** 2 + (b - low_b) ** 2) ** 0.5
    return a - b, (a - b - down, a - b + up)
