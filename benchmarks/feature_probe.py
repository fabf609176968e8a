"""The feature probe of arXiv 2510.27044 on policies whose nature is known, with the control that it lacks.

python benchmarks/feature_probe.py
"""

import numpy as np
from measure import show
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import mean_absolute_error, r2_score

from krontune.rl import checks, get_task
from krontune.rl.checks.policies import mixture_policy
from krontune.rl.tasks.subsequence import beam2, beam3, greedy_best_start, greedy_first

COUNT, TRAIN = 428, 1572


def features(task, one):
    """Ours, and the published ones that run a method: greedy, beam and patience tails."""
    values = [row[0] for row in one.rows]
    runs = [len(rule(values)) for rule in (greedy_first, greedy_best_start, beam2, beam3)]
    tails = [values[i - 1] for i in task.heuristics["patience_tails"](one)]
    return [*task.features(one).values(), *runs, np.mean(tails), np.std(tails), tails[-1] - tails[0], len(tails)]


def published(x, y, seed=42):
    """(R2, mean absolute error) on a quarter of the instances: 800 trees, leaves of 2, sqrt of the features."""
    order = np.random.default_rng(seed).permutation(len(y))
    test, learn = order[: len(y) // 4], order[len(y) // 4 :]
    forest = RandomForestRegressor(800, min_samples_leaf=2, max_features="sqrt", random_state=seed)
    guess = forest.fit(x[learn], y[learn]).predict(x[test])
    return r2_score(y[test], guess), mean_absolute_error(y[test], guess)


def main() -> None:
    task = get_task("lis", values=(1, 1000))
    instances = task.instances(COUNT, (5, 16), split="test")
    x = np.array([features(task, one)[:-1] for one in instances])  # without the number of piles, which is the answer
    truth = np.array([task.solve(one).value for one in instances], dtype=float)
    policies = {
        "perfect solver": checks.scripted_policies(task)["perfect"],
        "solver 70 %, random rows 30 %": mixture_policy(task, {"perfect": 0.7, "random": 0.3}),
        "beam 2": checks.scripted_policies(task)["beam2"],
        "beam 3": checks.scripted_policies(task)["beam3"],
        "greedy from the first row": checks.scripted_policies(task)["greedy_first"],
        "beam 2 60 %, solver 40 %": mixture_policy(task, {"beam2": 0.6, "perfect": 0.4}),
        "the first 0.45 n rows": checks.scripted_policies(task)["length_keyed"],
        "patience tails": checks.scripted_policies(task)["patience_tails"],
        "random rows": checks.scripted_policies(task)["random"],
    }
    r2, mae = published(x, truth)
    rows = [["the true optimum (the control)", "", f"{r2:.2f}", f"{mae:.2f}", "", "", ""]]
    for name, policy in policies.items():
        texts = policy(instances)
        stated = np.array([float(task.parse(text).answer or 0) for text in texts])
        r2, mae = published(x, stated)
        probe = checks.feature_probe(task, instances, texts)
        source = checks.attribution(task, instances, texts)
        right = float((stated == truth).mean())
        cells = [f"{right:.2f}", f"{r2:.2f}", f"{mae:.2f}", f"{probe.value:.2f}", probe.verdict, f"{source.value:.2f}"]
        rows.append([name, *cells])
    columns = ["policy", "answers right", "published R2", "MAE", "R2 of error", "probe", "truth's weight"]
    show(f"feature probe, lis, {COUNT} instances, n 5 to 16, values 1 to 1000", columns, rows)
    ceiling = checks.shortcut_ceiling(task, train=TRAIN, test=COUNT)
    shift = ceiling.details["length_shift"]
    show(
        "shortcut ceiling: the optimum guessed from features alone",
        ["learnt on", "right"],
        [
            [f"{TRAIN} instances, n 5 to 16", f"{ceiling.value:.2f}"],
            [f"n up to {shift['cut']}, tested above", f"{shift['value']:.2f}"],
            ["best constant for each n", f"{ceiling.details['constant']:.2f}"],
        ],
    )


if __name__ == "__main__":
    main()
