"""Scores in a folder: the same as in memory, resumed after any death, refused when they are of something else."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from krontune.data_selection import DataSelectionError, Dsir
from krontune.data_selection import scoring as module
from krontune.data_selection import shards as shards_module
from krontune.data_selection.sampling import ShardScores
from krontune.data_selection.scoring import ScoreFolder
from krontune.data_selection.shards import Shard

WORDS = [f"word{i}" for i in range(300)]


def texts(n, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 30))) for _ in range(n)]


def write_pool(folder, n=400, files=2):
    paths = []
    for number in range(files):
        paths.append(folder / f"part-{number}.jsonl")
        rows = ({"text": text, "source": "ab"[number % 2]} for text in texts(n, number))
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module.plan, "__defaults__", (5000, 90))


@pytest.fixture
def fitted():
    return Dsir(buckets=5000).fit(target={"a": texts(20, 8), "b": texts(20, 9)}, raw=texts(300, 7))


def state(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


@pytest.mark.parametrize(
    ("kind", "num_proc"), [("files", 1), ("files", 2), ("dataset", 1), ("dataset", 2), ("list", 1)]
)
def test_a_folder_holds_the_weights_of_memory_to_the_bit(tmp_path, small_shards, fitted, kind, num_proc):
    pool = {"files": write_pool(tmp_path), "list": texts(500)}.get(kind) or datasets.Dataset.from_dict(
        {"text": texts(500)}
    )
    in_memory = fitted.log_weights(pool)
    assert np.array_equal(fitted.log_weights(pool, num_proc=num_proc, out_dir=tmp_path / "scores"), in_memory)
    assert len(state(tmp_path / "scores")) > 5
    picked = fitted.select(pool, k=50, temperature=20.0)
    assert fitted.select(pool, k=50, temperature=20.0, out_dir=tmp_path / "scores") == picked
    if kind == "files":
        capped = fitted.select(pool, k=50, source_caps={"a": 10}, out_dir=tmp_path / "scores")
        assert (capped.indices < 400).sum() == 10


def test_processes_without_a_folder_give_the_same(small_shards, fitted):
    pool = texts(200)
    assert np.array_equal(fitted.log_weights(pool, num_proc=2), fitted.log_weights(pool))


def test_a_second_run_scores_only_what_is_missing(tmp_path, small_shards, fitted, monkeypatch):
    pool = write_pool(tmp_path)
    weights = fitted.log_weights(pool, out_dir=tmp_path / "scores")
    before = state(tmp_path / "scores")
    for name in list(before)[::3]:
        (tmp_path / "scores" / "shards" / name).unlink()
    scored = []
    score_shard = module.score_shard
    monkeypatch.setattr(module, "score_shard", lambda *args: scored.append(args[2].number) or score_shard(*args))
    assert np.array_equal(fitted.log_weights(pool, out_dir=tmp_path / "scores"), weights)
    assert [f"{number:08d}.parquet" for number in scored] == list(before)[::3]
    assert state(tmp_path / "scores") == before


def test_machines_share_a_folder(tmp_path, small_shards, fitted):
    pool = write_pool(tmp_path)
    folders = [fitted.score(pool, tmp_path / "scores", part=(i, 3)) for i in (2, 0)]
    assert folders[-1].missing() == list(range(1, len(folders[-1].shards), 3))
    with pytest.raises(DataSelectionError, match=r"\d+ of \d+ shards are not scored yet \(the first is 1\)"):
        list(folders[-1].read())
    assert not fitted.score(pool, tmp_path / "scores", part=(1, 3)).missing()
    weights = np.concatenate([shard.log_weights for shard in folders[0].read()])
    assert np.array_equal(weights, fitted.log_weights(pool))
    for part in ((3, 3), (-1, 2), (0, 0), ("0", 1)):
        with pytest.raises(DataSelectionError, match="part="):
            fitted.score(pool, tmp_path / "scores", part=part)


def test_the_folder_may_be_mounted_elsewhere(tmp_path, small_shards, fitted):
    (tmp_path / "here").mkdir()
    fitted.score(write_pool(tmp_path / "here"), tmp_path / "here" / "scores", part=(0, 2))
    (tmp_path / "here").rename(tmp_path / "there")
    pool = [tmp_path / "there" / f"part-{i}.jsonl" for i in range(2)]
    assert not fitted.score(pool, tmp_path / "there" / "scores").missing()


def test_other_inputs_and_estimators_are_refused(tmp_path, small_shards, fitted):
    pool = write_pool(tmp_path)
    fitted.log_weights(pool, out_dir=tmp_path / "scores")
    other = Dsir(buckets=5000).fit(target={"a": texts(20, 8), "b": texts(19, 9)}, raw=texts(300, 7))
    with pytest.raises(DataSelectionError, match="another estimator"):
        other.log_weights(pool, out_dir=tmp_path / "scores")
    with pytest.raises(DataSelectionError, match="another pool"):
        fitted.log_weights(pool[:1], out_dir=tmp_path / "scores")
    content = pool[0].read_text()
    pool[0].write_text(content.replace("word1 ", "word2 "))
    with pytest.raises(DataSelectionError, match="another pool, or files changed since"):
        fitted.log_weights(pool, out_dir=tmp_path / "scores")


def test_a_shard_of_other_scores_or_damaged_is_refused(tmp_path, small_shards, fitted):
    pool = write_pool(tmp_path)
    fitted.log_weights(pool, out_dir=tmp_path / "one")
    fitted.log_weights(pool[:1], out_dir=tmp_path / "two")
    shard = tmp_path / "one" / "shards" / "00000002.parquet"
    shard.write_bytes((tmp_path / "two" / "shards" / "00000002.parquet").read_bytes())
    with pytest.raises(DataSelectionError, match="00000002.parquet belongs to other scores"):
        fitted.log_weights(pool, out_dir=tmp_path / "one")
    shard.write_bytes(b"PAR1")
    with pytest.raises(DataSelectionError, match="00000002.parquet: cannot be read"):
        fitted.log_weights(pool, out_dir=tmp_path / "one")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_broken_line_ends_the_run_and_keeps_the_other_shards(tmp_path, small_shards, fitted, num_proc):
    pool = write_pool(tmp_path)
    with pool[1].open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(DataSelectionError, match=r"part-1\.jsonl:401.*None"):
        fitted.log_weights(pool, num_proc=num_proc, out_dir=tmp_path / "scores")
    assert state(tmp_path / "scores") and not list((tmp_path / "scores" / "shards").glob("*.tmp"))


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path, small_shards, fitted, monkeypatch):
    pool = write_pool(tmp_path)
    score_shard = module.score_shard

    def appending(*args):
        with pool[1].open("a") as file:
            file.write('{"text": "late"}\n')
        return score_shard(*args)

    monkeypatch.setattr(module, "score_shard", appending)
    with pytest.raises(DataSelectionError, match="files changed since"):
        fitted.log_weights(pool, out_dir=tmp_path / "scores")


KILLED = """
import sys, time
from krontune.data_selection import Dsir
from krontune.data_selection import scoring, shards
shards.plan.__defaults__ = (5000, 90)
write = scoring.ScoreFolder.write
scoring.ScoreFolder.write = lambda self, *args: (time.sleep(0.05), write(self, *args))
Dsir.load(sys.argv[1]).score(sys.argv[3:], sys.argv[2])
"""


def test_a_run_killed_outright_goes_on_with_what_is_missing(tmp_path, small_shards, fitted):
    pool = write_pool(tmp_path)
    fitted.save(tmp_path / "dsir")
    command = [sys.executable, "-c", KILLED, tmp_path / "dsir", tmp_path / "scores", *pool]
    shards = tmp_path / "scores" / "shards"
    with subprocess.Popen(list(map(str, command))) as run:
        while run.poll() is None and not (shards.is_dir() and len(list(shards.glob("0*.parquet"))) >= 3):
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("0*.parquet")}
    assert 3 <= len(done) < 20
    assert np.array_equal(fitted.log_weights(pool, out_dir=tmp_path / "scores"), fitted.log_weights(pool))
    for name, changed in done.items():
        assert (shards / name).stat().st_mtime_ns == changed


def test_a_dead_worker_is_reported_and_its_shard_stays_missing(tmp_path, small_shards, fitted, monkeypatch):
    pool = write_pool(tmp_path)
    monkeypatch.setattr(module, "WORKER", "import sys; sys.stdin.buffer.read(20); raise SystemExit(1)")
    with pytest.raises(DataSelectionError, match="run again to go on"):
        fitted.score(pool, tmp_path / "scores", num_proc=2)
    monkeypatch.undo()
    monkeypatch.setattr(shards_module.plan, "__defaults__", (5000, 90))
    assert not fitted.score(pool, tmp_path / "scores", num_proc=2).missing()


class Death(Exception):
    pass


def test_twenty_thousand_shards_survive_workers_that_die_at_random(tmp_path, monkeypatch):
    """Each shard kills its worker with a chance of 1.5 %: before the work, after it, or before the file is renamed."""
    shards = tuple(Shard(i, "", None, "rows", i, i + 1) for i in range(20_000))
    folder = ScoreFolder(tmp_path, shards, ("t",), "digest")
    (tmp_path / "shards").mkdir()
    rng, renamed = random.Random(0), dict.fromkeys(range(len(shards)), 0)
    replace = os.replace

    def dying_replace(source, target):
        if rng.random() < 0.005:
            raise Death
        replace(source, target)
        renamed[int(Path(target).stem)] += 1

    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(os, "replace", dying_replace)
    # The bytes of a shard are made once: this is about the manifest, not about Parquet.
    monkeypatch.setattr(module, "_to_parquet", lambda scores, names, digest: str(int(scores.tokens[0])).encode())
    parts, launches = [(i, 16) for i in range(16)], 0
    while parts:
        part = rng.choice(parts)
        launches += 1
        try:
            missing = folder.missing(part)
            for number in missing:
                if rng.random() < 0.005:
                    raise Death
                folder.write(number, ShardScores(np.zeros((1, 1)), np.array([number]), np.zeros(1, bool), None))
                if rng.random() < 0.005:
                    raise Death
            parts.remove(part)
        except Death:
            assert launches < 2000, "no end in sight"
    assert launches > 100
    assert set(renamed.values()) == {1}, "lost or done twice"
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [f"{i:08d}.parquet" for i in range(20_000)]
    for number in rng.sample(range(20_000), 50):
        assert folder.file(number).read_text() == str(number)


def test_the_shell_commands_fit_score_in_parts_and_select(tmp_path, small_shards, capsys):
    from krontune.data_selection.__main__ import main

    pool = [str(path) for path in write_pool(tmp_path)]
    (tmp_path / "target.txt").write_text("\n".join(texts(20, 8)))
    dsir, scores, out = str(tmp_path / "dsir"), str(tmp_path / "scores"), tmp_path / "picked.jsonl"
    assert main(["fit", "--target", str(tmp_path / "target.txt"), "--raw", *pool, "--out", dsir]) == 0
    for shard in ("1", "0"):
        common = ["--dsir", dsir, "--raw", *pool, "--scores", scores]
        assert main(["score", *common, "--shard", shard, "--num-shards", "2"]) == 0
    done, total = map(int, capsys.readouterr().out.splitlines()[-1].split(" shards")[0].split(" of "))
    assert done == total > 5
    assert main(["select", *common, "-k", "30", "--seed", "4", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 30
    expected = Dsir().fit(target=tmp_path / "target.txt", raw=pool).select(pool, k=30, seed=4)
    assert [json.loads(line) for line in out.open()] == list(expected.rows())
    assert main(["select", *common, "-k", "9000", "--out", str(out)]) == 2
    assert "error: k=9000" in capsys.readouterr().err
