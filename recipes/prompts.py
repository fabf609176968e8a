"""The rows of an rl stage over data of the user's own: a prompt each, and what the reward reads."""

from collections.abc import Iterable, Iterator
from typing import Any

from ..data_selection import DataSelectionError
from ..data_selection.texts import read_rows
from .rows import Row, check_messages, hub_rows
from .schema_sources import HubRows, RowSource

# What TRL hands to a reward function under these names is its own.
TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def read_prompts(sources: Iterable[RowSource], instruction: str | None = None, gold: str | None = None) -> list[Row]:
    """All rows of the sources, in order, each with a `prompt` (a string, or a list of messages) and other columns.

    `instruction` is put after each prompt, on a line of its own; of messages, after the last one. `gold` is the column
    that the reward cannot do without. All rows get the columns of all: None where a row has no such column.

    Raises:
        DataSelectionError: a file or data set cannot be read, a row has no prompt or no column `gold`, or a column
            has a name that TRL uses itself; the place is named.
        ConnectionError: a data set of the Hub is neither here nor within reach.
    """
    rows = []
    for source in sources:
        for row, where in _rows(source):
            _check(row, where)
            if gold is not None and gold not in row:
                raise DataSelectionError(
                    f"{where}: reward 'math' needs the data set's column {gold!r} with the gold answers, got the "
                    f"columns {sorted(row)}; give all rows that column, or name another with reward_options"
                )
            rows.append(row if instruction is None else {**row, "prompt": _instructed(row["prompt"], instruction)})
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _rows(source: RowSource) -> Iterator[tuple[Row, str]]:
    if isinstance(source, HubRows):
        yield from hub_rows(source)
    else:
        yield from read_rows(source, "data")


def _check(row: Row, where: str) -> None:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        check_messages(prompt, where, "prompt")
    elif not (isinstance(prompt, str) and prompt.strip()):
        raise DataSelectionError(
            f"{where}: a row needs a 'prompt', a text or a list of messages, got the columns {sorted(row)}"
        )
    taken = [name for name in TAKEN if name in row]
    if taken:
        raise DataSelectionError(f"{where}: TRL gives the column {taken[0]!r} to rewards itself; rename it")


def _instructed(prompt: Any, instruction: str) -> Any:
    if isinstance(prompt, str):
        return f"{prompt}\n{instruction}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{instruction}"}]
