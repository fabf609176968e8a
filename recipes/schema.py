"""What a recipe may say. Every default of a recipe stands here; `trainer:` sections take TRL's own."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from .trainer_args import CreditArgs, GrpoTrainerArgs, RiskArgs, SftTrainerArgs
from .yaml12 import Document


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class BaseModelSection(Section):
    model: str = Field(min_length=1)
    """A Hub id, a folder, or smollm2-135m, the embedded model."""
    quantization: Literal["nf4", "fp4", "int8"] | None = "nf4"
    """Of the linear layers, by bitsandbytes; null for none."""
    revision: str | None = None
    """Of a Hub model."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository brings along."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2...; null takes the choice of transformers."""
    dense_generation: bool = False
    """Generate on de-quantised, merged weights: several times faster, for 2 bytes a weight more memory."""


class Shipped(Section):
    shipped: Literal["prose"]
    """Text that comes with krontune: paragraphs of documentation and of old books."""


class Puzzles(Section):
    puzzles: list[Literal["sorting", "arithmetic", "scheduling", "lis"]] = Field(min_length=1)
    """Kinds of worked puzzles to generate."""
    size: int = Field(ge=1)
    """How many of each kind."""
    n: Annotated[list[int], Field(min_length=2, max_length=2)] = [3, 5]
    """Rows of a puzzle, from and to."""
    split: Literal["train", "validation", "test"] = "train"
    """Splits share no puzzle, whatever the seeds."""
    seed: int = Field(default=0, ge=0)


def _source_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "path"
    keys = vars(value) if isinstance(value, BaseModel) else value if isinstance(value, dict) else ()
    return next((key for key in ("shipped", "puzzles") if key in keys), None)


Source = Annotated[
    Annotated[str, Tag("path")] | Annotated[Shipped, Tag("shipped")] | Annotated[Puzzles, Tag("puzzles")],
    Discriminator(
        _source_kind,
        custom_error_type="source",
        custom_error_message="a source is the path of a .jsonl, .parquet or .txt file, "
        "or a mapping with 'shipped' or 'puzzles'",
    ),
]
Sources = Annotated[
    list[Source],
    Field(min_length=1),
    # One source may be written without the list.
    BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=Source | list[Source]),
]


class Select(Section):
    stage: Literal["select"]
    method: Literal["dsir"] = "dsir"
    """DSIR, importance resampling by hashed n-grams (arXiv 2302.03169)."""
    raw: Sources
    """The pool to pick from."""
    target: Sources
    """Examples of what the model should become good at."""
    k: int = Field(ge=1)
    """How many rows to pick."""
    sampler: Literal["topk", "gumbel"] = "gumbel"
    """The best k, or a random draw that favours the best."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the random draw."""
    ngrams: int = Field(default=2, ge=1, le=8)
    """n-grams of 1 to this many words are counted."""
    buckets: int = Field(default=2**17, ge=2)
    """How many hash buckets they are counted in."""
    smoothing: float = Field(default=0.5, gt=0, lt=1)
    """Share of the pool's distribution in the target's, which is estimated from few texts."""
    normalize: Literal["mean", "sum", "sqrt"] = "mean"
    """Weights are a mean over a text's n-grams; a sum favours long texts."""


class Adapter(Section):
    method: Literal["moka"] = "moka"
    """MoKA, a gated mixture of Kronecker products (arXiv 2508.03527)."""
    r: int = Field(default=10, ge=1)
    """Kronecker products a layer."""
    n_shapes: int = Field(default=5, ge=1)
    """Over how many shapes they are spread."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update; null stands for r."""
    gate: Literal["softmax", "none"] = "softmax"
    """Learned mixture weights, or none: 1 / r each."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input."""
    target_modules: str | list[str] | None = None
    """Names of the adapted modules, a regular expression, or all-linear; null takes PEFT's choice."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out."""


class Sft(Section):
    stage: Literal["sft"]
    data: Literal["select"] | Sources = "select"
    """What the select stage picked, or sources."""
    controls: list[Literal["random"]] = []
    """Also train on an equally large random pick from the same pool."""
    adapter: Adapter = Adapter()
    trainer: SftTrainerArgs = SftTrainerArgs()  # pyright: ignore[reportInvalidTypeForm]
    """Any field of trl.SFTConfig."""


class Task(Section):
    name: Literal["activity", "activity_weighted", "countdown", "knapsack", "lis"]
    """What is asked, see docs/tasks.md."""
    n: Annotated[list[int], Field(min_length=2, max_length=2)]
    """Rows of an instance, from and to."""
    options: dict[str, Any] = {}
    """Of the task itself, e.g. {values: [1, 99]} for lis."""
    discriminating: bool = False
    """Only instances on which the known heuristics and the optimum disagree."""


class Rl(Section):
    stage: Literal["rl"]
    task: Task
    instances: int = Field(default=1000, ge=1)
    """Training instances to draw, all from the train split."""
    hints: float = Field(default=0.0, ge=0, le=1)
    """Share of the prompts that carry the method in one line."""
    reward: Literal[
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
    ] = "certificate"
    """certificate: the chosen rows are feasible and optimal. The others: see krontune.rl.CertificateReward."""
    credit: CreditArgs | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Any field of krontune.rl.TokenCredit; null for none."""
    risk: RiskArgs | None = None  # pyright: ignore[reportInvalidTypeForm]
    """Any field of krontune.rl.Risk; null maximises the mean reward."""
    adapter: Adapter | None = None
    """The adapter to begin with where no sft stage came before; else that stage's is continued."""
    trainer: GrpoTrainerArgs = GrpoTrainerArgs()  # pyright: ignore[reportInvalidTypeForm]
    """Any field of trl.GRPOConfig."""


class Verify(Section):
    stage: Literal["verify"]
    task: Task | None = None
    """null takes the rl stage's."""
    instances: int = Field(default=200, ge=1)
    """Held-out instances, all from the test split."""
    seed: int = Field(default=0, ge=0)
    """Which held-out instances."""
    checks: list[
        Literal[
            "soundness",
            "verifier",
            "heuristics",
            "shortcut_ceiling",
            "triplet",
            "attribution",
            "heuristic_agreement",
            "feature_probe",
            "process_claims",
            "symmetry",
            "size_ladder",
        ]
    ] = []
    """Of the task and of the last model, see docs/checks.md."""
    sizes: list[int] = Field(default=[8, 16, 32, 64], min_length=1)
    """Rows of the instances of the size ladder."""
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=64, ge=1)


Stage = Annotated[Select | Sft | Rl | Verify, Field(discriminator="stage")]


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Also the name of the run folder."""
    description: str = ""
    """One line, shown by `krontune recipes`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of data selection, initialisation, batches and sampling."""
    base: BaseModelSection
    stages: Annotated[list[Stage], Field(min_length=1)]

    _document: Document | None = PrivateAttr(None)

    def where(self, path: Sequence[str | int]) -> str:
        """Where a key was written, "file:line:column"; its dotted path for a recipe made in Python."""
        return self._document.where(path) if self._document else ".".join(map(str, path))

    def stage(self, name: str) -> Any:
        """The stage of this kind, or None."""
        return next((stage for stage in self.stages if stage.stage == name), None)
