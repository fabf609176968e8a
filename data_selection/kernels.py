"""Which kernel counts and weighs n-grams: numba's where it is installed (`pip install krontune[fast]`), else numpy's.

The environment variable KRONTUNE_KERNEL, "numpy" or "numba", decides otherwise. Tokens and buckets are the same in
both; sums of log ratios differ by rounding, some 1e-16 of their size.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import compat, ngrams
from .ngrams import Scores
from .packing import Packed, pack, pack_arrow
from .texts import DataSelectionError

# Texts of one batch: strings, or a pyarrow.StringArray without nulls.
Texts: TypeAlias = Sequence[str] | Any


def count(texts: Texts, longest: int, buckets: int, totals: NDArray[np.int64], official: bool = False) -> None:
    """Add to `totals`, (buckets,), how often each bucket occurs in the texts. With `official`, n-grams and hash are
    those of `compat`."""
    if official:
        compat.count(_strings(texts), longest, buckets, totals)
    else:
        kernel().count(_packed(texts), longest, buckets, totals)


def score(texts: Texts, longest: int, buckets: int, table: NDArray[np.float64], official: bool = False) -> Scores:
    """Sum the rows of `table`, (buckets, targets), over the n-grams of each text."""
    if official:
        return compat.score(_strings(texts), longest, buckets, table)
    return kernel().score(_packed(texts), longest, buckets, table)


@cache
def kernel() -> ModuleType:
    """The module of the kernel, decided once a process.

    Raises:
        DataSelectionError: KRONTUNE_KERNEL is neither, or asks for a numba that is not installed.
    """
    wanted = os.environ.get("KRONTUNE_KERNEL") or ("numba" if find_spec("numba") else "numpy")
    if wanted == "numpy":
        return ngrams
    if wanted != "numba":
        raise DataSelectionError(f"KRONTUNE_KERNEL={wanted!r}: must be 'numpy' or 'numba'")
    try:
        return import_module(".ngrams_numba", __package__)
    except ImportError as error:
        raise DataSelectionError(f"KRONTUNE_KERNEL=numba: {error}; pip install 'krontune[fast]'") from error


def _packed(texts: Texts) -> Packed:
    return pack(texts) if isinstance(texts, (list, tuple)) else pack_arrow(texts)


def _strings(texts: Any) -> Sequence[str]:
    return texts if isinstance(texts, (list, tuple)) else texts.to_pylist()
