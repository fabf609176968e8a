"""Scores from a local Ray equal those of one process; skipped where Ray is not installed, but not in CI."""

import json
import os
import time

import numpy as np
import psutil
import pytest

from krontune.data_selection import DataSelectionError, Dsir
from krontune.data_selection import shards as shards_module

if os.environ.get("CI"):
    import ray
else:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install krontune[scale]")


@pytest.fixture(scope="module")
def cluster():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    started = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert started
    yield
    ray.shutdown()
    until = time.monotonic() + 30
    while left := [pid for pid in started if psutil.pid_exists(pid) and alive(pid)]:
        assert time.monotonic() < until, f"Ray left the processes {left}"
        time.sleep(0.1)


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ray_resumes_gives_the_same_bits_and_names_a_broken_line(tmp_path, monkeypatch, cluster):
    from krontune.data_selection.ray_engine import score_with_ray

    monkeypatch.setattr(shards_module.plan, "__defaults__", (2000, 50))
    rows = [{"text": f"word{i % 7} word{i % 11} stone", "source": "web"} for i in range(300)]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dsir = Dsir(buckets=1000).fit(target=["word3 stone"], raw=pool)
    dsir.score(pool, tmp_path / "scores", part=(0, 3))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "scores" / "shards").iterdir()}
    folder = score_with_ray(dsir, pool, tmp_path / "scores", workers=2)
    assert not folder.missing() and len(folder.shards) > 2 * len(before)
    for name, changed in before.items():
        assert (tmp_path / "scores" / "shards" / name).stat().st_mtime_ns == changed
    assert np.array_equal(dsir.log_weights(pool, out_dir=tmp_path / "scores"), dsir.log_weights(pool))

    broken = tmp_path / "broken.jsonl"
    broken.write_text(pool.read_text() + '{"text": 1}\n')
    with pytest.raises(
        DataSelectionError, match=r"1 of \d+ shards failed; the first: .*broken\.jsonl:301.*1 is neither"
    ):
        score_with_ray(dsir, broken, tmp_path / "other", workers=2)
