"""Picking by score, and what a Selection promises."""

import dataclasses
import json
import math

import datasets
import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Selection
from krontune.data_selection.selection import gumbel_noise, top_k, uniform_noise

MASK = 2**64 - 1


def selection(indices=(1, 4, 7), pool_size=10, seed=3, weights=(0.5, -1.5, -math.inf)):
    reasons = [{"log_weight": weight, "target": "t"} for weight in weights]
    return Selection(np.array(indices), reasons, pool_size, seed, "topk")


def naive_mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def naive_uniform(seed, row, stream):
    start = naive_mix(naive_mix(seed) + stream & MASK)
    state = start + (row + 1) * 0x9E3779B97F4A7C15 & MASK
    return ((naive_mix(state) >> 12) + 0.5) / 2**52


def naive_top_k(scores, k):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
def test_noise_equals_that_of_the_twin(seed):
    for stream in (0, 1):
        expected = [naive_uniform(seed, row, stream) for row in range(37)]
        assert uniform_noise(seed, 37, stream).tolist() == expected


def test_noise_of_a_row_does_not_depend_on_how_many_are_drawn():
    assert np.array_equal(gumbel_noise(5, 1000)[:7], gumbel_noise(5, 7))


def test_seeds_and_streams_give_unrelated_noise():
    columns = [uniform_noise(seed, 20_000, stream) for seed in (0, 1, 2) for stream in (0, 1)]
    correlations = np.corrcoef(columns) - np.eye(6)
    assert np.abs(correlations).max() < 0.03


def test_noise_is_uniform_and_gumbel_has_its_moments():
    uniform = uniform_noise(0, 200_000)
    assert 0 < uniform.min() and uniform.max() < 1
    counts, _ = np.histogram(uniform, 100, (0, 1))
    assert counts.min() > 1750 and counts.max() < 2250
    gumbel = gumbel_noise(0, 200_000)
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var() == pytest.approx(math.pi**2 / 6, abs=0.04)


def test_gumbel_top_1_draws_in_proportion_to_exp_score():
    scores = np.log([0.5, 0.3, 0.15, 0.05])
    noise = gumbel_noise(9, 4 * 20_000).reshape(-1, 4)
    shares = np.bincount((scores + noise).argmax(axis=1), minlength=4) / 20_000
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)


def test_top_k_equals_the_twin_with_ties_to_the_earlier():
    rng = np.random.default_rng(0)
    for size in (1, 2, 17, 100):
        scores = rng.integers(0, 5, size).astype(float)
        scores[rng.random(size) < 0.2] = -np.inf
        for k in {1, size // 2 + 1, size}:
            assert top_k(scores, k).tolist() == naive_top_k(scores.tolist(), k)


def test_indices_are_sorted_int64_and_read_only():
    picked = Selection([1, 4], [{}, {}], 5, 0, "topk")  # type: ignore[arg-type]
    assert picked.indices.dtype == np.int64
    with pytest.raises(ValueError):
        picked.indices[0] = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        picked.seed = 1  # type: ignore[misc]
    assert len(picked) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": (4, 1, 7)}, "must increase"),
        ({"indices": (1, 1, 7)}, "must increase"),
        ({"indices": (1, 4, 10)}, "0 to 9"),
        ({"indices": (-1, 4, 7)}, "0 to 9"),
        ({"indices": (0.5, 4, 7)}, "integers"),
        ({"indices": [[1, 4, 7]]}, "one list"),
        ({"weights": (1.0,)}, "1 reasons for 3 picks"),
        ({"seed": -1}, "seed=-1"),
        ({"pool_size": 1.5}, "pool_size=1.5"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(DataSelectionError, match=message):
        selection(**change)


def test_apply_gives_the_rows_of_lists_and_datasets():
    rows = [f"row {i}" for i in range(10)]
    assert selection().apply(rows) == ["row 1", "row 4", "row 7"]
    dataset = datasets.Dataset.from_dict({"text": rows, "n": range(10)})
    applied = selection().apply(dataset)
    assert isinstance(applied, datasets.Dataset)
    assert applied["text"][:] == ["row 1", "row 4", "row 7"]
    assert applied["n"][:] == [1, 4, 7]
    assert selection().apply(datasets.DatasetDict(train=dataset, test=dataset)).to_list() == applied.to_list()


def test_apply_refuses_another_pool_and_another_kind():
    with pytest.raises(DataSelectionError, match="9 rows.*10"):
        selection().apply(["x"] * 9)
    with pytest.raises(DataSelectionError, match="not to str"):
        selection().apply("pool.jsonl")


def test_control_is_a_uniform_draw_of_equal_size_from_the_seed():
    picked = selection()
    assert len(picked.control) == 3 == len(set(picked.control.indices.tolist()))
    assert picked.control.method == "random" and picked.control.pool_size == 10
    assert picked.control == selection().control
    hits = np.zeros(10)
    for seed in range(3000):
        hits[selection(seed=seed).control.indices] += 1
    assert hits / 3000 == pytest.approx(np.full(10, 0.3), abs=0.04)


def test_control_is_not_the_noise_of_the_selection():
    noise_pick = top_k(gumbel_noise(3, 1000), 100)
    control = selection(indices=range(100), pool_size=1000, weights=[0.0] * 100).control
    assert len(np.intersect1d(noise_pick, control.indices)) < 30  # 10 expected by chance


def test_summary_counts_and_leaves_infinity_out():
    assert selection().summary() == {
        "method": "topk",
        "seed": 3,
        "n": 3,
        "pool": 10,
        "share": 0.3,
        "log_weight": {"mean": -0.5, "min": -1.5, "max": 0.5},
    }
    json.dumps(selection().summary(), allow_nan=False)
    assert "log_weight" not in selection(weights=[-math.inf] * 3).summary()


def test_save_and_load_give_the_same_selection(tmp_path):
    selection().save(tmp_path / "new" / "folder")
    assert Selection.load(tmp_path / "new" / "folder") == selection()
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "picks.jsonl",
        "selection.json",
    ]
    picks = (tmp_path / "new" / "folder" / "picks.jsonl").read_text().splitlines()
    assert json.loads(picks[0]) == {"index": 1, "log_weight": 0.5, "target": "t"}


def test_equal_selections_are_equal_and_others_are_not():
    assert selection() == selection()
    assert selection() != selection(seed=4)
    assert selection() != selection(indices=(1, 4, 8))
    assert selection() != selection(weights=(0.5, -1.5, 0.0))


def test_saving_again_replaces(tmp_path):
    selection().save(tmp_path)
    selection(indices=(0, 1, 2)).save(tmp_path)
    assert Selection.load(tmp_path) == selection(indices=(0, 1, 2))


def test_a_save_that_was_cut_short_is_noticed(tmp_path):
    selection().save(tmp_path / "a")
    selection(indices=(0, 1, 2)).save(tmp_path / "b")
    (tmp_path / "b" / "picks.jsonl").replace(tmp_path / "a" / "picks.jsonl")
    with pytest.raises(DataSelectionError, match="does not belong"):
        Selection.load(tmp_path / "a")
    with pytest.raises(DataSelectionError, match="cannot read"):
        Selection.load(tmp_path / "b")


def test_what_is_no_saved_selection_is_refused(tmp_path):
    with pytest.raises(DataSelectionError, match="cannot read"):
        Selection.load(tmp_path / "nowhere")
    (tmp_path / "selection.json").write_text("{")
    with pytest.raises(DataSelectionError, match="not JSON"):
        Selection.load(tmp_path)
    (tmp_path / "selection.json").write_text('{"format": "krontune.selection", "version": 2}')
    with pytest.raises(DataSelectionError, match="this version reads"):
        Selection.load(tmp_path)


def test_reasons_that_are_not_plain_are_refused_at_save(tmp_path):
    for reason, message in (({"a": {1, 2}}, "not plain"), ({"index": 2}, "'index'")):
        with pytest.raises(DataSelectionError, match=message):
            Selection(np.array([0]), [reason], 1, 0, "topk").save(tmp_path)
    assert not list(tmp_path.iterdir())
