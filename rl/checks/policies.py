"""Scripted policies: answers whose nature is known, to see what the checks make of them."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import RlError
from ..tasks.base import CertificateTask, Instance
from ..tasks.splits import stream
from .reading import Policy, states_rows


def scripted_policies(task: CertificateTask, seed: int = 0) -> dict[str, Policy]:
    """Policies by name, each a function from instances to completions in the task's own form.

    perfect; noisy (70 % perfect, else random rows); each heuristic by its name; random (any rows); constant
    (always the same ids); formatter (the form, filled with every id); length_keyed (the first 0.45 n rows,
    whatever they hold); a task whose certificates are no lists of rows has only perfect and its heuristics.
    The same instance gets the same answer from a policy of the same seed.
    """
    policies: dict[str, Policy] = {
        "perfect": partial(_each, task, lambda one, rng: task.solution(one).certificate, seed),
        "noisy": mixture_policy(task, {"perfect": 0.7, "random": 0.3}, seed),
    }
    for name in task.heuristics:
        policies[name] = partial(_each, task, _rule(task, name), seed)
    if not states_rows(task, task.generate(0, 4)):
        del policies["noisy"]
        return policies
    for name, rule in (("random", _random), ("constant", _constant), ("formatter", _all), ("length_keyed", _keyed)):
        policies[name] = partial(_each, task, rule, seed)
    return policies


def mixture_policy(task: CertificateTask, shares: Mapping[str, float], seed: int = 0) -> Policy:
    """A policy that answers each instance by one of several rules, drawn with these shares.

    shares: "perfect", "random" or the name of a heuristic -> share; they sum to 1. Raises RlError otherwise.
    """
    rules: dict[str, Any] = {name: _rule(task, name) for name in task.heuristics}
    rules |= {"perfect": lambda one, rng: task.solution(one).certificate, "random": _random}
    if set(shares) - set(rules) or abs(sum(shares.values()) - 1) > 1e-9:
        raise RlError(f"shares of {', '.join(rules)} that sum to 1 are needed, got {dict(shares)}")

    def pick(one: Instance, rng: Any) -> Sequence[int]:
        return rules[rng.choices(list(shares), list(shares.values()))[0]](one, rng)

    return partial(_each, task, pick, seed)


def _each(task: CertificateTask, rule: Any, seed: int, instances: Sequence[Instance]) -> list[str]:
    seen: dict[str, int] = {}
    texts = []
    for one in instances:
        key = task.key(one)
        seen[key] = seen.get(key, -1) + 1  # samples of one instance differ
        texts.append(task.write(one, tuple(rule(one, stream("policy", seed, key, seen[key])))))
    return texts


def _rule(task: CertificateTask, name: str) -> Any:
    return lambda one, rng: task.heuristics[name](one)


def _random(one: Instance, rng: Any) -> Sequence[int]:
    return sorted(rng.sample(range(1, one.n + 1), rng.randint(1, one.n)))


def _constant(one: Instance, rng: Any) -> Sequence[int]:
    return tuple(range(1, min(4, one.n) + 1))


def _all(one: Instance, rng: Any) -> Sequence[int]:
    return tuple(range(1, one.n + 1))


def _keyed(one: Instance, rng: Any) -> Sequence[int]:
    return tuple(range(1, max(1, round(0.45 * one.n)) + 1))
