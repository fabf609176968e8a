import random
from fractions import Fraction
from itertools import permutations

import pytest

from krontune.rl import RlError
from krontune.rl.tasks import get_task
from krontune.rl.tasks.arithmetic import OVER, PLUS, Search, evaluate, ordered, read_infix, write_infix

COUNTDOWN = get_task("countdown")


def naive_reach(values):
    """Every value that uses all of `values`, by joining any two into one until one is left."""
    if len(values) == 1:
        return {values[0]}
    found = set()
    for i, j in permutations(range(len(values)), 2):
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        x, y = values[i], values[j]
        made = {x + y, x * y, x - y} | ({x // y} if x % y == 0 else set())
        for value in made:
            if value > 0:
                found |= naive_reach([*rest, value])
    return found


def naive_fewest(values, target):
    """(fewest rows, the different multisets of that size that reach the target)."""
    best, sets = None, set()
    for mask in range(1, 1 << len(values)):
        chosen = [v for i, v in enumerate(values) if mask >> i & 1]
        if (best is None or len(chosen) <= best) and target in naive_reach(chosen):
            if best is None or len(chosen) < best:
                best, sets = len(chosen), set()
            sets.add(tuple(sorted(chosen)))
    return best, sets


def used(postfix):
    return tuple(sorted(token for token in postfix if token > 0))


def test_search_agrees_with_joining_every_pair_in_every_order():
    rng = random.Random(0)
    reached = 0
    for n, times in ((1, 20), (2, 60), (3, 80), (4, 40), (5, 4)):
        for _ in range(times):
            values = [rng.randint(1, 12) for _ in range(n)]
            for target in {rng.randint(1, 60), rng.choice(sorted(naive_reach(values)))}:
                fewest, sets = naive_fewest(values, target)
                found = Search(values).fewest(target)
                assert {used(postfix) for postfix in found} == sets, (values, target)
                assert all(evaluate(postfix) == target and len(used(postfix)) == fewest for postfix in found)
                reached += bool(found)
    assert reached > 200


@pytest.mark.parametrize(("n", "times", "most", "sample"), [(4, 40, 400, 400), (5, 6, 2000, 200), (6, 4, 3000, 25)])
def test_taking_the_target_apart_finds_what_listing_everything_finds(n, times, most, sample):
    rng = random.Random(n)
    found = 0
    for _ in range(times):
        search = Search([rng.randint(1, 9) for _ in range(n)])
        full = (1 << n) - 1
        reach = search.reach(full)  # lists everything, where `find` takes the target apart
        for target in rng.sample(range(1, most), min(sample, most - 1)):
            postfix = search.find(full, target)
            assert (postfix is not None) == (target in reach)
            assert postfix is None or evaluate(postfix) == target
            found += postfix is not None
    assert found > 20


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("(25-4)*3", 63),
        ("25 - 4 * 3", 13),
        ("20-4-3", 13),
        ("20-(4-3)", 19),
        ("24/4/3", 2),
        ("2*(3+4)*5", 70),
        ("((((7))))", 7),
        ("7/2", None),
        ("3-3", None),
        ("3-5+9", None),
        ("(3-5)*0", None),
        ("1/0", None),
    ],
)
def test_expressions_are_evaluated_step_by_step(text, value):
    postfix = read_infix(text)
    assert (None if postfix is None else evaluate(postfix)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 4",
        "3+",
        "+3",
        "-3",
        "(3",
        "3)",
        "()",
        "3(4)",
        "2**3",
        "3,4",
        "x",
        "1e3",
        "3.5",
        "9" * 10,
        "__import__('os')",
    ],
)
def test_other_texts_are_malformed(text):
    assert read_infix(text) is None


def test_reading_what_was_written_gives_the_same_and_python_agrees_on_its_value():
    rng = random.Random(1)
    for _ in range(400):
        values = [rng.randint(1, 20) for _ in range(rng.randint(1, 6))]
        postfix = next(iter(Search(values).reach((1 << min(3, len(values))) - 1).values()))
        postfix = ordered(postfix)
        text = write_infix(postfix)
        assert read_infix(text) == postfix
        assert Fraction(eval(text)) == evaluate(postfix)  # our own text, not a model's
    for malformed in ((3, PLUS), (3, 4), (PLUS,), (), (3, 4, 5, PLUS), (3, 4, -9)):
        assert read_infix(write_infix(malformed)) is None and evaluate(malformed) is None


def test_sums_and_products_are_read_alike_in_either_order():
    assert read_infix("2+3*4") == read_infix("4*3+2") == read_infix("(3*4)+2")
    assert read_infix("20-4") != read_infix("4-20")


def test_no_expression_is_slow_or_raises():
    for text in ("(" * 300, "(" * 150 + "1" + ")" * 149, "1+" * 149 + "1", "9*" * 149 + "9", "1-" * 150):
        completion = rf"\expr{{{text}}} \answer{{2}}"
        assert not COUNTDOWN.mark(COUNTDOWN.instance([1, 9], 10), completion).certificate_right
    rng = random.Random(0)
    for _ in range(2000):
        read_infix("".join(rng.choices("0123+-*/() ", k=rng.randint(0, 30))))


def test_check_pays_for_the_fewest_rows_each_used_once():
    item = COUNTDOWN.instance([2, 3, 4, 20], 24)
    cases = {
        r"\expr{20+4} \answer{2}": (True, 2, True),
        r"\expr{4 + 20} \answer{2}": (True, 2, True),
        r"\expr{2*3*4} \answer{3}": (True, 3, False),
        r"\expr{20+2+2} \answer{3}": (False, 0, False),
        r"\expr{24} \answer{1}": (False, 0, False),
        r"\expr{20+3} \answer{2}": (False, 0, False),
    }
    for text, (feasible, value, optimal) in cases.items():
        check = COUNTDOWN.mark(item, text).check
        assert check is not None
        assert (check.feasible, check.value, check.optimal) == (feasible, value, optimal), text
    for text in (r"\expr{20+4}", r"\answer{2}", r"\expr{20+4} \expr{2*3*4} \answer{2}", r"\expr{20+} \answer{2}"):
        mark = COUNTDOWN.mark(item, text)
        assert not mark.parsed.ok and not mark.certificate_right
    assert not COUNTDOWN.check(item, (20, 4, OVER)).feasible
    assert not COUNTDOWN.check(item, (4, 20, PLUS)).order_ok and COUNTDOWN.check(item, (20, 4, PLUS)).order_ok


@pytest.mark.parametrize("generator", ["planted", "rejection"])
def test_generated_instances_have_one_smallest_set_and_say_how_they_were_made(generator):
    task = get_task("countdown", generator=generator)
    for seed in range(40):
        item = task.generate(seed, [2, 5])
        assert item.generator == generator
        values = [row[0] for row in item.rows]
        assert item.params[0] not in values and 10 <= item.params[0] <= 200
        if item.n < 5:
            assert len(naive_fewest(values, item.params[0])[1]) == 1
        assert task.solve(item).unique and task.solve(item).value >= 2


def test_known_rules_on_a_hand_made_instance():
    item = COUNTDOWN.instance([2, 3, 10, 25], 72)
    rules = {name: write_infix(rule(item)) for name, rule in COUNTDOWN.heuristics.items()}
    assert rules == {
        "closest_pair": "25 * 3",
        "add_largest": "((25 + 10) + 3) + 2",
        "greedy_step": "(25 * 3) - 2",
        "in_table_order": "(10 * (3 + 2)) + 25",
    }


def test_no_rule_is_always_right_and_all_are_well_formed():
    items = COUNTDOWN.instances(150, [4, 5])
    for name, rule in COUNTDOWN.heuristics.items():
        claims = [rule(item) for item in items]
        assert all(evaluate(claim) is not None for claim in claims), name
        right = sum(COUNTDOWN.check(item, claim).optimal for item, claim in zip(items, claims, strict=True))
        assert 0 < right < 0.8 * len(items), name


@pytest.mark.parametrize("name", ["permute_rows", "add_row"])
def test_symmetries_keep_the_smallest_expressions(name):
    rng = random.Random(4)
    grown = 0
    for _ in range(40):
        item = COUNTDOWN.generate(rng, [3, 5])
        changed, carry = COUNTDOWN.symmetries[name](rng, item)
        old, new = COUNTDOWN.solve(item), COUNTDOWN.solve(changed)
        assert (old.value, old.n_optima) == (new.value, new.n_optima)
        assert COUNTDOWN.check(changed, carry(old.certificate)).optimal
        grown += changed.n > item.n
    assert grown == 0 if name == "permute_rows" else grown > 30


def test_prompt_and_worked_solution_have_their_exact_form():
    item = COUNTDOWN.instance([3, 25, 4], 63)
    assert "Reach 63 " in COUNTDOWN.prompt(item) and "\nid | value\n1 | 3\n2 | 25\n3 | 4\n" in COUNTDOWN.prompt(item)
    assert COUNTDOWN.completion(item) == "25 - 4 = 21\n21 * 3 = 63\n\\expr{(25 - 4) * 3} \\answer{3}"


def test_what_cannot_be_made_is_refused():
    with pytest.raises(RlError, match="6 rows at most"):
        COUNTDOWN.generate(0, [3, 7])
    with pytest.raises(RlError, match="1 to 6 values"):
        COUNTDOWN.instance([1] * 7, 3)
    with pytest.raises(RlError, match="no expression"):
        COUNTDOWN.solve(COUNTDOWN.instance([1, 1], 50))
    for options in ({"values": (0, 4)}, {"target": 3}, {"unique": 1}, {"generator": "repair"}):
        with pytest.raises(RlError, match=next(iter(options))):
            get_task("countdown", **options)
