"""The task "knapsack": pack rows of the largest total value into a limited weight."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, pstdev
from typing import Any

from ..errors import RlError
from .base import CertificateTask, Check, Instance, Solution, known_ids, permuted, table
from .options import integer_range, truth, unknown, whole_rows
from .parsing import Ids
from .splits import MAX_TRIES, as_random, size_range, whole

REJECTION_MAX_N = 16
GENERATORS = ("auto", "rejection", "repair")

Rows = Sequence[tuple[int, ...]]


class Knapsack(CertificateTask):
    """Rows `id | weight | value` and a capacity; choose rows of the largest total value that weigh no more.

    The ids are stated in increasing order, and any best choice counts as optimal.

    weights, values: inclusive ranges (low, high), 1 or more, drawn independently and uniformly. The capacity
        is drawn uniformly from 30 to 70 per cent of the total weight, and fits at least the lightest row.
    unique: draw only instances with a single best choice; the dynamic programme counts them.
    generator: "rejection" draws whole instances until one fits, "repair" draws a row on which two best
        choices differ anew, "auto" is rejection up to 16 rows and repair above. `Instance.generator` records
        which ("free" without unique). A planted generator, with the densest rows filling the capacity exactly,
        would be unique by construction, and densest-first would solve it: it is left out for that.

    Raises RlError for bad options.
    """

    name = "knapsack"
    version = 1
    columns = ("weight", "value")
    params = ("capacity",)

    def __init__(
        self,
        weights: Sequence[int] = (1, 20),
        values: Sequence[int] = (1, 50),
        unique: bool = True,
        generator: str = "auto",
    ):
        if generator not in GENERATORS:
            raise unknown("generator", generator, GENERATORS)
        self.weights = integer_range("weights", weights, lowest=1)
        self.values = integer_range("values", values, lowest=1)
        self.unique = truth("unique", unique)
        self.generator = generator
        self.heuristics = {rule.__name__: partial(_apply, rule) for rule in RULES}
        self.symmetries = {
            "permute_rows": self.permute_rows,
            "scale_weights": self.scale_weights,
            "scale_values": self.scale_values,
            "add_oversized": self.add_oversized,
        }

    def options(self) -> dict[str, Any]:
        """The options given, for seeding and for records."""
        return {name: getattr(self, name) for name in ("weights", "values", "unique", "generator")}

    def instance(self, rows: Sequence[Sequence[int]], capacity: int) -> Instance:
        """The instance with these rows. Raises RlError for none, another width, or other numbers than 1, 2, ..."""
        packed, capacity = whole_rows(rows), whole("capacity", capacity)
        if any(len(row) != 2 or min(row) < 1 for row in packed) or capacity < 1:
            raise RlError(f"a row is (weight, value), all numbers 1 or more, got {rows!r} and capacity {capacity}")
        return Instance(packed, params=(capacity,))

    def generate(self, rng: Any, n: int | Sequence[int]) -> Instance:
        """A random instance of n rows, or of a size drawn first from [low, high].

        rng: an int seed, a random.Random or a numpy Generator. Raises RlError for a bad n or rng, or where no
        unique optimum was found.
        """
        source = as_random(rng)
        n = source.randint(*size_range(n))
        rows, capacity = self._draw(source, n)
        if not self.unique:
            return Instance(tuple(rows), "free", (capacity,))
        kind = self.generator
        if kind == "auto":
            kind = "rejection" if n <= REJECTION_MAX_N else "repair"
        for _ in range(MAX_TRIES):
            *_, n_optima, tie = best_packing(rows, capacity)
            if n_optima == 1:
                return Instance(tuple(rows), kind, (capacity,))
            if kind == "rejection":
                rows, capacity = self._draw(source, n)
            else:
                rows[tie] = self._row(source)
        raise RlError(
            f"found no unique optimum for n={n} with {self.options()} in {MAX_TRIES} draws: "
            "widen values, lower n or set unique=False"
        )

    def _row(self, rng: random.Random) -> tuple[int, ...]:
        return rng.randint(*self.weights), rng.randint(*self.values)

    def _draw(self, rng: random.Random, n: int) -> tuple[list[tuple[int, ...]], int]:
        rows = [self._row(rng) for _ in range(n)]
        total = sum(row[0] for row in rows)
        return rows, max(min(row[0] for row in rows), rng.randint(3 * total // 10, 7 * total // 10))

    def prompt(self, instance: Instance, hint: bool = False) -> str:
        """The question; `hint` adds the method in one line."""
        lines = [
            f"Choose rows with the largest total value whose weights add up to at most {instance.params[0]}.",
            table(self.columns, instance.rows),
            "Reply with the weights and the values of the chosen rows, their ids and their total value:",
            "weights w + w = sum",
            "values v + v = sum",
            r"\ids{id,id} \answer{value}",
        ]
        if hint:
            lines.insert(1, "Hint: row by row, keep the best value for each total weight; then walk back.")
        return "\n".join(lines)

    def solve(self, instance: Instance) -> Solution:
        """Dynamic programming over rows and capacity with an exact count of the optima, O(n * capacity)."""
        value, ids, n_optima, _ = best_packing(instance.rows, instance.params[0])
        return Solution(value, ids, n_optima)

    def check(self, instance: Instance, certificate: Sequence[int]) -> Check:
        """Feasible: ids of the instance, none twice, within the capacity; worth the sum of their values."""
        order_ok = list(certificate) == sorted(certificate)
        if not known_ids(instance, certificate):
            return Check(False, 0, False, order_ok)
        chosen = [instance.rows[i - 1] for i in certificate]
        if sum([row[0] for row in chosen]) > instance.params[0]:
            return Check(False, 0, False, order_ok)
        value = sum([row[1] for row in chosen])
        return Check(True, value, value == self.solution(instance).value, order_ok)

    def write(self, instance: Instance, ids: Sequence[int]) -> str:
        r"""The sums of weights and values, then `\ids{2,3} \answer{31}`; unknown ids have no row."""
        chosen = [instance.rows[i - 1] for i in ids if 1 <= i <= instance.n]
        weights, values = [row[0] for row in chosen], [row[1] for row in chosen]
        return "\n".join(
            (
                f"weights {' + '.join(map(str, weights))} = {sum(weights)}",
                f"values {' + '.join(map(str, values))} = {sum(values)}",
                rf"\ids{{{','.join(map(str, ids))}}} \answer{{{sum(values)}}}",
            )
        )

    def key(self, instance: Instance) -> str:
        """The capacity and the rows in sorted order: another order of rows is no new instance."""
        return super().key(Instance(tuple(sorted(instance.rows)), params=instance.params))

    def features(self, instance: Instance) -> dict[str, float]:
        """Sizes, weights, values and their ratios; nothing from a rule that packs."""
        rows, capacity = instance.rows, instance.params[0]
        weights, values = [row[0] for row in rows], [row[1] for row in rows]
        ratios = [value / weight for weight, value in rows]
        found = {"n": float(len(rows)), "capacity": float(capacity), "capacity_share": capacity / sum(weights)}
        for name, numbers in (("weight", weights), ("value", values), ("ratio", ratios)):
            found |= {
                f"{name}_min": float(min(numbers)),
                f"{name}_max": float(max(numbers)),
                f"{name}_mean": fmean(numbers),
                f"{name}_std": pstdev(numbers),
            }
        found["fitting_rows"] = float(sum(weight <= capacity for weight in weights))
        return found

    def permute_rows(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """The rows in another order, with new ids."""
        changed, ids = permuted(rng, instance)
        return changed, partial(_renamed, ids)

    def scale_weights(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """Weights and capacity twice or thrice as large; ids stay."""
        by = as_random(rng).randint(2, 3)
        rows = tuple((weight * by, value) for weight, value in instance.rows)
        return Instance(rows, f"{instance.generator}+scale_weights", (instance.params[0] * by,)), _same

    def scale_values(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """Values twice or thrice as large; ids stay."""
        by = as_random(rng).randint(2, 3)
        rows = tuple((weight, value * by) for weight, value in instance.rows)
        return Instance(rows, f"{instance.generator}+scale_values", instance.params), _same

    def add_oversized(self, rng: Any, instance: Instance) -> tuple[Instance, Any]:
        """One more row, last in the table, that is heavier than the capacity and worth the most; ids stay."""
        weight = instance.params[0] + as_random(rng).randint(1, self.weights[1])
        row = (weight, max(value for _, value in instance.rows))
        return Instance((*instance.rows, row), f"{instance.generator}+add_oversized", instance.params), _same


def best_packing(rows: Rows, capacity: int) -> tuple[int, Ids, int, int]:
    """(largest value, ids of one such choice, how many there are, a place where two of them part, or -1).

    Row by row, for each capacity c: best_i(c) = max(best_(i-1)(c), v_i + best_(i-1)(c - w_i)), and the counts
    add up over the branches that attain the maximum: each set is counted once, by whether it holds row i.
    """
    best = [[0] * (capacity + 1)]
    count = [1] * (capacity + 1)
    for weight, value in rows:
        old = best[-1]
        new, counts = old[:], count[:]
        for c in range(weight, capacity + 1):
            taken = value + old[c - weight]
            if taken > old[c]:
                new[c], counts[c] = taken, count[c - weight]
            elif taken == old[c]:
                counts[c] += count[c - weight]
        best.append(new)
        count = counts
    ids: list[int] = []
    tie, room = -1, capacity
    for place in range(len(rows) - 1, -1, -1):
        weight, value = rows[place]
        taken = value + best[place][room - weight] if weight <= room else -1
        if taken == best[place][room] and tie < 0:
            tie = place
        if taken >= best[place][room]:
            ids.append(place + 1)
            room -= weight
    return best[-1][capacity], tuple(reversed(ids)), count[capacity], tie


# The rules below are what a model may learn instead of the task; of equals each takes the first row.


def densest(rows: Rows, capacity: int) -> Ids:
    """By value per weight, from the largest; takes each row that still fits."""
    return _first_fit(rows, capacity, lambda row: -row[1] / row[0])


def most_valuable(rows: Rows, capacity: int) -> Ids:
    """The same by value, from the largest."""
    return _first_fit(rows, capacity, lambda row: -row[1])


def lightest(rows: Rows, capacity: int) -> Ids:
    """The same by weight, from the smallest."""
    return _first_fit(rows, capacity, lambda row: row[0])


def heaviest(rows: Rows, capacity: int) -> Ids:
    """The same by weight, from the largest."""
    return _first_fit(rows, capacity, lambda row: -row[0])


def input_order(rows: Rows, capacity: int) -> Ids:
    """The same from top to bottom."""
    return _first_fit(rows, capacity, lambda row: 0)


def densest_until_full(rows: Rows, capacity: int) -> Ids:
    """By value per weight, and stops at the first row that does not fit."""
    ids: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: -rows[i][1] / rows[i][0]):
        if rows[place][0] > capacity:
            break
        ids.append(place + 1)
        capacity -= rows[place][0]
    return tuple(sorted(ids))


RULES: tuple[Callable[[Rows, int], Ids], ...] = (
    densest,
    most_valuable,
    lightest,
    heaviest,
    input_order,
    densest_until_full,
)


def _first_fit(rows: Rows, capacity: int, rank: Callable[[tuple[int, ...]], float]) -> Ids:
    ids: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: rank(rows[i])):
        if rows[place][0] <= capacity:
            ids.append(place + 1)
            capacity -= rows[place][0]
    return tuple(sorted(ids))


def _apply(rule: Callable[[Rows, int], Ids], instance: Instance) -> Ids:
    return rule(instance.rows, instance.params[0])


def _same(ids: Sequence[int]) -> Ids:
    return tuple(sorted(ids))


def _renamed(new: dict[int, int], ids: Sequence[int]) -> Ids:
    return tuple(sorted(new[i] for i in ids))
