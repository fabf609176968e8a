import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Store
from krontune.data_selection.targeted import select_for_target, target_scores


def store_of(folder, vectors, **key):
    key = {"projection": None, "model": "m", "seed": 0} | key
    store = Store.prepare(folder, key, len(vectors), ["gradient_norm"], vectors.shape[1])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    store.write(range(len(vectors)), np.where(norms > 0, norms, np.nan), vectors.astype(np.float32))
    store.finish()
    return store


def stores(tmp_path, rows=40, targets=7):
    rng = np.random.default_rng(0)
    pool, target = rng.normal(size=(rows, 6)), rng.normal(size=(targets, 6))
    pool[3] = 0  # a row without answer
    return store_of(tmp_path / "pool", pool), store_of(tmp_path / "target", target), pool, target


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


TASKS = ["b", "a", "b", "b", "a", "a", "c"]


def test_scores_are_mean_cosines_to_each_task(tmp_path):
    store, goal, pool, target = stores(tmp_path)
    scores, names = target_scores(store, goal, TASKS)
    assert names == ["a", "b", "c"] and scores.shape == (40, 3) and not scores[3].any()
    for i in set(range(40)) - {3}:
        for m, name in enumerate(names):
            own = [cosine(pool[i], row) for row, task in zip(target, TASKS, strict=True) if task == name]
            assert scores[i, m] == pytest.approx(np.mean(own), abs=1e-6)


@pytest.mark.parametrize("turns", ["max", "round_robin"])
def test_picks_equal_the_ones_by_hand(turns, tmp_path):
    store, goal, _, _ = stores(tmp_path)
    scores, names = target_scores(store, goal, TASKS)
    left, expected = set(range(40)) - {3}, {}
    while len(expected) < 10:
        turn = range(3) if turns == "max" else [len(expected) % 3]
        row, task = max(((row, task) for row in left for task in turn), key=lambda pair: scores[pair])
        expected[row] = names[task]
        left.remove(row)
    picked = select_for_target(store, goal, budget=10, tasks=TASKS, turns=turns)
    found = {row: reason["task"] for row, reason in zip(picked.indices.tolist(), picked.reasons, strict=True)}
    assert found == expected and len(picked.control) == 10
    everything = select_for_target(store, goal, budget=39, tasks=TASKS, turns=turns)
    assert set(everything.indices) == set(range(40)) - {3}


def test_what_cannot_be_compared_is_refused(tmp_path):
    store, goal, _, target = stores(tmp_path)
    other = store_of(tmp_path / "other", target, seed=1)
    with pytest.raises(DataSelectionError, match=r"cannot be compared \(seed: 0 and 1\)"):
        target_scores(store, other)
    with pytest.raises(DataSelectionError, match="6 tasks for 7 target rows"):
        target_scores(store, goal, TASKS[:6])
    with pytest.raises(DataSelectionError, match="budget=40"):
        select_for_target(store, goal, budget=40)
    with pytest.raises(DataSelectionError, match="turns='first'"):
        select_for_target(store, goal, budget=4, turns="first")
    silent = store_of(tmp_path / "silent", np.zeros((2, 6)))
    with pytest.raises(DataSelectionError, match="no target row of the task 'target'"):
        target_scores(store, silent)
