"""Which data to train on.

`Dsir` weighs every text of a pool by how much likelier it is under a target than under the pool, and picks;
a `Selection` is what was picked, why, and the random control of equal size. `Chunks` cuts texts in equal parts.
`score_samples` scores a pool with a model and keeps a gradient vector of every sample in a `Store`; `AdaptInf` picks
from it, and prunes, cluster by cluster.

Names are imported when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapt_inf import AdaptInf
    from .chunks import Chunks
    from .dsir import Dsir
    from .pool_scoring import score_samples
    from .selection import Selection
    from .store import Store
    from .texts import DataSelectionError

__all__ = ["AdaptInf", "Chunks", "DataSelectionError", "Dsir", "Selection", "Store", "score_samples"]

_HOME = {
    "AdaptInf": ".adapt_inf",
    "Chunks": ".chunks",
    "DataSelectionError": ".texts",
    "Dsir": ".dsir",
    "Selection": ".selection",
    "Store": ".store",
    "score_samples": ".pool_scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
