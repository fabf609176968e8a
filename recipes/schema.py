"""What a recipe may say. Every default of a recipe stands here and in the modules that this one takes its parts from;
`trainer:` sections take TRL's own."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationInfo, model_validator

from .names import numbered
from .own import ALLOW_LATER, is_own, not_allowed
from .schema_model import Adapter, BaseModelSection
from .schema_rows import AnySelect, Dedup
from .schema_sources import RowSources, Section, Sources
from .trainer_args import CreditArgs, GrpoTrainerArgs, GuardArgs, RiskArgs, SftTrainerArgs
from .yaml12 import Document

# Two forms of a name: one of those that come with krontune, or code of the user's own.
OWN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
ALLOWED = rf"{OWN}|^[^\s:]+$"  # or the name of a model
OwnPath = Annotated[str, Field(pattern=OWN)]


MISMATCH_LIMIT = 0.2  # nats a token, of rollouts with another cache; docs/launch.md says what it was chosen from


def _whose(name: Any) -> str:
    return "own" if isinstance(name, str) and is_own(name) else "shipped"


class Sft(Section):
    stage: Literal["sft"]
    data: Literal["select", "dedup"] | Sources = "select"
    """What the select stage before it picked, or the dedup stage kept, or sources."""
    controls: list[Literal["random", "balanced", "sequential", "full"]] = []
    """Also train on an equally large random pick from the same pool. After adapt_inf also: a random pick with its
    clusters' shares (balanced); over datasets also: the newest alone (sequential), or all of the pool for as many
    steps (full)."""
    adapter: Adapter | None = None
    """The adapter to begin with where nothing was trained before, null for MoKA as it comes; else the newest one is
    continued."""
    trainer: SftTrainerArgs = SftTrainerArgs()  # pyright: ignore[reportInvalidTypeForm]
    """Any field of trl.SFTConfig."""


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
    """The adapter to begin with where nothing was trained before; else the newest one is continued."""
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
    """null takes that of the rl stage before it."""
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


class Hub(Section):
    """Where the run is pushed when it is done, see docs/hub.md."""

    repo: str | None = None
    """For the adapter, its card and the reports: owner/name; null pushes nothing."""
    private: bool = True
    """Of a repository that the push makes."""
    dataset: str | None = None
    """For what the last select stage picked: owner/name, a data set."""
    base_model: str | None = None
    """The Hub id of the base, where base names a folder: whoever loads the adapter gets the base from there."""


Stage = Annotated[Dedup | AnySelect | Sft | Rl | Verify, Field(discriminator="stage")]


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

    @property
    def names(self) -> list[str]:
        """Of the stages, in order: the kind, from the second of a kind on with its number, as in `sft-2`."""
        return numbered(stage.stage for stage in self.stages)

    def stage(self, name: str) -> Any:
        """The stage of this name, or None."""
        return dict(zip(self.names, self.stages, strict=True)).get(name)

    def place(self, stage: Any) -> int:
        """The number of this very stage; another may say the same."""
        return next(number for number, one in enumerate(self.stages) if one is stage)

    def name_of(self, stage: Any) -> str:
        return self.names[self.place(stage)]

    def before(self, stage: Any, *kinds: str) -> Any:
        """The last stage of these kinds before this one, or None."""
        return next((one for one in reversed(self.stages[: self.place(stage)]) if one.stage in kinds), None)
