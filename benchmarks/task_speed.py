"""How fast tasks are drawn and completions are checked on one core, and what the simple rules solve.

    python benchmarks/task_speed.py

Checks: 512 completions of 3,000 characters, eight for each of 64 instances of 5 to 16 rows (countdown 3 to 5), mostly
prose with LaTeX in it and the answer at its end, every second one right; from text to mark, and through the reward
function with the data set's JSON column. The best of 15 rounds, taken in turns, and the median. Drawing: through
`instances`, which also keeps splits apart and repetitions out.
"""

import argparse
import random
import statistics
import time

from measure import show

from krontune.rl import CertificateReward, heuristic_table
from krontune.rl.tasks import TASKS, get_task

PROSE = r"so we take the next row, compare it with \frac{1}{2} of 17, find that 3 < 9 and keep {it}. "
LENGTH = 3000


def sizes(name):
    return [3, 5] if name == "countdown" else [5, 16]


def scoring(name):
    """(mark all, reward all): two functions without arguments over the same 512 completions."""
    task = get_task(name)
    rng = random.Random(0)
    items = [item for item in [task.generate(rng, sizes(name)) for _ in range(64)] for _ in range(8)]
    texts = []
    for i, item in enumerate(items):
        answer = task.completion(item) if i % 2 else task.write(item, wrong(rng, task, item))
        texts.append((PROSE * 40)[: LENGTH - len(answer)] + answer)
    column = [task.to_json(item) for item in items]
    reward = CertificateReward(task)
    return (
        lambda: sum(task.mark(item, text).certificate_right for item, text in zip(items, texts, strict=True)),
        lambda: sum(reward(completions=texts, instance=column)),
    )


def wrong(rng, task, item):
    """A random claim that is not optimal: some rows in any order (countdown: a random rule)."""
    rules = list(task.heuristics.values())
    while True:
        some = rng.sample(range(1, item.n + 1), rng.randint(1, item.n))
        ids = rng.choice(rules)(item) if task.name == "countdown" and rng.random() < 0.9 else some
        if not task.check(item, ids).optimal:
            return ids


def checks(rounds):
    runs = {(name, way): run for name in TASKS for way, run in zip(("mark", "reward"), scoring(name), strict=True)}
    seconds = {key: [] for key in runs}
    for key in [*runs] * rounds:
        start = time.perf_counter()
        right = runs[key]()
        seconds[key].append(time.perf_counter() - start)
        assert right == 256
    rows = []
    for name in TASKS:
        cells = [name]
        for way in ("mark", "reward"):
            taken = seconds[name, way]
            cells += [f"{512 / min(taken):,.0f}", f"{512 / statistics.median(taken):,.0f}"]
        rows.append(cells)
    title = f"Certificate checks a second, texts of {LENGTH:,} characters, parsing included"
    show(title, ["task", "mark, best", "median", "reward, best", "median"], rows)


def drawing(size):
    rows = []
    for name in TASKS:
        start = time.perf_counter()
        get_task(name).instances(size, sizes(name))
        rows.append([name, f"{sizes(name)[0]}-{sizes(name)[1]}", f"{time.perf_counter() - start:.2f}"])
    show(f"Seconds to draw {size:,} different unique instances of one split", ["task", "rows", "seconds"], rows)


def rules(size):
    cases = [(name, {}, sizes(name)) for name in TASKS]
    cases += [("activity", {"generator": "planted"}, n) for n in (16, 32)]
    cases += [("activity_weighted", {"generator": "planted"}, 32), ("activity_weighted", {"generator": "repair"}, 64)]
    rows = []
    for name, options, n in cases:
        task = get_task(name, **options)
        items = task.instances(size, n)
        table = heuristic_table(task, items)
        hard = sum(not task.fooled(item) for item in items) / len(items)
        best = sorted(table.items(), key=lambda entry: -entry[1].certificate.value)
        told = ", ".join(f"{rule} {result.certificate.value:.2f}" for rule, result in best)
        rows.append([f"{name} {options.get('generator', '')} n {n}", f"{hard:.3f}", told])
    title = f"Share of {size} unique instances on which every rule fails, and what each one solves"
    show(title, ["task", "all fail", "rules"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--rules", type=int, default=2000)
    options = parser.parse_args()
    checks(options.rounds)
    drawing(options.size)
    rules(options.rules)
