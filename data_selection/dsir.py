"""DSIR: data selection by importance resampling (arXiv 2302.03169)."""

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import compat as official
from . import kernels
from .arguments import check_sources, is_mapping, named_targets, rules_of, shares_of
from .chunks import Chunks, cut_batch
from .files import read_checked, read_header, write_atomic
from .importance import Counts, Floats, fold, kl_reduction, log_ratios
from .sampling import ShardScores, pick
from .scoring import ScoreFolder, Scorer, count_source, score_in_memory, score_to_folder
from .selection import MAX_SEED, Selection, checked_int
from .shards import plan, read_all
from .texts import DataSelectionError, TextSource, read_texts, source_name

FORMAT, VERSION = "krontune.dsir", 2
HEADER, COUNTS = "dsir.json", "counts.npz"
# KL reduction is measured on the paper's number of buckets, so that it can be compared with published ones.
KL_BUCKETS = 10_000
BUCKETS = 2**17
SMOOTHING = {"interpolate": 0.5, "laplace": 0.1, "eps": official.EPSILON}
# The pieces of a pool of which `raw_sample` draws some.
SAMPLE_BYTES, SAMPLE_ROWS = 1 << 18, 256

Target: TypeAlias = TextSource | Mapping[str, TextSource]


class Fit(NamedTuple):
    """What `Dsir.fit` counted."""

    targets: tuple[str, ...]
    target_counts: Counts  # (targets, buckets)
    raw_counts: Counts  # (buckets,)
    raw_documents: int
    prints: NDArray[np.uint64]  # (P,) increasing: one for each distinct target text


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
    texts. The hash is another one, which changes collisions alone. `Dsir(compat="dsir-1.0.3")` gives the
    package's log weights.

    Args:
        ngrams: longest n-gram; 1 to 8. All shorter ones count too (paper: 2).
        buckets: hash buckets, 2 to 2**28 (default 2**17). Fitting and scoring hold a few arrays of 8 bytes a bucket.
        smoothing: as `smoothing_kind` says. Default 0.5 for "interpolate", 0.1 for "laplace", 1e-8 for "eps".
        normalize: "mean" (per n-gram), "sum" (the paper's), or "sqrt" (sum over the root of the count). Default
            "mean", with `chunk_words` "sum".
        smoothing_kind: "interpolate"; or "laplace": `smoothing` n-grams more in every bucket of the target; or "eps":
            `smoothing` is added to p and q, which keeps the weight of n-grams that are new to both at 0.
        chunk_words: cut all texts in chunks of so many words between single spaces (paper: 128); the rows that are
            weighed and picked are then the chunks, see `chunks.Chunks`. None leaves texts whole.
        compat: "dsir-1.0.3" for n-grams, hash and weights of the package of that version, on strings of any language:
            10,000 buckets, "eps" 1e-8, "sum". A loop in Python, about as slow as the package.

    Raises:
        DataSelectionError: a value is out of range; the message names it.
    """

    ngrams: int = 2
    buckets: int = None  # type: ignore[assignment]
    smoothing: float = None  # type: ignore[assignment]
    normalize: Literal["mean", "sum", "sqrt"] = None  # type: ignore[assignment]
    smoothing_kind: Literal["interpolate", "laplace", "eps"] = None  # type: ignore[assignment]
    chunk_words: int | None = None
    compat: Literal["dsir-1.0.3"] | None = None

    def __post_init__(self) -> None:
        if self.compat not in (None, official.NAME):
            raise DataSelectionError(f"compat={self.compat!r}: must be None or {official.NAME!r}")
        if self.chunk_words is not None:
            self.chunk_words = checked_int(self.chunk_words, "chunk_words", 1, 10**9, "the paper uses 128")
        self._fill_in()
        self.ngrams = checked_int(self.ngrams, "ngrams", 1, 8, "the paper uses 2")
        self.buckets = checked_int(self.buckets, "buckets", 2, 2**28, "the default is 2**17")
        if self.smoothing_kind not in SMOOTHING:
            raise DataSelectionError(f"smoothing_kind={self.smoothing_kind!r}: must be one of {', '.join(SMOOTHING)}")
        high = 1 if self.smoothing_kind == "interpolate" else 1e9
        if not isinstance(self.smoothing, Real) or not 0 < self.smoothing < high:
            raise DataSelectionError(
                f"smoothing={self.smoothing!r}: must lie between 0 and {high:g}, both excluded; the default is "
                f"{SMOOTHING[self.smoothing_kind]:g}"
            )
        self.smoothing = float(self.smoothing)
        if self.normalize not in ("mean", "sum", "sqrt"):
            raise DataSelectionError(f"normalize={self.normalize!r}: must be 'mean', 'sum' or 'sqrt'")
        self._fit: Fit | None = None

    def _fill_in(self) -> None:
        """Put the defaults where nothing was given."""
        defaults: dict[str, Any] = {"buckets": BUCKETS, "normalize": "sum" if self.chunk_words else "mean"}
        defaults["smoothing_kind"] = "interpolate"
        if self.compat:
            defaults = {"buckets": official.BUCKETS, "normalize": "sum", "smoothing_kind": "eps"}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
            elif self.compat and getattr(self, name) != value:
                raise DataSelectionError(f"{name}={getattr(self, name)!r} with compat: leave it out, it is {value!r}")
        if self.smoothing is None:
            self.smoothing = SMOOTHING.get(self.smoothing_kind, math.nan)

    def fit(self, *, target: Target, raw: TextSource, raw_sample: int | None = None, seed: int = 0) -> "Dsir":
        """Count the n-grams of both sides; the pool is read once. Returns itself.

        Args:
            target: texts like those that are wanted, see `texts.read_texts` for what can be given; or several
                targets, a mapping from name to such texts.
            raw: the pool, or a sample of it.
            raw_sample: count only so many texts of the pool, or a few more: pieces of 256 rows, of 256 kB of a file, or
                row groups are drawn until they hold as many. With 5,000 of 126,000 paragraphs mean precision was .661
                instead of .664; the second pass over the pool is saved. A compressed file is one piece.
            seed: of that draw.

        Raises:
            DataSelectionError: a side cannot be read, or has no n-gram at all.
        """
        targets = named_targets(target)
        counted = [self._count(source, name) for name, source in zip(targets, targets.values(), strict=True)]
        prints = [self._prints(source) for source in targets.values()]
        raw_counts, raw_documents = self._count(raw, "raw", raw_sample, checked_int(seed, "seed", 0, MAX_SEED, "any"))
        names = tuple(targets) if is_mapping(target) else (source_name(target, "target"),)
        found = np.unique(np.concatenate([np.empty(0, np.uint64), *prints]))
        self._fit = Fit(names, np.stack([counts for counts, _ in counted]), raw_counts, raw_documents, found[found > 0])
        return self

    def log_weights(self, raw: TextSource, num_proc: int = 1, out_dir: str | os.PathLike[str] | None = None) -> Floats:
        """(N,) the log weight of every text, in nats (per n-gram with "mean"); -inf for one without n-grams. Of several
        targets (N, targets), in the order of `target_names`.

        A text's weight does not depend on the texts around it nor on `num_proc`, to the last bit.

        Args:
            raw: the pool.
            num_proc: processes on this machine.
            out_dir: a folder for the scores, one file a shard; a later call goes on with what is missing there.

        Raises:
            DataSelectionError: not fitted, the texts cannot be read, or `out_dir` holds scores of something else.
        """
        parts = [shard.log_weights for shard in self.scores(raw, num_proc, out_dir)]
        weights = np.concatenate([np.empty((0, len(self.target_names))), *parts])
        return weights[:, 0] if len(self.target_names) == 1 else weights

    def score(
        self, raw: TextSource, out_dir: str | os.PathLike[str], num_proc: int = 1, part: tuple[int, int] = (0, 1)
    ) -> ScoreFolder:
        """Write the scores of the pool to a folder, shard by shard, in constant memory.

        Several machines share a folder: machine i of n passes part=(i, n) and does every n-th shard. When all are done
        `log_weights` and `select` with this `out_dir` read the scores from there. `missing()` of the result names the
        shards that are not there yet.

        Args:
            raw: files, a `datasets.Dataset` or a list.
            out_dir: new, or the folder of an earlier run, of which only missing shards are scored.
            num_proc: processes on this machine.
            part: (i, n).

        Raises:
            DataSelectionError: as of `log_weights`.
        """
        num_proc = checked_int(num_proc, "num_proc", 1, 4096, "1 scores in this process")
        self._fitted()
        return score_to_folder(self, raw, out_dir, num_proc, part)

    def select(
        self,
        raw: TextSource,
        k: int | float | None = None,
        method: Literal["gumbel", "topk"] = "gumbel",
        temperature: float = 1.0,
        seed: int = 0,
        *,
        tokens: int | None = None,
        proportions: Mapping[str, float] | None = None,
        source_caps: Mapping[str, int | float] | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        exclude_copies: bool = True,
        num_proc: int = 1,
        out_dir: str | os.PathLike[str] | None = None,
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

        With several targets each picks its share, all at once: a text goes to the target for which it scores highest
        (the package serves one target after the other, so that their order matters).

        Args:
            raw: the pool.
            k: how many texts, 1 to the size of the pool; or a share of the pool, between 0 and 1.
            method: "gumbel" or "topk".
            temperature: above 0 and at most 1e9, for "gumbel". Near 0 is "topk", above 1000 is uniform.
            seed: 0 to 2**64 - 1. The noise of a row depends on seed and row alone, in a pool of several files on file
                name and row in the file: not on batches, shards, processes, or the order of the files.
            tokens: instead of k, the most tokens (words and runs of punctuation, not a model's tokens) to pick. The
                pick ends before the first text that does not fit.
            proportions: the share of each target, by name; they are divided by their sum. Default: equal.
            source_caps: of a row's `source` the most rows to pick: a number, or a share of k below 1. A row of a file
                that has no `source` counts as of the file's path, as it was given.
            min_tokens, max_tokens: leave out texts with fewer or more tokens; off by default.
            exclude_copies: leave out texts whose tokens are those of a target text (case and white space apart).
            num_proc, out_dir: as of `log_weights`.

        Returns:
            The selection; its reasons are `log_weight` and `target` (the target's name, its file names, or "target").
            How many texts were left out, and why, is in `details["left_out"]`.

        Raises:
            DataSelectionError: not fitted, pool empty or not to be read, or an argument is out of range.
        """
        given = {
            **{"k": k, "tokens": tokens, "method": method, "temperature": temperature, "seed": seed},
            **{"source_caps": source_caps, "min_tokens": min_tokens, "max_tokens": max_tokens},
            "exclude_copies": exclude_copies,
        }
        fit = self._fitted()
        # What does not depend on the pool is checked before it is read.
        rules_of(1, (1.0,), 1.0, **{**given, "k": 1, "tokens": None, "source_caps": None})
        shares = shares_of(fit.targets, proportions)
        # A folder is read twice, so that only one shard is held; scores in memory are there anyway.
        shards = self.scores(raw, num_proc, out_dir)
        shards = list(shards) if out_dir is None else shards
        size = sum(len(shard.tokens) for shard in shards)
        rules = replace(rules_of(size, shares, self.noise_scale, **given), names=fit.targets)
        if rules.caps:
            check_sources(shards if out_dir is None else self.scores(raw, num_proc, out_dir), rules.caps)
        picks = pick(shards if out_dir is None else self.scores(raw, num_proc, out_dir), rules)
        reasons = [
            {"log_weight": weight, "target": fit.targets[target]}
            for weight, target in zip(picks.log_weights.tolist(), picks.targets.tolist(), strict=True)
        ]
        details: dict[str, Any] = {"left_out": picks.left_out} if picks.left_out else {}
        if tokens is not None:
            details["tokens"] = int(picks.tokens.sum())
        if len(fit.targets) > 1:
            counts = np.bincount(picks.targets, minlength=len(fit.targets)).tolist()
            details["targets"] = dict(zip(fit.targets, counts, strict=True))
        pool = None if isinstance(raw, Iterator) else raw  # an iterator is spent by now
        if self.chunk_words and pool is not None:
            pool = Chunks(pool, self.chunk_words)
        return Selection(picks.rows, reasons, size, rules.seed, method, pool, details)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The names of the targets, in the order of their weights."""
        return self._fitted().targets

    @property
    def noise_scale(self) -> float:
        """What turns a log weight into the nats of the paper: L for "mean", sqrt(L) for "sqrt" and 1 for
        "sum", where L is the mean number of n-grams of the raw texts at `fit`."""
        fit = self._fitted()
        length = float(fit.raw_counts.sum()) / fit.raw_documents
        return {"mean": length, "sqrt": math.sqrt(length), "sum": 1.0}[self.normalize]

    def kl_reduction(self, picked: Selection | TextSource, target: str | None = None) -> float:
        """How much nearer to the target than raw the picked texts are, in nats: KL(p || q) - KL(p || picked); of
        several targets the mean, or that of `target` alone.

        The measure of the paper, where it correlates with downstream accuracy (r = 0.82 over 8 selection
        methods). It is positive for a good selection and about 0 for a random one; `picked.control` is one to
        compare with. Right texts that cover one part of the target alone can be negative.

        Departures: buckets are folded to 10,000, the paper's number, and 100,000 n-grams of raw are added to
        the picked ones (a Dirichlet prior), so that a small selection is drawn towards 0 instead of being
        fined for every bucket that it is too small to visit. On millions of n-grams the prior does not show.

        Args:
            picked: a selection made by `select` from a pool that can be read again, its `control`, or texts.
            target: the name of one of several targets.

        Raises:
            DataSelectionError: not fitted, texts all empty or not to be read, or a selection without pool.
        """
        fit = self._fitted()
        if target is not None and target not in fit.targets:
            raise DataSelectionError(f"target={target!r}: must be one of {', '.join(fit.targets)}")
        texts = picked_texts(picked) if isinstance(picked, Selection) else picked
        counts, _ = self._count(texts, "picked")
        sides = [side for name, side in zip(fit.targets, fit.target_counts, strict=True) if target in (None, name)]
        raw, chosen = fold(fit.raw_counts, KL_BUCKETS), fold(counts, KL_BUCKETS)
        return float(np.mean([kl_reduction(fold(side, KL_BUCKETS), raw, chosen) for side in sides]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `counts.npz` (the bucket counts) and `dsir.json` (the settings), each whole or not at all."""
        fit = self._fitted()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, target_counts=fit.target_counts, raw_counts=fit.raw_counts, prints=fit.prints)
        header = {
            "format": FORMAT,
            "version": VERSION,
            **self.settings(),
            "targets": list(fit.targets),
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
        header = read_header(Path(folder) / HEADER, FORMAT, VERSION)
        content = read_checked(Path(folder) / COUNTS, header["counts_crc32"])
        dsir = cls(**{name: header[name] for name in cls.__dataclass_fields__})
        with np.load(io.BytesIO(content), allow_pickle=False) as counts:
            parts = counts["target_counts"], counts["raw_counts"], header["raw_documents"], counts["prints"]
        dsir._fit = Fit(tuple(header["targets"]), *parts)
        return dsir

    def digest(self) -> str:
        """SHA-256 of settings and counts: equal for estimators that give equal weights."""
        fit = self._fitted()
        digest = hashlib.sha256(json.dumps([self.settings(), fit.targets, fit.raw_documents]).encode())
        for array in (fit.target_counts, fit.raw_counts, fit.prints):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def scorer(self) -> Scorer:
        """What the kernels need of this estimator."""
        fit = self._fitted()
        table = [log_ratios(side, fit.raw_counts, self.smoothing, self.smoothing_kind) for side in fit.target_counts]
        return Scorer(
            self.ngrams,
            self.buckets,
            self.normalize,
            self.compat is not None,
            self.chunk_words,
            np.ascontiguousarray(np.stack(table, axis=1)),
            fit.prints,
            fit.targets,
        )

    def settings(self) -> dict[str, Any]:
        """The values of the fields, by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def scores(
        self, raw: TextSource, num_proc: int = 1, out_dir: str | os.PathLike[str] | None = None
    ) -> Iterator[ShardScores]:
        """What `log_weights` and `select` go by, shard after shard; arguments as of `log_weights`."""
        num_proc = checked_int(num_proc, "num_proc", 1, 4096, "1 scores in this process")
        if out_dir is not None:
            return self.score(raw, out_dir, num_proc).read()
        if num_proc > 1:
            return self._scores_of_processes(raw, num_proc)
        return score_in_memory(self.scorer(), raw)

    def _scores_of_processes(self, raw: TextSource, num_proc: int) -> Iterator[ShardScores]:
        with TemporaryDirectory() as folder:
            yield from self.score(raw, folder, num_proc).read()

    def _count(self, source: TextSource, name: str, limit: int | None = None, seed: int = 0) -> tuple[Counts, int]:
        shards = None
        if limit is not None:
            limit = checked_int(limit, "raw_sample", 1, 2**62, "None counts every text")
            shards = plan(source, name, SAMPLE_BYTES, SAMPLE_ROWS)
            if any(shard.unit == "all" and shard.path is None for shard in shards):
                raise DataSelectionError(f"raw_sample={limit}: {name} can be read from its start alone; give files")
            order = np.random.default_rng(seed).permutation(len(shards)).tolist()
            shards = [shards[number] for number in order]
        counts, documents = count_source(source, name, self, shards, limit)
        if not documents:
            raise DataSelectionError(f"{name} is empty; give at least one text")
        if not counts.any():
            raise DataSelectionError(f"{name}: none of its {documents} texts has a word; give texts with words")
        return counts, documents

    def _prints(self, source: TextSource) -> NDArray[np.uint64]:
        nothing = np.zeros((self.buckets, 1))
        found = [np.empty(0, np.uint64)]
        for batch in read_all(source, "target"):
            if self.chunk_words:
                batch = cut_batch(batch, self.chunk_words)
            found.append(kernels.score(batch.texts, 1, self.buckets, nothing, self.compat is not None).prints)
        return np.concatenate(found)

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
