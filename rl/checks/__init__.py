"""Checks that tell reasoning from shortcuts: before training, during it and after it.

Each check is a function that returns a `CheckResult`; nothing blends them into one score. Names are loaded on
first use. See docs/checks.md for what each one found on policies whose nature is known.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .before import contamination, headroom, heuristics, soundness
    from .controls import spurious_controls
    from .course import followed, gap_rise
    from .during import Monitored, collapse, divergence, triplet, verifier_health
    from .features import feature_probe, shortcut_ceiling
    from .instances import discriminating, size_ladder, symmetry
    from .near_misses import verifier
    from .policies import scripted_policies
    from .reasoning import early_answering, forced_answers, process_claims, self_explanation
    from .result import CheckResult, report, write_report
    from .sampling import base_vs_tuned, con_at_k, con_curve, pass_at_k, pass_curve
    from .sources import attribution, heuristic_agreement
    from .stop import Alarms
    from .svg import pictures

_HOME = {
    "attribution": ".sources",
    "heuristic_agreement": ".sources",
    "contamination": ".before",
    "headroom": ".before",
    "heuristics": ".before",
    "soundness": ".before",
    "spurious_controls": ".controls",
    "followed": ".course",
    "gap_rise": ".course",
    "Monitored": ".during",
    "collapse": ".during",
    "divergence": ".during",
    "triplet": ".during",
    "verifier_health": ".during",
    "feature_probe": ".features",
    "shortcut_ceiling": ".features",
    "discriminating": ".instances",
    "size_ladder": ".instances",
    "symmetry": ".instances",
    "pictures": ".svg",
    "scripted_policies": ".policies",
    "early_answering": ".reasoning",
    "forced_answers": ".reasoning",
    "process_claims": ".reasoning",
    "self_explanation": ".reasoning",
    "CheckResult": ".result",
    "report": ".result",
    "write_report": ".result",
    "base_vs_tuned": ".sampling",
    "con_at_k": ".sampling",
    "con_curve": ".sampling",
    "pass_at_k": ".sampling",
    "pass_curve": ".sampling",
    "Alarms": ".stop",
    "verifier": ".near_misses",
}

__all__ = [
    "Alarms",
    "CheckResult",
    "Monitored",
    "attribution",
    "base_vs_tuned",
    "collapse",
    "con_at_k",
    "con_curve",
    "contamination",
    "discriminating",
    "divergence",
    "early_answering",
    "feature_probe",
    "followed",
    "forced_answers",
    "gap_rise",
    "headroom",
    "heuristic_agreement",
    "heuristics",
    "pass_at_k",
    "pass_curve",
    "pictures",
    "process_claims",
    "report",
    "scripted_policies",
    "self_explanation",
    "shortcut_ceiling",
    "size_ladder",
    "soundness",
    "spurious_controls",
    "symmetry",
    "triplet",
    "verifier",
    "verifier_health",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
