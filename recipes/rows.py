"""From the sources of a recipe to rows, and from rows to tokens with the trained ones marked."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from ..data_selection import DataSelectionError
from ..data_selection.encoding import encode
from ..data_selection.texts import read_rows, row_text
from ..rl.tasks.worked import worked_examples
from .pictures import holds_pictures, is_processor, located
from .schema_sources import Columns, HubRows, HubTexts, Puzzles, Shipped, Source

Row = dict[str, Any]


def read_sources(sources: Iterable[Source], name: str) -> list[Row]:
    """All rows of the sources, in order; each has `text`, or `messages`, or `prompt` and `completion`.

    Raises:
        DataSelectionError: a file is missing or a row of it cannot be read; file and line are named.
    """
    return [row for source in sources for row in source_rows(source, name)]


def source_rows(source: Source, name: str, stream: bool = False) -> Iterator[Row]:
    """The rows of one source, read as they are asked for. A row of a file without `source` has the file's path there.

    stream: of the Hub, read over the network without keeping anything; see `hub_rows`.

    Raises:
        DataSelectionError: as of `read_sources`.
        ConnectionError: a data set of the Hub is neither here nor within reach.
    """
    if isinstance(source, Shipped):
        with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
            for line in gzip.open(file):
                yield json.loads(line)
    elif isinstance(source, Puzzles):
        for kind in source.puzzles:
            for puzzle in worked_examples(kind, source.size, source.seed, source.n, source.split, source.options):
                yield {
                    "prompt": [{"role": "user", "content": puzzle["prompt"]}],
                    "completion": [{"role": "assistant", "content": puzzle["completion"]}],
                    "source": kind,
                }
    elif isinstance(source, Columns):
        yield from _usable(
            ((_with_text(row, source.text, at), at) for row, at in read_rows(source.path, name)), source.path
        )
    elif isinstance(source, HubTexts):
        rows = ((_with_text(row, source.text, at) if source.text else row, at) for row, at in hub_rows(source, stream))
        yield from _usable(rows, source.hub)
    else:
        yield from _usable(read_rows(source, name), source)


def _usable(rows: Iterable[tuple[Row, str]], path: str) -> Iterator[Row]:
    for row, where in rows:
        row = sourced(row, path)
        check_row(row, where)
        yield row


def hub_rows(source: HubRows, stream: bool = False) -> Iterator[tuple[Row, str]]:
    """Rows of a data set of the Hub and their places, from the cache of `datasets` where it is there.

    stream: read row by row over the network. A slice of the split is then not known to the library, and left out.

    Raises:
        DataSelectionError: there is no such data set, configuration or split, or it cannot be read.
        ConnectionError: it is neither here nor within reach.
    """
    from datasets import load_dataset

    split = source.split.partition("[")[0] if stream else source.split
    try:
        rows: Any = load_dataset(source.hub, source.config, split=split, revision=source.revision, streaming=stream)
    except ConnectionError:
        raise
    except Exception as error:  # an unknown id, config or split, and whatever else the library finds
        reason = " ".join(str(error).split())
        raise DataSelectionError(f"data: the data set {source.hub!r} cannot be loaded: {reason[:300]}") from error
    for number, row in enumerate(rows):
        yield dict(row), f"{source.hub}, {source.split}[{number}]"


def sourced(row: Row, path: str) -> Row:
    """The row with its `source`; where it names none, or null or "", that is the path of its file. Pictures are found
    from there."""
    row = located({"source": path, **row}, Path(path).parent)
    return {**row, "source": path} if row["source"] in (None, "") else row


def _with_text(row: Row, template: str, where: str) -> Row:
    return {**row, "text": _filled(template, row, where)}


def _filled(template: str, row: Row, where: str) -> str:
    """The value of a column, or a template with the values of columns in it.

    Raises:
        DataSelectionError: a column is missing or holds no text, or the template cannot be read.
    """
    template = template if "{" in template else "{" + template + "}"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise DataSelectionError(f"{where}: text {template!r} is no template: {error}") from error
    text = ""
    for literal, column, _, _ in parts:
        text += literal
        if column is not None:
            value = row.get(column)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                found = "there is no such column" if column not in row else f"{value!r:.80} is no text"
                raise DataSelectionError(f"{where}: column {column!r} of text: {found}; the columns are {sorted(row)}")
            text += str(value)
    return text


def check_row(row: Row, where: str) -> None:
    """Refuse, with its place, a row that `tokenize` could not use.

    Raises:
        DataSelectionError: a text is no text, messages are none, or none of them is the assistant's.
    """
    try:
        row_text(row, where).encode()
    except UnicodeEncodeError as error:
        raise DataSelectionError(f"{where}: half of a surrogate pair is no text: {error}; repair the row") from error
    if isinstance(row.get("text"), str):
        return
    parts = "images" in row or "image" in row
    if "messages" in row:
        check_messages(row["messages"], where, "messages", parts)
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise DataSelectionError(f"{where}: no message is the assistant's, so there is nothing to learn from")
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        check_messages(row["prompt"], where, "prompt", parts)
        check_messages(row["completion"], where, "completion", parts)
    elif not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        raise DataSelectionError(f"{where}: 'prompt' and 'completion' must be both strings or both lists of messages")


def check_messages(messages: Any, where: str, column: str, parts: bool = False) -> None:
    """Raises DataSelectionError where these are no chat messages.

    parts: a content may be a list of parts, {type: image} or {type: text, text: ...}.
    """
    good = isinstance(messages, list) and messages
    for message in messages if good else ():
        content = message.get("content")
        listed = parts and isinstance(content, list) and all(isinstance(p, dict) and "type" in p for p in content)
        good = good and isinstance(message.get("role"), str) and (isinstance(content, str) or listed)
    if not good:
        raise DataSelectionError(
            f"{where}: {column!r} must be a list of messages with a text 'role' and a text 'content', "
            f"got {str(messages)[:80]!r}"
        )


def fingerprint(rows: Iterable[Row]) -> str:
    """SHA-256 of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def tokenize(row: Row, tokenizer: Any) -> dict[str, list[int]]:
    """`input_ids` and `labels`, -100 where nothing is learned.

    - `text`: all of it, and the end of sequence.
    - `prompt` and `completion`: the completion, and the end of sequence. Both are strings, joined as they are, or both
      lists of chat messages, rendered with the model's chat template.
    - `messages`: what the assistant says, rendered with the chat template.

    tokenizer: or the processor of a model that reads pictures, by which these become tokens, too; see
        `krontune.data_selection.encoding.encode`.

    Raises:
        DataSelectionError: the row is of none of these forms, needs a chat template that the tokenizer lacks, or holds
            pictures and the model reads none.
    """
    if is_processor(tokenizer):
        encoded = encode(tokenizer, row, "the row")
        return {"input_ids": encoded.input_ids.tolist(), "labels": encoded.labels.tolist()}
    if holds_pictures(row):
        raise DataSelectionError(
            "the row holds pictures, and the base model is loaded as one that reads text alone; take a model that "
            "reads pictures, or leave the column out"
        )
    if isinstance(row.get("text"), str):
        ids = _ended(tokenizer(row["text"])["input_ids"], tokenizer)
        return {"input_ids": ids, "labels": list(ids)}
    if "messages" in row:
        return _tokenize_chat(row["messages"], tokenizer)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        start = tokenizer(prompt)["input_ids"]
        rest = _ended(tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer)
        return {"input_ids": start + rest, "labels": [-100] * len(start) + rest}
    if isinstance(prompt, list) and isinstance(completion, list):
        return _tokenize_chat([*prompt, *completion], tokenizer, trained_from=len(prompt))
    raise DataSelectionError(
        f"a row with the columns {sorted(row)} cannot be trained on: give 'text', or 'messages', or 'prompt' and "
        "'completion' that are both strings or both lists of messages"
    )


def _tokenize_chat(messages: list[Row], tokenizer: Any, trained_from: int = 0) -> dict[str, list[int]]:
    if tokenizer.chat_template is None:
        raise DataSelectionError(
            "the data holds chat messages and the model's tokenizer has no chat template; take the model's instruct "
            "version, or give 'text' or string 'prompt' and 'completion'"
        )
    if not all(message.get("role") for message in messages):
        raise DataSelectionError(f"a message of the row has no 'role', give one to each: {messages!r:.200}")
    ids: list[int] = []
    labels: list[int] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < trained_from:
            continue
        start = _render(messages[:number], tokenizer, add_generation_prompt=True)
        whole = _render(messages[: number + 1], tokenizer)
        if whole[: len(start)] != start or start[: len(ids)] != ids:
            raise DataSelectionError(
                "the model's chat template changes the tokens of earlier turns when a later one is added, so the "
                "assistant's cannot be told from the rest; give rows with 'prompt' and 'completion' of one turn each"
            )
        labels += [-100] * (len(start) - len(labels)) + whole[len(start) :]
        ids = whole
    if not ids:
        raise DataSelectionError(f"no message of the row is the assistant's, so nothing is learned: {messages!r:.200}")
    return {"input_ids": ids, "labels": labels}


def _render(messages: list[Row], tokenizer: Any, add_generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end of sequence, which some tokenizers add themselves."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
