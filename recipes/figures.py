"""Numbers and words of the reports, the same on the terminal, on the page and on the card."""

from collections.abc import Iterable, Mapping
from typing import Any

from .names import TRAINED, parts

# What each check asks, in one line.
ASKS = {
    "soundness": "Does the task keep its own promises: unique optima, disjoint splits, symmetries that hold?",
    "verifier": "Does the reward pay every right answer, and no near miss or hostile text?",
    "heuristics": "What does the best shortcut or lazy policy earn?",
    "shortcut_ceiling": "How often does the look of the input alone give the right answer?",
    "headroom": "How many groups of samples would all score alike, so that nothing is learned?",
    "contamination": "Do test questions come back from the model word for word, more than fresh ones?",
    "first_batch": "Did the first batch earn anything?",
    "collapse": "Have entropy or length collapsed, are the groups dead or the completions cut?",
    "divergence": "Did the reward rise while the strict measure did not?",
    "gap_rise": "Has the gap between right answers and right certificates widened?",
    "followed": "At the end, is a heuristic followed more often than the truth where it is wrong?",
    "verifier_health": "How many completions could not be scored?",
    "triplet": "How many right answers does no certificate back?",
    "attribution": "What share of the answers comes from solving, and not from a known heuristic?",
    "heuristic_agreement": "Where a heuristic is wrong, is it followed more often than the truth?",
    "feature_probe": "Can the errors be foretold from the input?",
    "process_claims": "Is the answer right although the work it shows is false?",
    "base_vs_tuned": "Is it better than the model it came from, on the same instances?",
    "spurious_controls": "What of the gain is left over the best control run?",
    "symmetry": "Does the answer follow when the instance is mirrored, shifted or renumbered?",
    "size_ladder": "How far above the best heuristic is it on the largest instances?",
    "discriminating": "How often is it right where every heuristic is wrong?",
    "early_answering": "How much does the reasoning add to answering at once?",
    "self_explanation": "Does the answer hang on the rows that it names?",
}


# Of the scores of a model or heuristic: key and heading. Solution: the probability that sampling writes the worked one.
COLUMNS = {
    "answer": "answer",
    "certificate": "certificate",
    "gap": "gap",
    "parse_failure": "unreadable",
    "solution": "solution",
}


def cells(scores: Mapping[str, Any], columns: Iterable[str] = tuple(COLUMNS)) -> list[str]:
    """Each column with its interval; nothing where it was not measured."""
    return [rate(scores[key]) if key in scores else "" for key in columns]


def storage(base: Mapping[str, Any]) -> str | None:
    """How a recipe's base is stored, in words; None as published."""
    mixed = base.get("precision")
    if not mixed:
        return base["quantization"]
    *more, last = (str(level) for level in sorted(mixed["levels"], reverse=True))
    return f"mixed precision, {', '.join(more)} and {last} bits, at most {mixed['avg_bits']:g} on average"


def model_name(name: str) -> str:
    """base, sft, sft-random, rl... in words."""
    found = parts(name)
    words = f"after {found.stage}" if found.kind in TRAINED else {"base": "base model"}.get(name, name)
    return words + (f" on the {found.control} control" if found.control else "")


def check_name(one: Mapping[str, Any]) -> str:
    """The check's name in words, with the models where it compares two."""
    name = one["name"].replace("_", " ")
    pair = one["details"].get("models")
    return f"{name}: {pair[0]} to {pair[1]}" if pair else name


def number(value: float | None, ci: Any = None) -> str:
    """0.54 [0.47, 0.60]; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")


def rate(one: Mapping[str, float]) -> str:
    """The same of a {"value", "low", "high"}."""
    return number(one["value"], (one["low"], one["high"]))


def heuristic_name(name: str) -> str:
    return f"heuristic: {name.replace('_', ' ')}"
