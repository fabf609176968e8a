"""What a selection did to the data: a report as plain values, as JSON, and as one page of HTML."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import compat, kernels
from .chunks import Chunks
from .dsir import KL_BUCKETS, Dsir, Fit
from .files import write_atomic
from .importance import PRIOR_NGRAMS, Counts, Floats, distribution, fold, kl_reduction, raw_distribution
from .ngrams import BYTE_CLASSES, PUNCTUATION, WORD, hash_ngrams
from .sampling import Rules, ShardScores, pick
from .scoring import score_in_memory
from .selection import Selection, top_k, uniform_noise
from .shards import read_all
from .texts import DataSelectionError, TextSource, read_texts

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
RANDOM_DRAWS = 5  # the selection's control and four more
TEMPERATURES = (1.0, 10.0, 100.0)
BINS = 40
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Texts of either side whose n-grams are kept as strings, to say what a bucket stands for.
NAMED_TEXTS, NAMED_BYTES = 500, 1 << 21
NGRAMS, SOURCES = 15, 20
SHOWN_CHARACTERS = 600


@dataclass
class Pool:
    """What is known of the pool's N rows."""

    weights: Floats  # (N, targets)
    tokens: NDArray[np.int64]  # (N,)
    sources: list[str] | None  # (N,)
    shards: list[ShardScores]


def selection_report(
    dsir: Dsir,
    picked: Selection,
    *,
    target: TextSource | Mapping[str, TextSource] | None = None,
    oracle: Selection | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    examples: int = 20,
) -> dict[str, Any]:
    """What `picked`, made by `dsir.select`, did; `docs/dsir_report.md` says how to read it.

    The pool is weighed once more and its texts are read once more; all weights are held in memory.

    Args:
        dsir: the fitted estimator.
        picked: a selection that holds its pool.
        target: the target texts, for their lengths; they are not kept by `fit`.
        oracle: rows of the same pool that are known to be right, for the KL reduction of a perfect pick.
        out_dir: the folder of `Dsir.score`, whose scores are read instead of weighing again.
        examples: how many chosen and refused texts are shown.

    Returns:
        Plain values that JSON can hold, for `write_report`.

    Raises:
        DataSelectionError: the selection does not hold its pool, or the pool has changed.
    """
    if picked.pool is None:
        raise DataSelectionError("this selection does not hold its pool (was it loaded?); make it again from the texts")
    if not len(picked):
        raise DataSelectionError("the selection is empty; there is nothing to report")
    fit = dsir._fitted()
    pool = _weighed(dsir, picked, out_dir)
    owners = np.array([fit.targets.index(r["target"]) if r.get("target") in fit.targets else 0 for r in picked.reasons])
    draws = [picked.control.indices, *(_draw(picked, number) for number in range(1, RANDOM_DRAWS))]
    marked = {"picked": picked.indices, **{f"random {i}": rows for i, rows in enumerate(draws)}}
    if oracle is not None:
        if oracle.pool_size != picked.pool_size:
            raise DataSelectionError(f"oracle is of a pool of {oracle.pool_size} rows, not of {picked.pool_size}")
        marked["oracle"] = oracle.indices
    chosen, refused = _examples(picked, pool, owners, examples)
    counts, texts = _read(dsir, picked, marked, {*chosen, *refused, *_named_rows(picked)})
    return {
        "pool": picked.pool_size,
        "picked": len(picked),
        "method": picked.method,
        "seed": picked.seed,
        "settings": dsir.settings(),
        "details": dict(picked.details),
        "targets": [
            _target_part(dsir, fit, number, pool, picked, owners, counts, texts) for number in range(len(fit.targets))
        ],
        "lengths": _lengths(pool, picked, target),
        "sources": _sources(pool, picked),
        "overlap": _overlaps(dsir, pool, picked, owners),
        "chosen": [_example(row, pool, texts) for row in chosen],
        "refused": [_example(row, pool, texts) for row in refused],
    }


def write_report(report: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `report.json` and `report.html`, one page without outside parts. Returns the page's path."""
    from .report_page import page

    path = Path(folder) / REPORT_HTML
    write_atomic(Path(folder) / REPORT_JSON, json.dumps(report, indent=2, allow_nan=False).encode())
    write_atomic(path, page(report).encode())
    return path


def kl_bound(target_counts: Counts, raw_counts: Counts, ngrams: int) -> float:
    """The highest `importance.kl_reduction` that any texts with so many n-grams can have.

    Maximises sum_b p_b log(c_b + P q_b) over counts c >= 0 that add up to `ngrams`, where P q is the prior: by its
    conditions of optimality c_b = max(0, l p_b - P q_b), with l such that the sum is right. Texts come whole, so that
    no pick reaches it.
    """
    p, q = distribution(target_counts), raw_distribution(target_counts, raw_counts)
    prior = PRIOR_NGRAMS * len(q) * q
    seen = np.flatnonzero(p > 0)
    seen = seen[np.argsort(prior[seen] / p[seen], kind="stable")]  # c_b > 0 from the lowest ratio on
    levels = (ngrams + np.cumsum(prior[seen])) / np.cumsum(p[seen])
    used = np.flatnonzero(levels >= prior[seen] / p[seen])
    level = levels[used[-1]]
    best = np.maximum(level * p, prior)[seen] / (ngrams + prior.sum())
    return float(np.sum(p[seen] * np.log(best / q[seen])))


def effective_size(log_weights: Floats) -> float:
    """(sum w)^2 / sum w^2 of weights w given by their logs: how many equal weights say as much (Kish 1965)."""
    scaled = np.exp(log_weights - log_weights.max())
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def _weighed(dsir: Dsir, picked: Selection, out_dir: str | os.PathLike[str] | None) -> Pool:
    source: Any = picked.pool.source if isinstance(picked.pool, Chunks) else picked.pool
    read = score_in_memory(dsir.scorer(), source) if out_dir is None else dsir.score(source, out_dir).read()
    shards = list(read)
    size = sum(len(shard.tokens) for shard in shards)
    if size != picked.pool_size:
        raise DataSelectionError(f"the selection's pool had {picked.pool_size} texts and has {size} now; select again")
    named = any(shard.sources is not None for shard in shards)
    sources = [name for shard in shards for name in (shard.sources or [shard.file] * len(shard.tokens))]
    return Pool(
        np.concatenate([shard.log_weights for shard in shards]),
        np.concatenate([shard.tokens for shard in shards]),
        sources if named or any(sources) else None,
        shards,
    )


def _draw(picked: Selection, number: int) -> NDArray[np.int64]:
    # Stream 1 is the control's.
    return top_k(uniform_noise(picked.seed, picked.pool_size, stream=1 + 1000 * number), len(picked))


def _named_rows(picked: Selection) -> list[int]:
    """Rows whose n-grams are kept as strings: picks and random rows, spread evenly."""
    rows = []
    for indices in (picked.indices, picked.control.indices):
        rows += indices[:: max(1, len(indices) // NAMED_TEXTS)].tolist()[:NAMED_TEXTS]
    return rows


def _examples(picked: Selection, pool: Pool, owners: NDArray[Any], examples: int) -> tuple[list[int], list[int]]:
    """Of the chosen rows half the highest and half the lowest; of the refused half the highest and half at random."""
    high, low = (examples + 1) // 2, examples // 2
    weights = pool.weights[picked.indices, owners]
    order = picked.indices[np.argsort(-weights, kind="stable")].tolist()
    chosen = order if len(order) <= examples else [*order[:high], *order[len(order) - low :]]
    left = np.setdiff1d(np.arange(picked.pool_size), picked.indices)
    best = left[np.argsort(-pool.weights[left].max(axis=1), kind="stable")]
    rest = best[high:]
    noise = uniform_noise(picked.seed, len(rest), stream=2)
    return chosen, [*best[:high].tolist(), *rest[top_k(noise, low)].tolist()]


def _example(row: int, pool: Pool, texts: Mapping[int, str]) -> dict[str, Any]:
    weight = float(pool.weights[row].max())
    return {
        "row": row,
        "log_weight": weight if np.isfinite(weight) else None,
        "tokens": int(pool.tokens[row]),
        "source": pool.sources[row] if pool.sources else None,
        "text": texts[row][:SHOWN_CHARACTERS],
        "cut": len(texts[row]) > SHOWN_CHARACTERS,
    }


def _read(
    dsir: Dsir, picked: Selection, marked: Mapping[str, NDArray[np.int64]], wanted: set[int]
) -> tuple[dict[str, Counts], dict[int, str]]:
    """The bucket counts of each marked set of rows, and the wanted texts, from one reading of the pool."""
    counts = {name: np.zeros(dsir.buckets, np.int64) for name in marked}
    texts, first = {}, 0
    for batch in read_all(picked.pool, "the selection's pool"):  # type: ignore[arg-type]
        rows = batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
        for name, indices in marked.items():
            inside = indices[np.searchsorted(indices, first) : np.searchsorted(indices, first + len(rows))]
            if len(inside):
                held = [rows[row - first] for row in inside.tolist()]
                kernels.count(held, dsir.ngrams, dsir.buckets, counts[name], dsir.compat is not None)
        texts.update({row: rows[row - first] for row in range(first, first + len(rows)) if row in wanted})
        first += len(rows)
    return counts, texts


def _target_part(
    dsir: Dsir,
    fit: Fit,
    number: int,
    pool: Pool,
    picked: Selection,
    owners: NDArray[Any],
    counts: Mapping[str, Counts],
    texts: Mapping[int, str],
) -> dict[str, Any]:
    target, raw = fold(fit.target_counts[number], KL_BUCKETS), fold(fit.raw_counts, KL_BUCKETS)
    near = {name: kl_reduction(target, raw, fold(found, KL_BUCKETS)) for name, found in counts.items()}
    randoms = [value for name, value in near.items() if name.startswith("random")]
    weights = pool.weights[:, number]
    known = weights[np.isfinite(weights)]
    own = weights[picked.indices[owners == number]]
    scaled = known * dsir.noise_scale
    return {
        "name": fit.targets[number],
        "picked": int((owners == number).sum()),
        "kl_reduction": {
            "picked": near["picked"],
            "random": float(np.mean(randoms)),
            "random_lowest": min(randoms),
            "random_highest": max(randoms),
            "oracle": near.get("oracle"),
            "bound": kl_bound(target, raw, int(counts["picked"].sum())),
        },
        "effective_size": {f"{t:g}": effective_size(scaled / t) for t in TEMPERATURES} if len(known) else None,
        "without_ngrams": int(len(weights) - len(known)),
        "histogram": _histogram(known, own[np.isfinite(own)]),
        "ngrams": _ngrams(dsir, number, counts, texts),
    }


def _histogram(pool: Floats, picked: Floats) -> dict[str, Any] | None:
    """Shares of rows a bin; the outer bins hold all beyond the pool's 0.1th and 99.9th percentile."""
    if not len(pool):
        return None
    low, high = np.quantile(pool, (0.001, 0.999))
    high = max(high, float(picked.max())) if len(picked) else high
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    parts = {"edges": edges.tolist()}
    for name, values in (("pool", pool), ("picked", picked)):
        found = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        parts[name] = (found / max(len(values), 1)).tolist()
    return parts


def _ngrams(dsir: Dsir, number: int, counts: Mapping[str, Counts], texts: Mapping[int, str]) -> dict[str, Any]:
    """The n-grams that moved the mean weight per n-gram most: upwards in the picks, downwards in random rows."""
    ratios = dsir.scorer().table[:, number]
    shares = {name: counts[name] / max(int(counts[name].sum()), 1) for name in ("picked", "random 0")}
    names = bucket_names(texts.values(), dsir)
    parts = {}
    for side, name, sign in (("for", "picked", 1), ("against", "random 0", -1)):
        pull = sign * shares[name] * ratios
        order = [bucket for bucket in np.argsort(-pull, kind="stable").tolist() if bucket in names and pull[bucket] > 0]
        parts[side] = [
            {
                "ngram": names[bucket][0],
                "others_in_bucket": names[bucket][1],
                "log_ratio": float(ratios[bucket]),
                "share_picked": float(shares["picked"][bucket]),
                "share_random": float(shares["random 0"][bucket]),
            }
            for bucket in order[:NGRAMS]
        ]
    return parts


def bucket_names(texts: Iterable[str], dsir: Dsir) -> dict[int, tuple[str, int]]:
    """Of each bucket that occurs in the texts its most frequent n-gram and how many others fall into it."""
    found: dict[int, Counter[str]] = {}
    held = 0
    for text in texts:
        held += len(text)
        if held > NAMED_BYTES:
            break
        for bucket, ngram in zip(*text_ngrams(text, dsir), strict=True):
            found.setdefault(bucket, Counter())[ngram] += 1
    return {bucket: (names.most_common(1)[0][0], len(names) - 1) for bucket, names in found.items()}


def text_ngrams(text: str, dsir: Dsir) -> tuple[list[int], list[str]]:
    """The buckets of a text's n-grams and the n-grams as strings, tokens joined by a space."""
    if dsir.compat is not None:
        tokens = re.findall(r"\w+|[^\w\s]+", text.lower())
        buckets = list(compat.text_buckets(tokens, dsir.ngrams, dsir.buckets))
    else:
        lowered = text.lower().encode("utf-8", "surrogatepass")
        tokens = [token.decode("utf-8", "replace") for token in _TOKEN.findall(lowered)]
        buckets = hash_ngrams([text], dsir.ngrams, dsir.buckets).buckets.tolist()
    ngrams = [
        " ".join(tokens[at : at + order])
        for order in range(1, dsir.ngrams + 1)
        for at in range(len(tokens) - order + 1)
    ]
    return buckets, ngrams


def _token_pattern() -> re.Pattern[bytes]:
    classes = [b"".join(re.escape(bytes([c])) for c in range(256) if BYTE_CLASSES[c] == k) for k in (WORD, PUNCTUATION)]
    return re.compile(b"[" + classes[0] + b"]+|[" + classes[1] + b"]+")


_TOKEN = _token_pattern()


def _lengths(pool: Pool, picked: Selection, target: Any) -> dict[str, Any]:
    parts = {
        "pool": pool.tokens,
        "random": pool.tokens[picked.control.indices],
        "picked": pool.tokens[picked.indices],
    }
    if target is not None:
        sources = target.values() if isinstance(target, Mapping) else [target]
        parts["target"] = np.concatenate([_token_counts(read_texts(source, "target")) for source in sources])
    return {name: _spread(values) for name, values in parts.items() if len(values)}


def _token_counts(texts: Iterator[str]) -> NDArray[np.int64]:
    held = list(texts)
    return kernels.score(held, 1, 1, np.zeros((1, 1))).tokens


def _spread(values: NDArray[np.int64]) -> dict[str, float]:
    found = np.quantile(values, QUANTILES).tolist()
    return {"mean": float(values.mean()), **{f"p{100 * q:g}": v for q, v in zip(QUANTILES, found, strict=True)}}


def _sources(pool: Pool, picked: Selection) -> list[dict[str, Any]]:
    """The shares of the most frequent sources before and after, and of all others together."""
    if pool.sources is None:
        return []
    before, after = Counter(pool.sources), Counter(pool.sources[row] for row in picked.indices.tolist())
    parts = [(name or "(none)", before[name], after[name]) for name, _ in before.most_common(SOURCES)]
    rest = len(pool.sources) - sum(p[1] for p in parts), len(picked) - sum(p[2] for p in parts)
    if len(before) > SOURCES:
        parts.append((f"{len(before) - SOURCES} others", *rest))
    return [
        {"source": name, "pool": b, "picked": a, "share_pool": b / picked.pool_size, "share_picked": a / len(picked)}
        for name, b, a in parts
    ]


def _overlaps(dsir: Dsir, pool: Pool, picked: Selection, owners: NDArray[Any]) -> list[dict[str, Any]]:
    """How many rows the selection shares with others of its size, and top-k with Gumbel at several temperatures; a
    share of the size. Limits on length and source are not repeated; copies of the target are, where possible, left
    out."""
    shares = np.bincount(owners, minlength=len(dsir.target_names)) / len(owners)
    copies = sum(int(shard.copies.sum()) for shard in pool.shards)
    exclude = len(picked) <= picked.pool_size - copies

    def rows_of(gumbel: bool, temperature: float = 1.0) -> NDArray[np.int64]:
        rules = Rules(
            len(picked), False, tuple(shares.tolist()), gumbel, dsir.noise_scale, temperature, picked.seed, {}
        )
        return pick(pool.shards, rules if exclude else Rules(**{**vars(rules), "exclude_copies": False})).rows

    def common(one: Sequence[int] | NDArray[Any], other: NDArray[Any]) -> float:
        return len(np.intersect1d(one, other)) / len(picked)

    best = rows_of(False)
    found = [
        {"of": "this selection", "with": "random", "share": common(picked.indices, picked.control.indices)},
        {"of": "this selection", "with": "top-k", "share": common(picked.indices, best)},
    ]
    for temperature in TEMPERATURES:
        share = common(best, rows_of(True, temperature))
        found.append({"of": "top-k", "with": f"Gumbel, temperature {temperature:g}", "share": share})
    return found
