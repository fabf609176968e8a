"""The strict parser of completions: what a text states, in linear time, and no room for hedging."""

import re
from dataclasses import dataclass

MAX_CHARS = 20_000

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Parsed:
    """What a completion states. A block that was not read is None, and `failure` says why ("" if none)."""

    ids: Ids | None
    answer: int | None
    failure: str = ""

    @property
    def ok(self) -> bool:
        """True where both blocks were read."""
        return not self.failure


# No repetition is nested in another, so matching is linear in the text.
_IDS_BLOCK = re.compile(r"\\ids\{([0-9, ]{0,2000})\}")
_ANSWER_BLOCK = re.compile(r"\\answer\{ *([0-9]{1,9}) *\}")
_ID = re.compile(r" *([0-9]{1,9}) *")


def parse_answer(text: str) -> Parsed:
    r"""Reads one `\ids{1,4,5}` and one `\answer{3}` from the end of a completion.

    Only the text after the last `</think>` counts, and of it the last 20,000 characters. Each block must
    stand there once; a block may be repeated with the same content, and blocks that disagree are a failure,
    as is any opened block that is not well formed: a text may not hedge. Digits are ASCII, at most nine.
    Repeated ids are a failure; ids that the instance does not have are left to the task's `check`, which
    calls them infeasible. The order of the ids is kept. Time is linear in the text, and no text raises.
    """
    tail = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    tail = tail[-MAX_CHARS:]
    block, why_ids = _only_block(tail, "\\ids{", _IDS_BLOCK)
    number, why_answer = _only_block(tail, "\\answer{", _ANSWER_BLOCK)
    ids = None
    if block is not None:
        ids, why_ids = _read_ids(block)
    return Parsed(ids, None if number is None else int(number), why_ids or why_answer)


def _only_block(tail: str, opener: str, pattern: re.Pattern[str]) -> tuple[str | None, str]:
    """The content that all blocks agree on, and "" ; or None and the reason."""
    found = [content.strip() for content in pattern.findall(tail)]
    opened = tail.count(opener)
    if not opened:
        return None, f"no {opener}...}} block"
    if opened != len(found):
        return None, f"a malformed {opener}...}} block"
    if len(set(found)) > 1:
        return None, f"{opener}...}} blocks disagree"
    return found[0], ""


def _read_ids(block: str) -> tuple[Ids | None, str]:
    if not block:
        return (), ""
    items = [_ID.fullmatch(item) for item in block.split(",")]
    ids = tuple(int(item.group(1)) for item in items if item)
    if len(ids) != len(items):
        return None, "a malformed list of ids"
    if len(set(ids)) != len(ids):
        return None, "repeated ids"
    return ids, ""
