"""The audit of a verifier: right answers it must pay, near misses and hostile strings it must not."""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from ..errors import RlError
from ..guard import Guarded
from ..statistics import wilson_interval
from ..tasks.base import CertificateTask, Instance
from ..tasks.splits import stream
from .before import Scale, numbers, pay_of
from .reading import states_rows
from .result import CheckResult

_ANSWER = re.compile(r"\\answer\{[^{}]*\}")
SLOW_MS = 100.0

HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "refusal": "I cannot solve this.",
    "nul": "\x00" * 50,
    "unicode_digits": "\\ids{\u0661,\u0662,\u0663} \\answer{\u0663}",
    "long": "step " * 15_000,
    "braces": "{" * 5_000 + "}" * 5_000,
    "openers": "\\ids{" * 5_000,
    "nested_blocks": "\\ids{\\ids{1,2}} \\answer{\\answer{2}}",
    "tower": "\\boxed{9^{9^{9^{9}}}} \\answer{9^{9^{9^{9}}}}",
    "factorial": "\\boxed{(10^8)!}",
    "huge_number": "\\ids{1} \\answer{" + "9" * 4_000 + "}",
    "nan": "\\ids{nan} \\answer{nan}",
    "infinity": "\\ids{1} \\answer{inf}",
    "negative": "\\ids{-1} \\answer{-1}",
    "code": "\\ids{__import__('os').getpid()} \\answer{__import__('os').getpid()}",
    "format_string": "\\ids{{0}} \\answer{%d}",
    "empty_blocks": "\\ids{} \\answer{}",
    "surrogate": "\\ids{\ud800} \\answer{\ud800}",
}
"""Texts that no reward should pay on any instance, by name. They hold no valid answer."""


def verifier(
    reward: Callable[..., Any],
    task: CertificateTask,
    n: Sequence[int] = (5, 12),
    size: int = 40,
    item_timeout_s: float = 2.0,
    guard: bool = True,
    seed: int = 0,
) -> CheckResult:
    """Does a reward function pay what the task's own check calls right, and nothing else?

    For each of `size` test instances: the worked solution must be paid; near misses, labelled by `task.check`
    and never by hand, must not (every heuristic's answer that is not optimal, also under the right count; a
    row less, a row more, one exchanged, all rows, ids out of range or repeated; the answer alone; blocks that
    disagree; a solution inside <think> that is taken back outside), nor must the hostile strings of
    `HOSTILE`. Paid: a reward at least half way from that of silence to that of a worked solution, by the median, which
    is 0.5 for rewards from 0 to 1. Permuted ids, a repeated block and the right rows under a wrong
    answer are reported and not judged, as rewards may differ on them. A reward on the answer alone fails
    here, and should.

    value: false positive share, threshold 0, with a Wilson interval over texts. Verdict: "fail" for any false
    positive or negative, any exception, crash or time out on any text, and for rewards that change between
    three calls; "warn" where the 99th percentile of the time for one text is over 100 ms; else "pass".
    details: both rates, per kind of text how many were paid, failures, latency.

    guard: run it in child processes (`Guarded`), so that a text can hang or crash it without ending this
    process. Raises RlError for a reward that cannot be pickled; give guard=False to run it here.
    """
    instances = task.instances(size, tuple(n), seed, "test")
    cases: list[Case] = []
    for place, one in enumerate(instances):
        cases += near_misses(task, one, stream("audit", seed, place))
    cases += [(f"hostile/{name}", instances[0], text, False) for name, text in HOSTILE.items()]
    return audit(reward, cases, partial(_task_pay, task), item_timeout_s, guard)


Case = tuple[str, Any, str, bool | None]


def _task_pay(task: CertificateTask, runner: Callable[..., Any], cases: Sequence[Case]) -> list[Any]:
    return pay_of(runner, task, [case[1] for case in cases], [case[2] for case in cases])


def audit(
    reward: Callable[..., Any], cases: list[Case], pay: Callable[..., list[Any]], item_timeout_s: float, guard: bool
) -> CheckResult:
    """The verdict on cases (kind, subject, text, must be paid); `pay(reward, cases)` calls the reward on some."""
    runner = reward if isinstance(reward, Guarded) or not guard else Guarded(reward, item_timeout_s, 120.0)
    try:
        first, failures = _pay(runner, pay, cases)
        again = [_pay(runner, pay, cases)[0] for _ in range(2)]
        latency = _latency(runner, pay, cases[:100])
    finally:
        if isinstance(runner, Guarded) and runner is not reward:
            runner.close()
    unstable = sum(len({repr(value) for value in values}) > 1 for values in zip(first, *again, strict=True))
    return _verdict(cases, first, failures, unstable, latency)


def near_misses(task: CertificateTask, one: Instance, rng: Any) -> list[Case]:
    """(kind, instance, text, must be paid: True, False or None for not judged) around the solution of `one`."""
    gold = task.solution(one)
    worked = task.completion(one)
    cases: list[Case] = [
        ("gold", one, worked, True),
        ("answer alone", one, f"\\answer{{{gold.value}}}", False),
        ("taken back", one, f"<think>{worked}</think> I give up.", False),
        ("prompt repeated", one, task.prompt(one), False),
        ("repeated block", one, f"{worked}\n{worked}", None),
        ("right certificate, wrong answer", one, _ANSWER.sub(_answer(gold.value + 1), worked), None),
    ]
    for name, rule in task.heuristics.items():
        ids = rule(one)
        if task.check(one, ids).optimal:
            continue
        text = task.write(one, ids)
        if task.mark(one, text).check is None:  # the rule gave up
            continue
        cases.append((f"heuristic {name}", one, text, False))
        cases.append((f"heuristic {name}, right answer", one, _ANSWER.sub(_answer(gold.value), text), False))
        cases.append(("blocks that disagree, gold first", one, f"{worked}\n{text}", False))
        cases.append(("blocks that disagree, gold last", one, f"{text}\n{worked}", False))
    return cases + (_row_misses(task, one, rng) if states_rows(task, one) else [])


def _row_misses(task: CertificateTask, one: Instance, rng: Any) -> list[Case]:
    """Near misses of certificates that are lists of row ids."""
    gold = task.solution(one)
    ids = list(gold.certificate)
    others = [i for i in range(1, one.n + 1) if i not in ids]
    changed: dict[str, list[int]] = {
        "a row less": ids[:-1],
        "all rows": list(range(1, one.n + 1)),
        "the right number of wrong rows": sorted(rng.sample(range(1, one.n + 1), len(ids))),
    }
    if others:
        extra, lost = rng.choice(others), rng.choice(ids)
        changed["a row more"] = sorted([*ids, extra])
        changed["a row exchanged"] = sorted([*(i for i in ids if i != lost), extra])
    cases: list[Case] = []
    for kind, rows in changed.items():
        if not rows or task.check(one, rows).optimal:
            continue
        cases.append((kind, one, _form(rows, gold.value), False))
        cases.append((f"{kind}, its own answer", one, task.write(one, rows), False))
    cases += [
        ("out of range", one, _form([*ids[:-1], one.n + 7], gold.value), False),
        ("row 0", one, _form([0, *ids[1:]], gold.value), False),
        ("repeated ids", one, _form([*ids, ids[0]], gold.value), False),
        ("no rows", one, f"\\ids{{}} \\answer{{{gold.value}}}", False),
        ("permuted ids", one, _form(ids[::-1], gold.value), None),
    ]
    return cases


def _answer(value: int) -> str:
    return f"\\\\answer{{{value}}}"


def _form(ids: Sequence[int], answer: int) -> str:
    return f"\\ids{{{','.join(map(str, ids))}}} \\answer{{{answer}}}"


def _pay(
    runner: Callable[..., Any], pay: Callable[..., list[Any]], cases: list[Case]
) -> tuple[list[Any], dict[str, int]]:
    """Rewards, and how many texts failed by kind of failure."""
    if isinstance(runner, Guarded):
        before = dict(runner.counts)
        paid = pay(runner, cases)
        failed = {what: count - before.get(what, 0) for what, count in runner.counts.items() if what != "scored"}
        return paid, {what: count for what, count in failed.items() if count}
    paid, failures = [], {}
    for case in cases:
        try:
            paid += pay(runner, [case])
        except RlError:
            raise
        except Exception:
            failures["exception"] = failures.get("exception", 0) + 1
            paid.append(None)
    return paid, failures


def _latency(runner: Callable[..., Any], pay: Callable[..., list[Any]], cases: list[Case]) -> dict[str, float]:
    """Milliseconds of one text at a time."""
    times = []
    for case in cases:
        start = time.perf_counter()
        _pay(runner, pay, [case])
        times.append(1000 * (time.perf_counter() - start))
    return {"median_ms": median(times), "p99_ms": sorted(times)[int(0.99 * (len(times) - 1))]}


def _verdict(cases: list[Case], paid: list[Any], failures: Any, unstable: int, latency: Any) -> CheckResult:
    silence = numbers([value for case, value in zip(cases, paid, strict=True) if case[0] == "hostile/empty"])
    scale = Scale.of(silence, numbers([value for case, value in zip(cases, paid, strict=True) if case[3]]))
    kinds: dict[str, dict[str, Any]] = {}
    rates = {True: [0, 0], False: [0, 0]}  # judged wrongly, judged
    for (kind, _, _, must), value in zip(cases, paid, strict=True):
        pays = value is not None and float(value) >= scale.half
        entry = kinds.setdefault(kind, {"must_pay": must, "texts": 0, "paid": 0})
        entry["texts"] += 1
        entry["paid"] += int(pays)
        if must is not None:
            rates[must][0] += int(pays != must)
            rates[must][1] += 1
    (missed, golds), (wrongly, bads) = rates[True], rates[False]
    details = {
        "false_positive": {"value": wrongly / bads, "ci": wilson_interval(wrongly, bads), "n": bads},
        "false_negative": {"value": missed / golds, "ci": wilson_interval(missed, golds), "n": golds},
        "failures": failures,
        "unstable": unstable,
        "latency": latency,
        "paid_from": scale.half,
        "kinds": kinds,
    }
    slow = "warn" if latency["p99_ms"] > SLOW_MS else "pass"
    verdict = "fail" if wrongly or missed or failures or unstable else slow
    return CheckResult("verifier", wrongly / bads, wilson_interval(wrongly, bads), bads, 0.0, verdict, details)
