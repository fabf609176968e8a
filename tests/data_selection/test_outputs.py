"""Rows of a selection in files and on a Hub that stands in for the real one."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml
from pyarrow import parquet

from krontune.data_selection import DataSelectionError, Dsir, Selection, outputs
from krontune.data_selection.outputs import card

ROWS = [{"text": f"word{i % 5} stone {i}", "id": i, "tags": ["x"] * (i % 3)} for i in range(40)]


@pytest.fixture
def pools(tmp_path):
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(str(tmp_path / "pool.parquet"))
    return {
        "rows": ROWS,
        "jsonl": tmp_path / "pool.jsonl",
        "parquet": [tmp_path / "pool.parquet"],
        "dataset": dataset,
        "splits": datasets.DatasetDict(train=dataset),
    }


def test_files_hold_the_picked_rows_of_any_pool(tmp_path, pools):
    for name, pool in pools.items():
        dsir = Dsir(buckets=500).fit(target=["word3 stone"], raw=pool)
        picked = dsir.select(pool, k=7)
        expected = [ROWS[i] for i in picked.indices]
        assert list(picked.rows()) == expected, name
        picked.write(tmp_path / "out" / "picked.jsonl")
        assert [json.loads(line) for line in (tmp_path / "out" / "picked.jsonl").open()] == expected
        picked.write(tmp_path / "out" / "picked.parquet")
        assert datasets.Dataset.from_parquet(str(tmp_path / "out" / "picked.parquet")).to_list() == expected
        picked.save(tmp_path / "saved")
        assert list(Selection.load(tmp_path / "saved").rows(pool)) == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["picked.jsonl", "picked.parquet"]


def test_a_file_that_was_changed_after_the_pick_is_noticed_though_it_has_as_many_rows(tmp_path, pools):
    pool = pools["jsonl"]
    picked = Dsir(buckets=500).fit(target=["word3 stone"], raw=pool).select(pool, k=7)
    rows = list(picked.rows())
    pool.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    for changed in (picked, picked.control):
        with pytest.raises(DataSelectionError, match=r"pool\.jsonl was changed after it was picked from"):
            list(changed.rows())
    with pytest.raises(DataSelectionError, match="was changed"):
        picked.write(tmp_path / "out.jsonl", [str(pool)])
    assert not (tmp_path / "out.jsonl").exists()
    assert list(picked.rows(ROWS)) == rows, "the pool as it was"
    pool.unlink()
    with pytest.raises(DataSelectionError, match="there is no file"):
        list(picked.rows())


def test_a_pool_of_strings_gives_rows_with_text():
    pool = ["word1", "word2", "stone"]
    picked = Dsir(buckets=50).fit(target=["stone age"], raw=pool).select(pool, k=1, method="topk")
    assert list(picked.rows()) == [{"text": "stone"}]


def test_dates_and_half_surrogates_are_written(tmp_path):
    rows = [{"text": "a\ud800", "when": datetime.date(2020, 1, 2)}]
    Dsir(buckets=50).fit(target=["a b"], raw=rows).select(rows, k=1).write(tmp_path / "a.jsonl")
    assert b'"when": "2020-01-02"' in (tmp_path / "a.jsonl").read_bytes()


def test_what_cannot_be_written_leaves_nothing(tmp_path, pools):
    picked = Dsir(buckets=500).fit(target=["word3 stone"], raw=ROWS).select(pools["jsonl"], k=7)
    with pytest.raises(DataSelectionError, match="must end in .jsonl or .parquet"):
        picked.write(tmp_path / "out.csv")
    late = tmp_path / "late.jsonl"
    late.write_text(pools["jsonl"].read_text() + '{"text": "late"}\n')
    for name in ("out.jsonl", "out.parquet"):
        with pytest.raises(DataSelectionError, match="the pool had 40 rows and has 41"):
            picked.write(tmp_path / name, late)
    picked.save(tmp_path / "saved")
    with pytest.raises(DataSelectionError, match="does not hold its pool"):
        Selection.load(tmp_path / "saved").write(tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out*"))


class FakeApi:
    def __init__(self):
        self.files, self.created = {}, None

    def create_repo(self, repo_id, **options):
        self.created = (repo_id, options)

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in paths}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_a_push_holds_rows_selection_and_card(tmp_path):
    dsir = Dsir(buckets=500).fit(target=["word3 stone"], raw=ROWS)
    picked, api = dsir.select(ROWS, k=7), FakeApi()
    assert picked.push_to_hub("me/picked", dsir=dsir, api=api) == "https://hub/me/picked/commit/1"
    assert api.created == ("me/picked", {"repo_type": "dataset", "private": True, "exist_ok": True})
    names = ["README.md", "data/train.parquet", "selection/picks.jsonl", "selection/selection.json"]
    assert sorted(api.files) == names
    (tmp_path / "train.parquet").write_bytes(api.files["data/train.parquet"])
    assert datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).to_list() == list(picked.rows())
    text = api.files["README.md"].decode()
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/train.parquet"}]
    for fact in ("| rows picked | 7 |", "| seed | 0 |", "| buckets | 500 |", "| targets | target |", "random pick"):
        assert fact in text


def test_the_card_does_without_an_estimator(tmp_path):
    Dsir(buckets=500).fit(target=["word3 stone"], raw=ROWS).select(ROWS, k=7).save(tmp_path)
    assert "| pool | not recorded |" in card(Selection.load(tmp_path))


def test_the_real_client_makes_one_private_commit_of_the_rows(hub, tmp_path):
    """Through huggingface_hub to a server on this machine: what would go over the wire."""
    picked = Dsir(buckets=500).fit(target=["word3 stone"], raw=ROWS).select(ROWS, k=7)
    address = picked.push_to_hub("me/picked")
    repo = hub.dataset("me/picked")
    assert address == f"{hub.url}/datasets/me/picked/commit/{repo.sha}"
    assert repo.private and len(repo.commits) == 2
    (tmp_path / "train.parquet").write_bytes(repo.files["data/train.parquet"])
    assert datasets.Dataset.from_parquet(str(tmp_path / "train.parquet")).to_list() == list(picked.rows())
    assert "| rows picked | 7 |" in repo.files["README.md"].decode()
    picked.push_to_hub("me/picked")
    assert len(repo.commits) == 2, "nothing changed"


MIXED = [{"text": f"word{i % 3} stone {i}"} for i in range(6)]
MIXED += [{"prompt": f"word3 stone {i}?", "completion": f"stone {i}", "n": i} for i in range(6)]


@pytest.mark.parametrize("group", [4, 10_000])
def test_a_pool_of_two_kinds_of_rows_keeps_the_content_of_both(tmp_path, monkeypatch, group):
    """In groups of four, no group but the second has all columns."""
    monkeypatch.setattr(outputs, "GROUP_ROWS", group)
    picked, api = Dsir(buckets=500).fit(target=["word3 stone"], raw=MIXED).select(MIXED, k=12), FakeApi()
    picked.write(tmp_path / "picked.parquet")
    picked.write(tmp_path / "once.parquet", iter(MIXED))
    picked.push_to_hub("me/picked", api=api)
    (tmp_path / "pushed.parquet").write_bytes(api.files["data/train.parquet"])
    for name in ("picked.parquet", "once.parquet", "pushed.parquet"):
        rows = parquet.read_table(tmp_path / name).to_pylist()
        assert [{key: value for key, value in row.items() if value is not None} for row in rows] == MIXED, name


def test_a_column_of_two_types_is_named_before_anything_is_written(tmp_path):
    rows = [{"text": "word3 stone", "id": 1}, {"text": "stone", "id": "one"}]
    picked = Dsir(buckets=500).fit(target=["word3 stone here"], raw=rows).select(rows, k=2)
    with pytest.raises(DataSelectionError, match="do not go into one parquet file.*write .jsonl"):
        picked.write(tmp_path / "picked.parquet")
    assert not list(tmp_path.iterdir())
