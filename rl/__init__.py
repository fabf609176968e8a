"""How the model is rewarded: tasks that check a certificate, rewards for TRL trainers, and honest scoring.

Names are loaded on first use, so importing this room costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .credit import TokenCredit
    from .errors import RlError
    from .evaluation import Evaluation, Rate, heuristic_table, score
    from .heads import HeadSplit
    from .labelled_head import score_labelled_only
    from .likelihood import answer_probabilities
    from .mismatch import MismatchGuard
    from .rewards import CertificateReward, Guarded, MathReward
    from .rhythm import attention_rhythm, probe
    from .risk import Risk
    from .statistics import paired_difference, wilson_interval
    from .tasks import CertificateTask, get_task
    from .trainer import DenseRolloutGRPOTrainer, TokenCreditGRPOTrainer

_HOME = {
    "TokenCredit": ".credit",
    "RlError": ".errors",
    "Evaluation": ".evaluation",
    "Rate": ".evaluation",
    "heuristic_table": ".evaluation",
    "score": ".evaluation",
    "HeadSplit": ".heads",
    "score_labelled_only": ".labelled_head",
    "answer_probabilities": ".likelihood",
    "MismatchGuard": ".mismatch",
    "CertificateReward": ".rewards",
    "Guarded": ".rewards",
    "MathReward": ".rewards",
    "attention_rhythm": ".rhythm",
    "probe": ".rhythm",
    "Risk": ".risk",
    "paired_difference": ".statistics",
    "wilson_interval": ".statistics",
    "CertificateTask": ".tasks",
    "get_task": ".tasks",
    "DenseRolloutGRPOTrainer": ".trainer",
    "TokenCreditGRPOTrainer": ".trainer",
}

__all__ = [
    "CertificateReward",
    "CertificateTask",
    "DenseRolloutGRPOTrainer",
    "Evaluation",
    "Guarded",
    "HeadSplit",
    "MathReward",
    "MismatchGuard",
    "Rate",
    "Risk",
    "RlError",
    "TokenCredit",
    "TokenCreditGRPOTrainer",
    "answer_probabilities",
    "attention_rhythm",
    "get_task",
    "heuristic_table",
    "paired_difference",
    "probe",
    "score",
    "score_labelled_only",
    "wilson_interval",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
