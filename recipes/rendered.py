"""What the model will read: one row of the sft stage with its trained tokens, one prompt of the rl stage."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from ..adapters.base import resolve_model, takes_pictures
from ..data_selection import DataSelectionError
from . import needs
from .links import sources_behind
from .rl import training_rows
from .rows import Row, source_rows, tokenize
from .schema import Recipe, Rl, Sft
from .schema_model import BaseModelSection
from .trainer_args import value_of

SHOWN = 240  # characters of a piece at its beginning; of its end a third
PROMPTS = 64  # looked at for the longest


@dataclass(frozen=True)
class Rendered:
    """A row as text: pieces in order, each with whether its tokens are trained."""

    title: str
    pieces: list[tuple[str, bool]]

    def plain(self) -> str:
        """With [[ and ]] around what is trained."""
        text = "".join(f"[[{text}]]" if trained else text for text, trained in self.shortened())
        return f"{self.title}\n{text}".rstrip("\n")

    def shortened(self) -> Iterator[tuple[str, bool]]:
        for text, trained in self.pieces:
            left_out = len(text) - SHOWN - SHOWN // 3
            yield (
                f"{text[:SHOWN]} ... {left_out} characters ... {text[-SHOWN // 3 :]}" if left_out > 0 else text,
                trained,
            )


def load_tokenizer(base: BaseModelSection) -> Any:
    """The base's tokenizer, or processor where it reads pictures; None where there is none, or none to be had."""
    source = resolve_model(base.model, base.revision)
    source = str(Path(source).resolve()) if Path(source).is_dir() else source
    return _tokenizer(source, base.revision, base.trust_remote_code)


@lru_cache(maxsize=4)
def _tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    reach = Path(source).is_dir() or needs.hub_answers()
    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": not reach}
    try:
        pictures = takes_pictures(AutoConfig.from_pretrained(source, **options))
        return (AutoProcessor if pictures else AutoTokenizer).from_pretrained(source, **options)
    except (OSError, ValueError, ImportError):  # what is wrong with the model is said when it is loaded
        return None


def rendered_rows(recipe: Recipe) -> Iterator[Rendered]:
    """One of each training stage whose data can be read here.

    Raises:
        DataSelectionError: the row cannot be turned into tokens.
    """
    tokenizer = load_tokenizer(recipe.base)
    if tokenizer is None:
        return
    for stage in recipe.stages:
        if isinstance(stage, Sft):
            name = recipe.name_of(stage)
            yield from (sft_row(row, stage, tokenizer, name) for row in islice(first_rows(recipe, stage), 1))
        elif isinstance(stage, Rl) and not any(needs.out_of_reach(source) for source in stage.data or ()):
            few = stage if stage.task is None else stage.model_copy(update={"instances": 1, "hints": 0.0})
            rows = training_rows(few, recipe.seed)
            name = recipe.name_of(stage)
            yield from (rl_prompt(dict(row), tokenizer, name) for row in rows.select(range(min(1, len(rows)))))


def first_rows(recipe: Recipe, stage: Sft) -> Iterator[Row]:
    """The first row of each source of the stage, or of the pool that its rows are picked from."""
    near = (source for source in sources_behind(recipe, stage) if not needs.out_of_reach(source))
    return (row for source in near for row in islice(source_rows(source, "data"), 1))


def sft_row(row: Row, stage: Sft, tokenizer: Any, name: str) -> Rendered:
    tokens = tokenize(row, tokenizer)
    whole = len(tokens["input_ids"])
    longest = value_of(stage.trainer, "max_length")
    ids, labels = (tokens[name][: longest or whole] for name in ("input_ids", "labels"))
    marked = [(token, label != -100) for token, label in zip(ids, labels, strict=True)]
    words = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds it
    pieces = [
        (words.decode([token for token, _ in part]), trained)
        for trained, part in groupby(marked, key=lambda pair: pair[1])
    ]
    cut = f" of {whole}, cut at max_length" if len(ids) < whole else ""
    title = (
        f"{name}, a row with the columns {_columns(row)}: {len(ids)} tokens{cut}, {sum(t for _, t in marked)} trained"
    )
    return Rendered(title, pieces)


def rl_prompt(row: Row, tokenizer: Any, name: str) -> Rendered:
    text = prompt_text(row["prompt"], tokenizer)
    columns = _columns({name: value for name, value in row.items() if name != "prompt"})
    title = f"{name}, a prompt of {len(tokenizer(text, add_special_tokens=False)['input_ids'])} tokens"
    return Rendered(f"{title}; its reward is given the columns {columns}" if columns else title, [(text, False)])


def prompt_text(prompt: Any, tokenizer: Any) -> str:
    """As TRL hands it to the model.

    Raises:
        DataSelectionError: the prompt holds messages, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise DataSelectionError(
            "the prompts are chat messages and the model's tokenizer has no chat template; take the model's instruct "
            "version, or give prompts as text"
        )
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def longest_prompt(rows: Iterable[Row], tokenizer: Any) -> int:
    """Tokens of the longest prompt among the first rows."""
    texts = [prompt_text(row["prompt"], tokenizer) for row in islice(rows, PROMPTS)]
    return max((len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]), default=0) if texts else 0


def _columns(row: Row) -> str:
    return ", ".join(row)
