"""DSIR: data selection by importance resampling (arXiv 2302.03169)."""

import io
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from .importance import Counts, Floats, fold, kl_reduction, log_ratios, normalised
from .ngrams import count_ngrams, iter_hashed
from .selection import (
    MAX_SEED,
    Selection,
    checked_int,
    gumbel_noise,
    read_checked,
    read_header,
    top_k,
    write_atomic,
)
from .texts import DataSelectionError, TextSource, read_texts, source_name

FORMAT = "krontune.dsir"
HEADER, COUNTS = "dsir.json", "counts.npz"
# KL reduction is measured on the paper's number of buckets, so that it can be compared with published ones.
KL_BUCKETS = 10_000


class Fit(NamedTuple):
    """What `Dsir.fit` counted."""

    target_counts: Counts  # (buckets,)
    raw_counts: Counts  # (buckets,)
    raw_documents: int
    target: str


@dataclass(eq=False)
class Dsir:
    """Weighs texts by how much likelier their n-grams are under a target than under a raw pool, and picks.

    With p and q the n-gram distributions over hash buckets of target and raw texts, a text x weighs

        log_weight(x) = sum over its n-grams b of log(p'_b / q_b),    p' = (1 - smoothing) p + smoothing q

    divided as `normalize` says. `smoothing` is the share of raw in p': near 0 the target's counts are taken
    as they are, near 1 all weights go to 0. A bucket that neither side has seen has ratio 1 and adds 0. A
    bucket that only the target has seen counts as half an n-gram of raw, so that the weight of any text
    scored later is finite.

    Departures from the paper and its package (1.0.3), each because it selects better on paragraphs of mixed
    lengths from 13 sources: 2**17 buckets instead of 10,000; interpolation instead of adding 1e-8 (with 50
    target texts precision 0.77 instead of 0.31); the mean over n-grams instead of the sum, which favours long
    texts. The hash is another one, which changes collisions alone. `Dsir(buckets=10_000, normalize="sum")` is
    the paper's but for smoothing, hash and byte-wise tokens.

    Args:
        ngrams: longest n-gram; 1 to 8. All shorter ones count too (paper: 2).
        buckets: hash buckets, 2 to 2**28. Fitting and scoring hold a few arrays of 8 bytes a bucket.
        smoothing: share of raw in p', between 0 and 1, both excluded.
        normalize: "mean" (per n-gram), "sum" (the paper's), or "sqrt" (sum over the root of the count).

    Raises:
        DataSelectionError: a value is out of range; the message names it.
    """

    ngrams: int = 2
    buckets: int = 2**17
    smoothing: float = 0.5
    normalize: Literal["mean", "sum", "sqrt"] = "mean"

    def __post_init__(self) -> None:
        self.ngrams = checked_int(self.ngrams, "ngrams", 1, 8, "the paper uses 2")
        self.buckets = checked_int(self.buckets, "buckets", 2, 2**28, "the default is 2**17")
        if not isinstance(self.smoothing, Real) or not 0 < self.smoothing < 1:
            raise DataSelectionError(
                f"smoothing={self.smoothing!r}: must lie between 0 and 1, both excluded; the default is 0.5"
            )
        self.smoothing = float(self.smoothing)
        if self.normalize not in ("mean", "sum", "sqrt"):
            raise DataSelectionError(f"normalize={self.normalize!r}: must be 'mean', 'sum' or 'sqrt'")
        self._fit: Fit | None = None

    def fit(self, *, target: TextSource, raw: TextSource) -> "Dsir":
        """Count the n-grams of both sides; each is read once. Returns itself.

        Args:
            target: texts like those that are wanted; see `texts.read_texts` for what can be given.
            raw: the pool, or a sample of it.

        Raises:
            DataSelectionError: a side cannot be read, or has no n-gram at all.
        """
        target_counts, _ = self._count(read_texts(target, "target"), "target")
        raw_counts, raw_documents = self._count(read_texts(raw, "raw"), "raw")
        self._fit = Fit(target_counts, raw_counts, raw_documents, source_name(target, "target"))
        return self

    def log_weights(self, raw: TextSource) -> Floats:
        """(N,) the log weight of every text, in nats (per n-gram with "mean"); -inf for one without n-grams.

        A text's weight does not depend on the texts around it, to the last bit.

        Raises:
            DataSelectionError: not fitted, or the texts cannot be read.
        """
        fit = self._fitted()
        table = log_ratios(fit.target_counts, fit.raw_counts, self.smoothing)  # (buckets,)
        parts = [np.empty(0)]
        for hashed in iter_hashed(read_texts(raw, "raw"), self.ngrams, self.buckets):
            ratios = table[hashed.buckets]  # (M,)
            sums = np.bincount(hashed.documents, weights=ratios, minlength=len(hashed.counts))  # (N,)
            parts.append(normalised(sums.astype(np.float64), hashed.counts, self.normalize))
        return np.concatenate(parts)

    def select(
        self,
        raw: TextSource,
        k: int,
        method: Literal["gumbel", "topk"] = "gumbel",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Selection:
        """Pick k texts of the pool `raw`.

        "topk" takes the highest log weights. "gumbel" draws without replacement, each next text with a
        probability proportional to exp(noise_scale * log_weight / temperature): as in the paper, the k
        highest of that exponent plus Gumbel noise. Of equal scores the earlier row is taken; a text
        without n-grams comes after all others.

        Temperature 1 is the paper's distribution for documents of one length, whatever `normalize` is:
        `noise_scale` turns a weight per n-gram into that of a document of average length. It is close to
        "topk", since the log weights of documents differ by tens of nats and the noise by one; a temperature
        of 10 or more samples. On 57,000 docstrings and code passages of 7 origins (all target texts known,
        mean precision at k = the number of right ones; top-k 0.675, uniform 0.079) temperatures 1, 3, 10, 30,
        100 give 0.675, 0.669, 0.603, 0.344, 0.132. Noise of the same size on bare means, whose standard
        deviation is 0.2, gives 0.110, practically uniform; on weights standardised to deviation 1, 0.374.

        Args:
            raw: the pool.
            k: how many texts, 1 to the size of the pool.
            method: "gumbel" or "topk".
            temperature: above 0 and at most 1e9, for "gumbel". Near 0 is "topk", above 1000 is uniform.
            seed: 0 to 2**64 - 1. The noise of row i depends on seed and i alone, not on batches or processes.

        Returns:
            The selection; its reasons are `log_weight` and `target` (the target's file names, or "target").

        Raises:
            DataSelectionError: not fitted, pool empty or not to be read, or an argument is out of range.
        """
        if method not in ("gumbel", "topk"):
            raise DataSelectionError(f"method={method!r}: must be 'gumbel' or 'topk'")
        if not isinstance(temperature, Real) or not 0 < temperature <= 1e9:
            raise DataSelectionError(f"temperature={temperature!r}: must be above 0 and at most 1e9")
        seed = checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
        fit = self._fitted()
        weights = self.log_weights(raw)
        if not len(weights):
            raise DataSelectionError("the pool is empty; there is nothing to select from")
        k = checked_int(k, "k", 1, len(weights), f"the pool has {len(weights)} texts")

        scores = weights
        if method == "gumbel":
            scores = weights * self.noise_scale + temperature * gumbel_noise(seed, len(weights))
        indices = top_k(scores, k)
        reasons = [{"log_weight": weight, "target": fit.target} for weight in weights[indices].tolist()]
        pool = None if isinstance(raw, Iterator) else raw  # an iterator is spent by now
        return Selection(indices, reasons, len(weights), seed, method, pool)

    @property
    def noise_scale(self) -> float:
        """What turns a log weight into the nats of the paper: L for "mean", sqrt(L) for "sqrt" and 1 for
        "sum", where L is the mean number of n-grams of the raw texts at `fit`."""
        fit = self._fitted()
        length = float(fit.raw_counts.sum()) / fit.raw_documents
        return {"mean": length, "sqrt": math.sqrt(length), "sum": 1.0}[self.normalize]

    def kl_reduction(self, picked: Selection | TextSource) -> float:
        """How much nearer to the target than raw the picked texts are, in nats: KL(p || q) - KL(p || picked).

        The measure of the paper, where it correlates with downstream accuracy (r = 0.82 over 8 selection
        methods). It is positive for a good selection and about 0 for a random one; `picked.control` is one to
        compare with. Right texts that cover one part of the target alone can be negative.

        Departures: buckets are folded to 10,000, the paper's number, and 100,000 n-grams of raw are added to
        the picked ones (a Dirichlet prior), so that a small selection is drawn towards 0 instead of being
        fined for every bucket that it is too small to visit. On millions of n-grams the prior does not show.

        Args:
            picked: a selection made by `select` from a pool that can be read again, its `control`, or texts.

        Raises:
            DataSelectionError: not fitted, texts all empty or not to be read, or a selection without pool.
        """
        fit = self._fitted()
        texts = picked_texts(picked) if isinstance(picked, Selection) else read_texts(picked, "picked")
        counts, _ = self._count(texts, "picked")
        return kl_reduction(*(fold(side, KL_BUCKETS) for side in (fit.target_counts, fit.raw_counts, counts)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `counts.npz` (the bucket counts) and `dsir.json` (the settings), each whole or not at all."""
        fit = self._fitted()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, target_counts=fit.target_counts, raw_counts=fit.raw_counts)
        header = {
            "format": FORMAT,
            "version": 1,
            "ngrams": self.ngrams,
            "buckets": self.buckets,
            "smoothing": self.smoothing,
            "normalize": self.normalize,
            "target": fit.target,
            "raw_documents": fit.raw_documents,
            "counts_crc32": zlib.crc32(buffer.getvalue()),
        }
        write_atomic(Path(folder) / COUNTS, buffer.getvalue())
        write_atomic(Path(folder) / HEADER, json.dumps(header, indent=2).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Dsir":
        """Read what `save` wrote. Nothing is unpickled: a folder from a stranger is safe to load.

        Raises:
            DataSelectionError: a file is missing, of another kind or version, or they do not belong together.
        """
        header = read_header(Path(folder) / HEADER, FORMAT)
        content = read_checked(Path(folder) / COUNTS, header["counts_crc32"])
        dsir = cls(header["ngrams"], header["buckets"], header["smoothing"], header["normalize"])
        with np.load(io.BytesIO(content), allow_pickle=False) as counts:
            fit = Fit(counts["target_counts"], counts["raw_counts"], header["raw_documents"], header["target"])
        dsir._fit = fit
        return dsir

    def _count(self, texts: Iterator[str], name: str) -> tuple[Counts, int]:
        counts, documents = count_ngrams(texts, self.ngrams, self.buckets)
        if not documents:
            raise DataSelectionError(f"{name} is empty; give at least one text")
        if not counts.any():
            raise DataSelectionError(f"{name}: none of its {documents} texts has a word; give texts with words")
        return counts, documents

    def _fitted(self) -> Fit:
        if self._fit is None:
            raise DataSelectionError("this Dsir has counted nothing yet; call fit(target=..., raw=...) first")
        return self._fit


def picked_texts(picked: Selection) -> Iterator[str]:
    """The texts of a selection, read from its pool.

    Raises:
        DataSelectionError: the selection has no pool, or the pool has another size by now.
    """
    if picked.pool is None:
        raise DataSelectionError(
            "this selection does not hold its pool (it was loaded, or made from an iterator); pass the "
            "texts, for instance picked.apply(dataset)"
        )
    chosen = np.zeros(picked.pool_size, bool)
    chosen[picked.indices] = True
    rows = 0
    for rows, text in enumerate(read_texts(picked.pool, "the selection's pool"), start=1):
        if rows <= picked.pool_size and chosen[rows - 1]:
            yield text
    if rows != picked.pool_size:
        raise DataSelectionError(
            f"the selection's pool had {picked.pool_size} texts and has {rows} now; pass the picked texts"
        )
