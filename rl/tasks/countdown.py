r"""The task "countdown": reach a target from given numbers by arithmetic, with as few of them as possible."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, product
from statistics import fmean, pstdev
from typing import Any

from ..errors import RlError
from .arithmetic import SYMBOLS, Postfix, Search, apply, evaluate, ordered, read_infix, walk, write_infix
from .base import CertificateTask, Check, Instance, Solution, permuted, table
from .options import integer_range, truth, unknown, whole_rows
from .parsing import ANSWER_BLOCK, Ids, Parsed, last_segment, only_block
from .splits import MAX_TRIES, as_random, size_range, whole

MAX_ROWS = 6
GENERATORS = ("planted", "rejection")

_EXPRESSION_BLOCK = re.compile(r"\\expr\{([-+*/() 0-9]{1,300})\}")


class Countdown(CertificateTask):
    r"""Rows `id | value` and a target; reach it with + - * / from as few rows as possible, each used once at most.

    Every step must give a positive whole number, as in the television game. The certificate is the expression,
    stated in `\expr{...}` with values instead of ids, and read into the postfix tuple of `arithmetic`; it is
    evaluated step by step and never executed. Its value is how many rows it uses, the fewest being optimal,
    and `\answer{}` states that number: the target alone, which the prompt gives away, earns nothing.
    `Solution.n_optima` counts the smallest sets of values that reach the target, not the ways of writing one.

    values, target: inclusive ranges (low, high), 1 or more, drawn uniformly. A value may occur twice.
    unique: draw only instances where a single smallest set of values reaches the target.
    generator: "planted" draws a random expression over some of the rows, again until its value lies in
        `target`; "rejection" draws the target and draws all again until it can be reached. `Instance.generator`
        records which. A target that equals a row is never drawn.

    At most 6 rows: the exact search grows about thirtyfold with each. Raises RlError for bad options.
    """

    name = "countdown"
    version = 1
    columns = ("value",)
    params = ("target",)
    fewest = True

    def __init__(
        self,
        values: Sequence[int] = (1, 25),
        target: Sequence[int] = (10, 200),
        unique: bool = True,
        generator: str = "planted",
    ):
        if generator not in GENERATORS:
            raise unknown("generator", generator, GENERATORS)
        self.values = integer_range("values", values, lowest=1)
        self.target = integer_range("target", target, lowest=1)
        self.unique = truth("unique", unique)
        self.generator = generator
        self.heuristics = {rule.__name__: partial(_apply, rule) for rule in RULES}
        self.symmetries = {"permute_rows": self.permute_rows, "add_row": self.add_row}

    def options(self) -> dict[str, Any]:
        """The options given, for seeding and for records."""
        return {name: getattr(self, name) for name in ("values", "target", "unique", "generator")}

    def instance(self, values: Sequence[int], target: int) -> Instance:
        """The instance with these values. Raises RlError for none or more than 6, or other numbers than 1, 2, ..."""
        rows, target = whole_rows([(value,) for value in values]), whole("target", target)
        if len(rows) > MAX_ROWS or min(min(rows)[0], target) < 1:
            raise RlError(f"countdown has 1 to {MAX_ROWS} values, 1 or more, got {values!r} and target {target}")
        return Instance(rows, params=(target,))

    def generate(self, rng: Any, n: int | Sequence[int]) -> Instance:
        """A random instance of n rows, 6 at most, or of a size drawn first from [low, high].

        rng: an int seed, a random.Random or a numpy Generator. Raises RlError for a bad n or rng, or where no
        instance that fits was found.
        """
        source = as_random(rng)
        low, high = size_range(n)
        if high > MAX_ROWS:
            raise RlError(f"countdown has {MAX_ROWS} rows at most, got n={n!r}")
        rows = source.randint(low, high)
        for _ in range(MAX_TRIES):
            values = [source.randint(*self.values) for _ in range(rows)]
            target = self._planted(source, values) if self.generator == "planted" else source.randint(*self.target)
            if target is None or target in values or not self.target[0] <= target <= self.target[1]:
                continue
            n_optima = len(Search(values).fewest(target))
            if n_optima == 1 or (n_optima and not self.unique):
                return Instance(tuple((value,) for value in values), self.generator, (target,))
        raise RlError(
            f"found no instance for n={rows} with {self.options()} in {MAX_TRIES} draws: widen values or target"
        )

    def _planted(self, rng: random.Random, values: Sequence[int]) -> int | None:
        """The value of a random expression over two or more of the values, None where a step is not allowed."""
        held = rng.sample(values, rng.randint(2, len(values)))
        while len(held) > 1:
            x, y = held.pop(rng.randrange(len(held))), held.pop(rng.randrange(len(held)))
            made = apply(rng.choice(tuple(SYMBOLS)), x, y)
            if made is None:
                return None
            held.append(made)
        return held[0]

    def prompt(self, instance: Instance, hint: bool = False) -> str:
        """The question; `hint` adds the method in one line."""
        lines = [
            f"Reach {instance.params[0]} from as few of the values as possible, with + - * / and each row used "
            "once at most. Every step must give a positive whole number.",
            table(self.columns, instance.rows),
            "Reply with the steps, the whole expression and how many rows it uses:",
            "v * v = result",
            r"\expr{expression} \answer{count}",
        ]
        if hint:
            lines.insert(1, "Hint: try all pairs, then all triples; ask which number would be missing to the target.")
        return "\n".join(lines)

    def solve(self, instance: Instance) -> Solution:
        """Exact search by growing size, see `arithmetic.Search`. Raises RlError where the target is out of reach."""
        found = Search([row[0] for row in instance.rows]).fewest(instance.params[0])
        if not found:
            raise RlError(f"no expression over {instance.rows} gives {instance.params[0]}")
        return Solution((len(found[0]) + 1) // 2, found[0], len(found))

    def parse(self, text: str) -> Parsed:
        r"""Reads one `\expr{...}` and one `\answer{...}` by the rules of `parse_answer`; ids is a postfix tuple."""
        tail = last_segment(text)
        block, why_ids = only_block(tail, "\\expr{", _EXPRESSION_BLOCK)
        number, why_answer = only_block(tail, "\\answer{", ANSWER_BLOCK)
        ids = None
        if block is not None:
            ids = read_infix(block)
            why_ids = "" if ids else "a malformed expression"
        return Parsed(ids, None if number is None else int(number), why_ids or why_answer)

    def check(self, instance: Instance, certificate: Sequence[int]) -> Check:
        """Feasible: a well-formed postfix expression over the values, each row used once, that gives the target.

        `value` is the number of rows used; `order_ok`: the larger side of each sum and product comes first.
        """
        used = Counter(token for token in certificate if token > 0)
        if used - Counter(row[0] for row in instance.rows) or evaluate(certificate) != instance.params[0]:
            return Check(False, 0, False, False)
        value = used.total()
        return Check(True, value, value == self.solution(instance).value, ordered(certificate) == tuple(certificate))

    def write(self, instance: Instance, ids: Sequence[int]) -> str:
        r"""The steps `25 - 4 = 21`, then `\expr{(25 - 4) * 3} \answer{3}`."""
        steps = [step for _, _, step in walk(ids) if step]
        used = sum(token > 0 for token in ids)
        return "\n".join((*steps, rf"\expr{{{write_infix(ids)}}} \answer{{{used}}}"))

    def key(self, instance: Instance) -> str:
        """The target and the sorted values: another order of rows is no new instance."""
        return super().key(Instance(tuple(sorted(instance.rows)), params=instance.params))

    def features(self, instance: Instance) -> dict[str, float]:
        """Sizes and simple relations of the values to the target; nothing from a search."""
        values, target = [row[0] for row in instance.rows], instance.params[0]
        return {
            "n": float(len(values)),
            "target": float(target),
            "value_min": float(min(values)),
            "value_max": float(max(values)),
            "value_mean": fmean(values),
            "value_std": pstdev(values),
            "target_over_max": target / max(values),
            "target_over_total": target / sum(values),
            "distinct_ratio": len(set(values)) / len(values),
            "divisors": float(sum(target % value == 0 for value in values)),
            "same_parity": fmean((target - value) % 2 == 0 for value in values),
            "ones": float(values.count(1)),
        }

    def permute_rows(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """The rows in another order; expressions stay."""
        return permuted(rng, instance)[0], tuple

    def add_row(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """One more row that changes nothing about the smallest expressions (none where 6 are there); they stay."""
        source, solution = as_random(rng), self.solution(instance)
        how = f"{instance.generator}+add_row"
        for _ in range(50 if instance.n < MAX_ROWS else 0):
            changed = Instance((*instance.rows, (source.randint(*self.values),)), how, instance.params)
            found = self.solve(changed)
            if (found.value, found.n_optima) == (solution.value, solution.n_optima):
                return changed, tuple
        return Instance(instance.rows, how, instance.params), tuple


# The rules below are what a model may learn instead of the task. Each takes values and target and gives postfix.


def closest_pair(values: Sequence[int], target: int) -> Postfix:
    """The two rows and the step that come closest to the target."""
    pairs = [pair for x, y in combinations(values, 2) for pair in ((x, y), (y, x))]
    made = [(apply(code, x, y), (x, y, code)) for x, y in pairs for code in SYMBOLS]
    return ordered(_closest([(value, postfix) for value, postfix in made if value is not None], target))


def add_largest(values: Sequence[int], target: int) -> Postfix:
    """Adds values from the largest on, as long as the sum does not pass the target."""
    total, postfix = 0, ()
    for value in sorted(values, reverse=True):
        if total + value <= target:
            total, postfix = total + value, (*postfix, value, -1) if postfix else (value,)
    return ordered(postfix or (min(values),))


def greedy_step(values: Sequence[int], target: int) -> Postfix:
    """From the largest value, takes the row and step that come closest to the target, as long as that helps."""
    held = sorted(values)
    at = held.pop()
    postfix: Postfix = (at,)
    while held and at != target:
        made = [(apply(code, at, value), (value, code)) for value in held for code in SYMBOLS]
        options = [(value, step) for value, step in made if value is not None]
        step = _closest(options, target)
        value = next(value for value, other in options if other == step)
        if abs(value - target) >= abs(at - target):
            break
        at, postfix = value, (*postfix, *step)
        held.remove(step[0])
    return ordered(postfix)


def in_table_order(values: Sequence[int], target: int) -> Postfix:
    """Works from top to bottom, one row a step: the first chain that hits the target, or comes closest."""
    made: list[tuple[int, Postfix]] = [(values[0], (values[0],))]
    chains = made
    for value in values[1:]:
        steps = product(chains, SYMBOLS)
        grown = [(apply(code, at, value), (*postfix, value, code)) for (at, postfix), code in steps]
        chains = [(at, postfix) for at, postfix in grown if at is not None]
        made = made + chains
    return ordered(_closest(made, target))


RULES: tuple[Callable[[Sequence[int], int], Postfix], ...] = (closest_pair, add_largest, greedy_step, in_table_order)


def _closest(made: Sequence[tuple[int, Postfix]], target: int) -> Postfix:
    return min(made, key=lambda item: abs(item[0] - target))[1]


def _apply(rule: Callable[[Sequence[int], int], Postfix], instance: Instance) -> Ids:
    return rule([row[0] for row in instance.rows], instance.params[0])
