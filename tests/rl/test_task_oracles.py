"""The solvers against other people's: networkx and the MILP solver of scipy, where these are installed."""

import random

import numpy as np
import pytest

from krontune.rl.tasks import get_task

LIS, PLAIN, WEIGHTED, KNAPSACK = (get_task(name) for name in ("lis", "activity", "activity_weighted", "knapsack"))


def random_table(rng, n, weighted):
    """Few different times and weights, so that many optima tie."""
    rows = []
    for _ in range(n):
        start = rng.randint(0, 30)
        row = (start, start + rng.randint(1, 12))
        rows.append((*row, rng.randint(1, 6)) if weighted else row)
    return tuple(rows)


@pytest.mark.parametrize("task", [PLAIN, WEIGHTED], ids=lambda task: task.name)
def test_schedules_are_the_heaviest_cliques_of_compatible_rows(task):
    nx = pytest.importorskip("networkx")
    rng = random.Random(1)
    for _ in range(2000):
        rows = random_table(rng, rng.randint(2, 11), task is WEIGHTED)
        worth = {i + 1: row[2] if task is WEIGHTED else 1 for i, row in enumerate(rows)}
        graph = nx.Graph()
        graph.add_nodes_from(worth)
        graph.add_edges_from((a, b) for a in worth for b in worth if a < b and apart(rows[a - 1], rows[b - 1]))
        cliques = [(sum(worth[i] for i in clique), frozenset(clique)) for clique in nx.find_cliques(graph)]
        best = max(cliques)[0]
        optima = {clique for value, clique in cliques if value == best}
        solution = task.solve(task.instance(rows))
        assert (solution.value, solution.n_optima) == (best, len(optima)), rows
        assert frozenset(solution.certificate) in optima


def apart(a, b):
    return a[1] <= b[0] or b[1] <= a[0]


def test_increasing_subsequences_are_longest_paths_and_so_many():
    nx = pytest.importorskip("networkx")
    rng = random.Random(2)
    for _ in range(2000):
        values = [rng.randint(1, rng.choice((3, 9, 99))) for _ in range(rng.randint(2, 14))]
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(values)))
        graph.add_edges_from(
            (a, b) for a in range(len(values)) for b in range(a + 1, len(values)) if values[a] < values[b]
        )
        longest = nx.dag_longest_path_length(graph) + 1
        ending = [{1: 1} for _ in values]  # length -> how many paths of that length end here
        for b in nx.topological_sort(graph):
            for a in graph.predecessors(b):
                for length, count in ending[a].items():
                    ending[b][length + 1] = ending[b].get(length + 1, 0) + count
        solution = LIS.solve(LIS.instance(values))
        assert solution.value == longest
        assert solution.n_optima == sum(counts.get(longest, 0) for counts in ending)


def milp_optimum(worth, rows, limits, without=None):
    """The largest total worth under rows @ x <= limits, x binary; `without` is one set that x must not equal."""
    optimize = pytest.importorskip("scipy.optimize")
    rows, limits = [*rows], [*limits]
    if without is not None:  # sum over the set of (1 - x) plus sum over the rest of x is 1 or more
        rows.append([1.0 if i + 1 in without else -1.0 for i in range(len(worth))])
        limits.append(len(without) - 1)
    found = optimize.milp(
        -np.array(worth, float),
        constraints=optimize.LinearConstraint(np.array(rows, float), -np.inf, limits),
        integrality=np.ones(len(worth)),
        bounds=optimize.Bounds(0, 1),
    )
    return round(-found.fun) if found.success else None


@pytest.mark.parametrize("times", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", [PLAIN, WEIGHTED, KNAPSACK], ids=lambda task: task.name)
def test_a_milp_solver_finds_the_same_optimum_and_another_one_only_where_there_is_one(task, times):
    rng = random.Random(times)
    unique = 0
    for _ in range(times):
        n = rng.randint(3, 12)
        if task is KNAPSACK:
            table = [(rng.randint(1, 12), rng.randint(1, 9)) for _ in range(n)]
            capacity = rng.randint(5, 40)
            instance = task.instance(table, capacity)
            worth, rows, limits = [row[1] for row in table], [[row[0] for row in table]], [capacity]
        else:
            table = random_table(rng, n, task is WEIGHTED)
            instance = task.instance(table)
            worth = [row[2] if task is WEIGHTED else 1 for row in table]
            # at each start, at most one of the rows that are under way
            rows = [[int(row[0] <= at[0] < row[1]) for row in table] for at in table]
            limits = [1] * n
        solution = task.solve(instance)
        assert milp_optimum(worth, rows, limits) == solution.value
        second = milp_optimum(worth, rows, limits, without=solution.certificate)
        assert (second == solution.value) == (solution.n_optima > 1)
        unique += solution.unique
    assert 0.08 < unique / times < 0.9
