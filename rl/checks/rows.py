"""Checks before training for rewards over rows of data, where no task knows the right answers and the near misses."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..errors import RlError
from ..guard import Guarded
from ..statistics import clustered_mean, wilson_interval
from .before import Scale, called, floor_verdict, numbers
from .near_misses import HOSTILE, Case, audit
from .result import CheckResult, not_run

Row = Mapping[str, Any]
Reward = Callable[..., Any]
FEW = 4  # prompts, among which "half of them" says nothing
LAZY = 5  # most frequent answers that are tried on every row


def rows_soundness(rows: Sequence[Row], right: Sequence[str]) -> CheckResult:
    """Do rows with the same prompt agree on the answer?

    right: a right completion for each row. value: the share of rows whose prompt has another answer elsewhere,
    with a Wilson interval; threshold 0, any such row fails. details: those prompts, and how many rows repeat one.
    """
    _same_length(rows, right)
    answers: dict[str, set[str]] = {}
    for row, text in zip(rows, right, strict=True):
        answers.setdefault(str(row["prompt"]), set()).add(text)
    torn = [prompt for prompt, found in answers.items() if len(found) > 1]
    bad = sum(str(row["prompt"]) in set(torn) for row in rows)
    details = {"contradictions": [prompt[:200] for prompt in torn[:5]], "repeated": len(rows) - len(answers)}
    verdict = "fail" if torn else "pass"
    ci = wilson_interval(bad, len(rows))
    return CheckResult("soundness", bad / len(rows), ci, len(rows), 0.0, verdict, details)


def rows_verifier(
    reward: Reward,
    rows: Sequence[Row],
    right: Sequence[str],
    size: int = 40,
    item_timeout_s: float = 2.0,
    guard: bool = True,
) -> CheckResult:
    """`verifier` for a reward over rows: what it pays of texts whose worth is known from the rows.

    right: a right completion for each row; the first `size` rows are used. Must be paid: those. Must not be: the
    right completion of another row, both together, half of one, the prompt, and the hostile strings of `HOSTILE`.
    A right completion inside <think> that is taken back is reported and not judged. Verdict and details as in
    `verifier`, but for one thing: a text on which a guarded reward crashes or hangs is not paid and harms nothing, so
    for a reward that is a `Guarded` such failures "warn".
    """
    _same_length(rows, right)
    some = list(zip(rows[:size], right[:size], strict=True))
    cases: list[Case] = []
    for place, (row, text) in enumerate(some):
        other = next((one for _, one in some[place + 1 :] + some[:place] if one != text), None)
        cases += [
            ("gold", row, text, True),
            ("half of it", row, text[: len(text) // 2], False),
            ("prompt repeated", row, _text(row["prompt"]), False),
            ("taken back", row, f"<think>{text}</think> I give up.", None),
        ]
        if other is not None:
            cases += [
                ("another row's answer", row, other, False),
                ("two answers, gold first", row, f"{text}\n{other}", False),
                ("two answers, gold last", row, f"{other}\n{text}", False),
            ]
    cases += [(f"hostile/{name}", rows[0], text, False) for name, text in HOSTILE.items()]
    found = audit(reward, cases, _pay_cases, item_timeout_s, guard)
    faulty = found.details["unstable"] or found.details["false_negative"]["value"] or found.value
    if isinstance(reward, Guarded) and found.details["failures"] and not faulty:
        return CheckResult(found.name, found.value, found.ci, found.n, found.threshold, "warn", found.details)
    return found


def rows_heuristics(
    reward: Reward, rows: Sequence[Row], right: Sequence[str], size: int = 256, threshold: float = 0.5
) -> CheckResult:
    """What the laziest policy earns: one that answers every prompt alike.

    Each of the five most frequent answers is given to the first `size` rows. value: the mean reward of the best, with
    an interval over rows, as a share of the way from silence to the right completions, as in `heuristics`. Verdict as
    there: "warn" above `threshold`, "fail" surely above 0.9.
    """
    _same_length(rows, right)
    some = list(rows[:size])

    def pay(texts: Sequence[str]) -> list[float]:
        return numbers(pay_rows(reward, some, texts))

    scale = Scale.of(pay([""] * len(some)), pay(right[:size]))
    table = {}
    for text, _ in Counter(right).most_common(LAZY):
        paid = pay([text] * len(some))
        value, low, high, _ = clustered_mean(scale.shares(paid), range(len(some)))
        table[text] = {"reward": fmean(paid), "share": value, "ci": (low, high)}
    best = max(table, key=lambda text: table[text]["share"])
    ci = table[best]["ci"]
    policies = {text[:200]: found for text, found in table.items()}
    details = {"best": best[:200], **scale.to_dict(), "policies": policies}
    verdict = floor_verdict(ci, threshold)
    return CheckResult("heuristics", table[best]["share"], ci, len(some), threshold, verdict, details)


def held_out_overlap(held_out: Sequence[str], trained: Iterable[str]) -> CheckResult:
    """The share of held-out prompts whose own lines stand, whole and in order, in a text that is trained on.

    A prompt's own lines are those that fewer than half of the held-out prompts have: its table, not the wording of the
    question. (Runs of words, as `contamination` compares them, are too short for that: most runs of a small table
    hold little but wording.) value: that share with a Wilson interval, threshold 0; any such prompt fails. details:
    examples, and how many `texts` were compared. trained: read once and never held.
    Not run without held-out prompts or without texts.
    """
    if not held_out:
        return not_run("contamination", "nothing is held out: the recipe has no verify stage")
    lines = Counter(line for prompt in held_out for line in set(prompt.splitlines()))
    common = {line for line, count in lines.items() if len(held_out) >= FEW and count >= len(held_out) / 2}
    own = [[line for line in prompt.splitlines() if line not in common] for prompt in held_out]
    by_first: dict[str, list[int]] = {}
    for place, part in enumerate(own):
        if part:
            by_first.setdefault(part[0], []).append(place)
    met: set[int] = set()
    texts = 0
    for text in trained:
        texts += 1
        read = [line for line in text.splitlines() if line not in common]
        for start, line in enumerate(read):
            met.update(
                i for i in by_first.get(line, ()) if i not in met and read[start : start + len(own[i])] == own[i]
            )
    if not texts:
        return not_run("contamination", "nothing is trained on", len(held_out))
    ci = wilson_interval(len(met), len(held_out))
    details = {"examples": [held_out[i][:300] for i in sorted(met)[:3]], "texts": texts}
    verdict = "fail" if met else "pass"
    return CheckResult("contamination", len(met) / len(held_out), ci, len(held_out), 0.0, verdict, details)


def pay_rows(reward: Reward, rows: Sequence[Row], texts: Sequence[str]) -> list[Any]:
    """The rewards of one text a row, called as TRL calls on these rows."""
    chat = isinstance(rows[0]["prompt"], list)
    said = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return called(reward, {"prompts": [row["prompt"] for row in rows], "completions": said, **columns}, len(texts))


def _pay_cases(reward: Reward, cases: Sequence[Case]) -> list[Any]:
    return pay_rows(reward, [case[1] for case in cases], [case[2] for case in cases])


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message.get("content")) for message in prompt)


def _same_length(rows: Sequence[Row], right: Sequence[str]) -> None:
    if not rows or len(rows) != len(right):
        raise RlError(f"one right completion a row is needed, got {len(right)} for {len(rows)} rows")
