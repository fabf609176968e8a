"""Expressions over a few numbers: reading, writing and evaluating them, and the exact search for a target.

An expression is a tuple of integers in postfix order: a positive number stands for itself, a negative one for an
operator (PLUS, MINUS, TIMES, OVER). Nothing here executes text.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

Postfix = tuple[int, ...]

PLUS, MINUS, TIMES, OVER = -1, -2, -3, -4
SYMBOLS = {PLUS: "+", MINUS: "-", TIMES: "*", OVER: "/"}
OPERATORS = {symbol: code for code, symbol in SYMBOLS.items()}
_BINDS = {PLUS: 1, MINUS: 1, TIMES: 2, OVER: 2}
_TOKEN = re.compile(r" *([0-9]{1,9}|[-+*/()])")


def apply(operator: int, x: int, y: int) -> int | None:
    """x operator y, or None where that is no positive whole number."""
    if operator == PLUS:
        return x + y
    if operator == TIMES:
        return x * y
    if operator == MINUS:
        return x - y if x > y else None
    return x // y if x % y == 0 else None


def evaluate(postfix: Sequence[int]) -> int | None:
    """The value, or None where it is malformed or some step gives no positive whole number."""
    steps = list(walk(postfix))
    return steps[-1][0] if steps and steps[-1][1] == 1 else None


def walk(postfix: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """After each token (value on top, values held, "" or the step in words); ends early where it is malformed."""
    held: list[int] = []
    for token in postfix:
        step = ""
        if token > 0:
            held.append(token)
        elif token in SYMBOLS and len(held) > 1:
            y, x = held.pop(), held.pop()
            value = apply(token, x, y)
            if value is None:
                yield 0, 0, ""
                return
            held.append(value)
            step = f"{x} {SYMBOLS[token]} {y} = {value}"
        else:
            yield 0, 0, ""
            return
        yield held[-1], len(held), step


def read_infix(text: str) -> Postfix | None:
    """The expression that `text` states, by precedence climbing without recursion; None where it is malformed.

    Of sums and products the larger side comes first, so that 2+3 and 3+2 are read alike.
    """
    output: list[int] = []
    waiting: list[int] = []  # operators and, as 0, open parentheses
    place, operand = 0, True
    text = text.strip()
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            return None
        place, symbol = token.end(), token.group(1)
        if symbol.isdigit():
            if not operand or int(symbol) == 0:
                return None
            output.append(int(symbol))
            operand = False
        elif symbol == "(":
            if not operand:
                return None
            waiting.append(0)
        elif operand:
            return None
        elif symbol == ")":
            while waiting and waiting[-1]:
                output.append(waiting.pop())
            if not waiting:
                return None
            waiting.pop()
        else:
            while waiting and waiting[-1] and _BINDS[waiting[-1]] >= _BINDS[OPERATORS[symbol]]:
                output.append(waiting.pop())
            waiting.append(OPERATORS[symbol])
            operand = True
    if operand or 0 in waiting:
        return None
    return ordered((*output, *reversed(waiting)))


def ordered(postfix: Sequence[int]) -> Postfix:
    """The same well-formed expression with the larger side of each sum and product first."""
    held: list[tuple[int, Postfix]] = []
    for token in postfix:
        if token > 0:
            held.append((token, (token,)))
            continue
        (y, right), (x, left) = held.pop(), held.pop()
        if token in (PLUS, TIMES) and (y, right) > (x, left):
            x, left, y, right = y, right, x, left
        # a step that is no positive whole number is ordered like 0; `evaluate` refuses it
        value = apply(token, x, y) if x and y else None
        held.append((value or 0, (*left, *right, token)))
    return held[0][1]


def write_infix(postfix: Sequence[int]) -> str:
    """`(25 - 4) * 3`; a malformed expression as its tokens with commas, which nothing reads as another one."""
    held: list[tuple[str, bool]] = []
    for token in postfix:
        if token in SYMBOLS and len(held) > 1:
            (y, y_long), (x, x_long) = held.pop(), held.pop()
            x, y = f"({x})" if x_long else x, f"({y})" if y_long else y
            held.append((f"{x} {SYMBOLS[token]} {y}", True))
        elif token > 0:
            held.append((str(token), False))
        else:
            held = []
            break
    if len(held) == 1:
        return held[0][0]
    return ",".join((*(SYMBOLS.get(token, str(token)) for token in postfix), ""))


class Search:
    """All that the numbers of one puzzle can reach; a mask is the set of places used, all of them.

    Every step gives a positive whole number. Up to three numbers the reachable values are listed; beyond, the
    target is taken apart: it is x operator y with x from the smaller part, so that y is known and looked for.
    """

    def __init__(self, numbers: Sequence[int]):
        self.numbers = numbers
        self._reach: dict[int, dict[int, Postfix]] = {1 << i: {v: (v,)} for i, v in enumerate(numbers)}
        self._found: dict[tuple[int, int], Postfix | None] = {}

    def reach(self, mask: int) -> dict[int, Postfix]:
        """Value -> one expression that uses exactly the numbers of this mask."""
        if mask not in self._reach:
            found: dict[int, Postfix] = {}
            for part in _parts(mask):
                for x, left in self.reach(part).items():
                    for y, right in self.reach(mask ^ part).items():
                        for value, expression in _joined(x, left, y, right):
                            found.setdefault(value, expression)
            self._reach[mask] = found
        return self._reach[mask]

    def find(self, mask: int, target: int) -> Postfix | None:
        """An expression for `target` that uses exactly the numbers of this mask, or None."""
        if mask.bit_count() <= 3:
            return self.reach(mask).get(target)
        if (mask, target) not in self._found:
            self._found[mask, target] = self._take_apart(mask, target)
        return self._found[mask, target]

    def _take_apart(self, mask: int, target: int) -> Postfix | None:
        for part in _parts(mask):
            for x, left in self.reach(part).items():
                for y, operator, x_first in _partners(target, x):
                    right = self.find(mask ^ part, y)
                    if right is not None:
                        return ordered((*left, *right, operator) if x_first else (*right, *left, operator))
        return None

    def fewest(self, target: int) -> list[Postfix]:
        """One expression for each smallest set of numbers that reaches the target; empty where none does."""
        for size in range(1, len(self.numbers) + 1):
            found: dict[tuple[int, ...], Postfix] = {}
            for places in combinations(range(len(self.numbers)), size):
                chosen = tuple(sorted(self.numbers[place] for place in places))
                if chosen in found:
                    continue
                expression = self.find(sum(1 << place for place in places), target)
                if expression is not None:
                    found[chosen] = expression
            if found:
                return list(found.values())
        return []


def _parts(mask: int) -> Iterator[int]:
    """The parts of a mask with at most half its places."""
    half = mask.bit_count() // 2
    part = (mask - 1) & mask
    while part:
        if part.bit_count() <= half:
            yield part
        part = (part - 1) & mask


def _joined(x: int, left: Postfix, y: int, right: Postfix) -> Iterator[tuple[int, Postfix]]:
    if (y, right) > (x, left):
        x, left, y, right = y, right, x, left
    yield x + y, (*left, *right, PLUS)
    yield x * y, (*left, *right, TIMES)
    if x > y:
        yield x - y, (*left, *right, MINUS)
    if x % y == 0:
        yield x // y, (*left, *right, OVER)


def _partners(target: int, x: int) -> Iterator[tuple[int, int, bool]]:
    """(y, operator, whether x comes first) for every positive y from which one step with x gives the target."""
    if target > x:
        yield target - x, PLUS, True
    if x > target:
        yield x - target, MINUS, True
    yield target + x, MINUS, False
    if target % x == 0:
        yield target // x, TIMES, True
    if x % target == 0:
        yield x // target, OVER, True
    yield target * x, OVER, False
