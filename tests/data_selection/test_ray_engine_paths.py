"""What workers of the Ray engine are given and give back; a stand-in for Ray works in another folder."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir
from krontune.data_selection.ray_engine import score_with_ray


class Items:
    """A `ray.data.Dataset` whose actor works at once, in another folder than the caller's."""

    def __init__(self, items, monkeypatch, elsewhere, here):
        self.items, self.monkeypatch, self.elsewhere, self.here = items, monkeypatch, elsewhere, here

    def map(self, scorer, fn_constructor_args, **_):
        self.monkeypatch.chdir(self.elsewhere)
        actor = scorer(*fn_constructor_args)
        self.found = [actor(item) for item in self.items]
        self.monkeypatch.chdir(self.here)
        return self

    def take_all(self):
        return self.found


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Two relative paths; workers have another working folder."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    for name in ("a", "b"):
        rows = [{"text": f"{name}{i % 7} word{i % 11} stone"} for i in range(40)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ModuleType("ray.data")
    vars(data)["from_items"] = lambda items, **_: Items(items, monkeypatch, elsewhere, here)
    vars(data)["ActorPoolStrategy"] = SimpleNamespace
    ray = ModuleType("ray")
    vars(ray)["data"] = data
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    return ["a.jsonl", "b.jsonl"]


def test_workers_find_files_whose_paths_are_relative(pool):
    dsir = Dsir(buckets=500).fit(target=["a3 stone"], raw=pool)
    folder = score_with_ray(dsir, pool, "scores")
    assert not folder.missing() and [shard.file for shard in folder.shards] == pool
    assert np.array_equal(dsir.log_weights(pool, out_dir="scores"), dsir.log_weights(pool))
    assert dsir.select(pool, k=9, out_dir="scores") == dsir.select(pool, k=9)


def test_a_full_disk_is_a_fault_of_the_shard_and_not_of_the_worker(pool, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    dsir = Dsir(buckets=500).fit(target=["a3 stone"], raw=pool)
    monkeypatch.setattr("krontune.data_selection.scoring.ScoreFolder.write", full)
    with pytest.raises(DataSelectionError, match="2 of 2 shards failed; the first: .*No space left"):
        score_with_ray(dsir, pool, "scores")
