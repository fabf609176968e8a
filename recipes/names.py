"""Names of stages, which are those of their folders: the kind, and from the second of a kind on with its number, `sft`,
`rl`, `sft-2`; a control of one goes by `sft-2-random`."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("dedup", "select", "sft", "rl", "verify")  # in the order in which they usually stand
TRAINED = ("sft", "rl")
_NAME = re.compile(r"([a-z]+)(?:-([0-9]+))?(?:-(.+))?")


class Parts(NamedTuple):
    """Of the name of a step."""

    kind: str
    number: int
    """From 1, among those of its kind."""
    control: str | None

    @property
    def stage(self) -> str:
        """The name of the stage, without its control."""
        return self.kind if self.number == 1 else f"{self.kind}-{self.number}"


def numbered(kinds: Iterable[str]) -> list[str]:
    """The names of stages of these kinds, in order."""
    seen: Counter[str] = Counter()
    names = []
    for kind in kinds:
        seen[kind] += 1
        names.append(Parts(kind, seen[kind], None).stage)
    return names


def parts(name: str) -> Parts:
    """What a name is made of; one of no stage, such as "base", is a kind of its own."""
    found = _NAME.fullmatch(name)
    return Parts(name, 1, None) if found is None else Parts(found[1], int(found[2] or 1), found[3])


def is_control(name: str) -> bool:
    return parts(name).control is not None


def order(name: str) -> tuple[int, int, str]:
    """Sorts names by kind, number and control."""
    kind, number, control = parts(name)
    return KINDS.index(kind) if kind in KINDS else len(KINDS), number, control or ""
