"""What every certificate task shares: the protocol, marking, splits and data sets."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..errors import RlError
from .parsing import Ids, Parsed, parse_answer
from .splits import as_random, draw_distinct, stream

if TYPE_CHECKING:
    from datasets import Dataset

Heuristic = Callable[["Instance"], Ids]
Symmetry = Callable[[Any, "Instance"], "tuple[Instance, Callable[[Sequence[int]], Ids]]"]


@dataclass(frozen=True)
class Instance:
    """One puzzle.

    `rows[i]` holds the columns of row id i + 1, `params` the numbers that belong to no row (a capacity, a
    target); `generator` says how they were drawn. `memo` is the room in which a task keeps what it has worked
    out about the puzzle; copies and pickles leave it behind.
    """

    rows: tuple[tuple[int, ...], ...]
    generator: str = "given"
    params: tuple[int, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Instance, (self.rows, self.generator, self.params)

    @property
    def n(self) -> int:
        """How many rows there are."""
        return len(self.rows)


@dataclass(frozen=True)
class Solution:
    """The optimum `value`, one optimal `certificate` (row ids), and how many optimal ones there are."""

    value: int
    certificate: Ids
    n_optima: int

    @property
    def unique(self) -> bool:
        """True where the certificate is the only optimal one."""
        return self.n_optima == 1


@dataclass(slots=True)
class Check:
    """A checked certificate. `value` is 0 where it is infeasible; `order_ok`: ids in canonical order."""

    feasible: bool
    value: int
    optimal: bool
    order_ok: bool


@dataclass(slots=True)
class Mark:
    """One completion `text`, marked against its `instance`; `check` is None where no ids were read."""

    parsed: Parsed
    check: Check | None
    solution: Solution
    instance: Instance
    text: str

    @property
    def answer_right(self) -> bool:
        """The stated count is the optimum, whatever the ids are worth."""
        return self.parsed.answer == self.solution.value

    @property
    def certificate_right(self) -> bool:
        """Both blocks were read and the ids are a feasible certificate of optimal value."""
        return self.parsed.ok and self.check is not None and self.check.optimal

    @property
    def verdict(self) -> str:
        """One word or phrase for people: "optimal", "suboptimal", "infeasible" or "parse failure: ..."."""
        if not self.parsed.ok or self.check is None:
            return f"parse failure: {self.parsed.failure}"
        if not self.check.feasible:
            return "infeasible"
        return "optimal" if self.check.optimal else "suboptimal"


class CertificateTask(ABC):
    """A family of puzzles; a solution is a set of row ids that is checked without trusting its author.

    A task gives `name`, `version` (raised whenever the same seed no longer gives the same instances),
    `columns` (the names of an instance's columns) and `params` (those of its other numbers), `heuristics`
    (name -> rule from an instance to ids; known shortcuts, not the solver), `symmetries` (name -> function of
    (rng, instance) that returns a changed instance and the map of its certificates) and the abstract methods.
    `fewest` is True where a smaller value is better, `paper_compat` where the size of an instance is drawn
    anew on each rejection. Parsing, marking, splits and data sets are shared.
    """

    name: str
    version: int
    columns: tuple[str, ...]
    params: tuple[str, ...] = ()
    fewest: bool = False
    paper_compat: bool = False
    heuristics: Mapping[str, Heuristic]
    symmetries: Mapping[str, Symmetry]

    @abstractmethod
    def generate(self, rng: Any, n: int | Sequence[int]) -> Instance:
        """A random instance with `n` rows; for a pair [low, high] the size is drawn first, uniformly."""

    @abstractmethod
    def prompt(self, instance: Instance, hint: bool = False) -> str:
        """The task, rows `id | ...` and the form of the answer; `hint` adds the method in one line."""

    @abstractmethod
    def solve(self, instance: Instance) -> Solution:
        """The optimum, by an exact method."""

    @abstractmethod
    def check(self, instance: Instance, certificate: Sequence[int]) -> Check:
        """Whether the ids are feasible, what they are worth and whether that is the optimum."""

    @abstractmethod
    def write(self, instance: Instance, ids: Sequence[int]) -> str:
        """A completion that claims `ids`, right or wrong, in the form that the prompt asks for."""

    @abstractmethod
    def features(self, instance: Instance) -> dict[str, float]:
        """Numbers read off the input alone, none of them from an algorithm that solves the task."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The options that decide which instances are drawn."""

    def solution(self, instance: Instance) -> Solution:
        """What `solve` gives, worked out once for each Instance object."""
        found = instance.memo.get(self)
        if found is None:
            found = instance.memo[self] = self.solve(instance)
        return found

    def completion(self, instance: Instance) -> str:
        """The worked solution."""
        return self.write(instance, self.solution(instance).certificate)

    def preface(self, instance: Instance) -> Ids | None:
        """All ids in the order in which the method sorts them first; None where it sorts nothing."""
        return None

    def key(self, instance: Instance) -> str:
        """The canonical string of an instance: its rows in order, and nothing of how they were drawn.

        Splits are made on it. Coarser keys (the rank pattern) would be too few to split: there are at most 13
        patterns of three values.
        """
        rows = ";".join(",".join(map(str, row)) for row in instance.rows)
        return f"{','.join(map(str, instance.params))}/{rows}" if instance.params else rows

    def parse(self, text: str) -> Parsed:
        r"""Reads `\ids{...}` and `\answer{...}` in linear time, see `parse_answer`."""
        return parse_answer(text)

    def mark(self, instance: Instance, text: str) -> Mark:
        """Parses a completion and checks what it states. Never raises on any text."""
        parsed = self.parse(text)
        check = None if parsed.ids is None else self.check(instance, parsed.ids)
        return Mark(parsed, check, self.solution(instance), instance, text)

    def fooled(self, instance: Instance) -> list[str]:
        """The heuristics whose ids are an optimal certificate of this instance, so that it cannot expose them."""
        return [name for name, rule in self.heuristics.items() if self.check(instance, rule(instance)).optimal]

    def to_json(self, instance: Instance) -> str:
        """One line of JSON that `instance_from_json` reads back."""
        data = {"task": self.name, "generator": instance.generator, "rows": instance.rows}
        return json.dumps({**data, "params": instance.params} if instance.params else data)

    def instance_from_json(self, text: str) -> Instance:
        """The instance that `to_json` wrote. Raises RlError for anything else."""
        try:
            data = json.loads(text)
            rows = tuple(tuple(row) for row in data["rows"])
            params = tuple(data.get("params", ()))
            task, generator = data["task"], str(data["generator"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RlError(f"not an instance written by to_json: {str(text)[:80]!r}") from error
        if task != self.name:
            raise RlError(f"this instance belongs to task {task!r}, not {self.name!r}: get that task")
        width = len(self.columns)
        if not rows or any(len(row) != width or any(type(cell) is not int for cell in row) for row in rows):
            raise RlError(f"an instance of {self.name!r} has rows of {width} integers, got {str(text)[:80]!r}")
        if len(params) != len(self.params) or any(type(param) is not int for param in params):
            raise RlError(f"an instance of {self.name!r} has the params {self.params}, got {str(text)[:80]!r}")
        return Instance(rows, generator, params)

    def instances(
        self, size: int, n: int | Sequence[int], seed: int = 0, split: str = "train", discriminating: bool = False
    ) -> list[Instance]:
        """`size` different instances of one split; a larger size begins with the same instances.

        n: rows of an instance, or a pair [low, high]. It is drawn first, uniformly, and everything else (a
        unique optimum, the split, no repetition) is reached by drawing again at that n, so that small
        instances, which pass more easily, are not over-represented. (arXiv 2510.27044, algorithms 2 and 4,
        draws n anew on each rejection, which makes five rows some 2.4 times as frequent as sixteen in "lis";
        a task with `paper_compat` does so too.)
        split: "train", "validation" or "test" (80, 10, 10 per cent), decided by a hash of the key: two splits
        share no instance, whatever their seeds. Seeds give independent streams, so the sets of two seeds
        share instances only by chance, which tiny n and narrow ranges make likely.
        discriminating: only instances on which every heuristic of the task is wrong, so that what solves them
        is none of those. They are rare among small ones (and absent among the smallest).

        Raises RlError for a bad argument, or where the split has no more instances of some n.
        """
        salt: tuple[Any, ...] = (self.version, sorted(self.options().items()))
        draw = (lambda rng, _: self.generate(rng, n)) if self.paper_compat else self.generate
        if not discriminating:
            return draw_distinct(self.name, draw, self.key, size, n, seed, split, salt)
        salt = (*salt, "discriminating")
        return draw_distinct(self.name, draw, self.key, size, n, seed, split, salt, lambda item: not self.fooled(item))

    def ladder(
        self, size: int, sizes: Sequence[int], seed: int = 0, split: str = "test", discriminating: bool = False
    ) -> dict[int, list[Instance]]:
        """`size` instances for each number of rows in `sizes`: how far does a model's skill carry?"""
        return {n: self.instances(size, n, seed, split, discriminating) for n in sizes}

    def dataset(
        self,
        size: int,
        n: int | Sequence[int],
        seed: int = 0,
        split: str = "train",
        discriminating: bool = False,
        hints: float = 0.0,
    ) -> "Dataset":
        """`instances(...)` as a data set for TRL's SFT and GRPO trainers.

        hints: the share of prompts, chosen at random, that carry the method in one line (half in arXiv
        2510.27044). Columns: `prompt` (a list of one user message), `completion` (a list of one assistant
        message, the worked solution), `instance` (a string for `instance_from_json`), `optimum` (int), `n`
        (int) and, where hints are asked for, `hint` (bool). Raises RlError as `instances` does.
        """
        from datasets import Dataset

        if not isinstance(hints, Real) or not 0 <= hints <= 1:
            raise RlError(f"hints is the share of prompts with a hint, from 0 to 1, got {hints!r}")
        coin = stream(self.name, "hints", seed, split)
        rows = []
        for instance in self.instances(size, n, seed, split, discriminating):
            hint = coin.random() < hints
            rows.append(
                {
                    "prompt": [{"role": "user", "content": self.prompt(instance, hint)}],
                    "completion": [{"role": "assistant", "content": self.completion(instance)}],
                    "instance": self.to_json(instance),
                    "optimum": self.solution(instance).value,
                    "n": instance.n,
                    **({"hint": hint} if hints else {}),
                }
            )
        return Dataset.from_list(rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[int]]) -> str:
    """A header line `id | column ...` and one line per row, ids from 1."""
    lines = [" | ".join(("id", *columns))]
    lines += [" | ".join(map(str, (i, *row))) for i, row in enumerate(rows, start=1)]
    return "\n".join(lines)


def permuted(rng: Any, instance: Instance) -> tuple[Instance, dict[int, int]]:
    """The same rows in a random order, and the map from old ids to new ones."""
    order = list(range(instance.n))
    as_random(rng).shuffle(order)
    rows = tuple(instance.rows[place] for place in order)
    ids = {place + 1: new + 1 for new, place in enumerate(order)}
    return Instance(rows, f"{instance.generator}+permute_rows", instance.params), ids


def known_ids(instance: Instance, ids: Sequence[int]) -> bool:
    """Whether the instance has all these ids and none is stated twice."""
    return not ids or (min(ids) > 0 and max(ids) <= len(instance.rows) and len(set(ids)) == len(ids))
