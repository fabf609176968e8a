"""The order in which a completion says it has sorted the rows, before it chooses among them."""

import re

from .parsing import MAX_CHARS, Ids

_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_SORTS = re.compile(r"\bsort(?:ed|ing)?\b", re.IGNORECASE)
_MOVES_ON = re.compile(
    r"\b(?:select|greedy|choose|subset|largest|final answer|so|thus|therefore|next)\b|\\ids|\\answer", re.IGNORECASE
)
_NAMED = re.compile(r"\bID ([0-9]{1,6})\b", re.IGNORECASE)
_RUN = re.compile(r"[0-9]{1,6}(?: {0,3}, {0,3}[0-9]{1,6})+")


def stated_order(text: str, n: int) -> Ids | None:
    r"""The first list of all ids 1..n in a paragraph about sorting, or None.

    By arXiv 2510.27044, section 3.3: in a paragraph that mentions sort, sorted or sorting, up to the first
    word that moves on (select, greedy, choose, subset, largest, final answer, so, thus, therefore, next; here
    also the blocks of the answer), either the numbers of all "ID k" or the longest list with commas, where it
    is a permutation of all ids. The paper's fallbacks outside such paragraphs are for measuring, not for
    reward, and are left out. Reads the first 20,000 characters, in linear time.
    """
    for paragraph in _PARAGRAPH.split(text[:MAX_CHARS]):
        sorts = _SORTS.search(paragraph)
        if sorts is None:
            continue
        moved_on = _MOVES_ON.search(paragraph, sorts.end())
        told = paragraph[: moved_on.start() if moved_on else len(paragraph)]
        runs = [re.findall(r"[0-9]+", run) for run in _RUN.findall(told)]
        for found in (_NAMED.findall(told), max(runs, key=len, default=[])):
            ids = tuple(map(int, found))
            if len(ids) == n and sorted(ids) == list(range(1, n + 1)):
                return ids
    return None
