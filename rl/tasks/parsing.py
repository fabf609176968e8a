"""The strict parser of completions: what a text states, in linear time, and no room for hedging."""

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_CHARS = 20_000
MAX_ID = 999_999_999

Ids = tuple[int, ...]


@dataclass(slots=True)
class Parsed:
    """What a completion states. A block that was not read is None, and `failure` says why ("" if none)."""

    # Not frozen, and neither are Check and Mark: that doubles the time of making one, and every completion needs them.

    ids: Ids | None
    answer: int | None
    failure: str = ""

    @property
    def ok(self) -> bool:
        """True where both blocks were read."""
        return not self.failure


# No repetition is nested in another, so matching is linear in the text.
_IDS_BLOCK = re.compile(r"\\ids\{([0-9, ]{0,2000})\}")
# One block of each, the ids first: what nearly all completions end with, read at once.
_BOTH_BLOCKS = re.compile(r"\\ids\{([0-9, ]{0,2000})\}\s{0,9}\\answer\{ *([0-9]{1,9}) *\}")
ANSWER_BLOCK = re.compile(r"\\answer\{ *([0-9]{1,9}) *\}")


def parse_answer(text: str) -> Parsed:
    r"""Reads one `\ids{1,4,5}` and one `\answer{3}` from the end of a completion.

    Only the text after the last `</think>` counts, and of it the last 20,000 characters. Each block must
    stand there once; a block may be repeated with the same content, and blocks that disagree are a failure,
    as is any opened block that is not well formed: a text may not hedge. Digits are ASCII, at most nine.
    Repeated ids are a failure; ids that the instance does not have are left to the task's `check`, which
    calls them infeasible. The order of the ids is kept. Time is linear in the text, and no text raises.
    """
    tail = last_segment(text)
    last = tail.rfind("\\ids{")
    usual = _BOTH_BLOCKS.match(tail, last) if last >= 0 else None
    if usual and tail.find("\\", usual.end()) < 0 and not _opened(tail, last):
        ids, why_ids = _read_ids(usual[1].strip())
        return Parsed(ids, int(usual[2]), why_ids)
    block, why_ids = only_block(tail, "\\ids{", _IDS_BLOCK)
    number, why_answer = only_block(tail, "\\answer{", ANSWER_BLOCK)
    ids = None
    if block is not None:
        ids, why_ids = _read_ids(block)
    return Parsed(ids, None if number is None else int(number), why_ids or why_answer)


def _opened(tail: str, end: int) -> bool:
    """Whether a block opens before `end`. (rfind: on these texts three times as fast as find.)"""
    return tail.rfind("\\ids{", 0, end) >= 0 or tail.rfind("\\answer{", 0, end) >= 0


def last_segment(text: str) -> str:
    """The text after the last `</think>`, and of it the last 20,000 characters."""
    start = max(text.rfind("</think>") + 1, len(text) - MAX_CHARS)
    return text[start:] if start > 0 else text


def only_block(tail: str, opener: str, pattern: re.Pattern[str]) -> tuple[str | None, str]:
    """The content that all blocks agree on, and "" ; or None and the reason.

    The last block is looked for from the end, where completions have it; the rest is only searched for
    further openings.
    """
    last = tail.rfind(opener)
    if last < 0:
        return None, f"no {opener}...}} block"
    found = pattern.match(tail, last)
    if found is None:
        return None, f"a malformed {opener}...}} block"
    if tail.rfind(opener, 0, last) >= 0:
        others = [other.strip() for other in pattern.findall(tail)]
        if tail.count(opener) != len(others):
            return None, f"a malformed {opener}...}} block"
        if len(set(others)) > 1:
            return None, f"{opener}...}} blocks disagree"
    return found[1].strip(), ""


@lru_cache(maxsize=8192)  # samples of one prompt often state the same ids
def _read_ids(block: str) -> tuple[Ids | None, str]:
    if not block:
        return (), ""
    try:
        ids = tuple(map(int, block.split(",")))  # the block holds digits, commas and spaces alone
    except ValueError:
        return None, "a malformed list of ids"
    if max(ids) > MAX_ID:
        return None, "a malformed list of ids"
    if len(set(ids)) != len(ids):
        return None, "repeated ids"
    return ids, ""
