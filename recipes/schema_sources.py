"""Where a recipe may take rows from; and `Section`, which all of its parts are."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


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


RowSource = Annotated[
    Annotated[str, Tag("path")] | Annotated[HubRows, Tag("hub")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "hub"),
]
RowSources = Annotated[
    list[RowSource],
    Field(min_length=1),
    BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=RowSource | list[RowSource]),
]
