"""A pool read in shards gives the texts of `read_texts`, in its order, and names what cannot be read."""

import gzip
import json
import random

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from krontune.data_selection import DataSelectionError
from krontune.data_selection import shards as module
from krontune.data_selection.shards import fingerprint, plan, read_all, read_batches
from krontune.data_selection.texts import read_texts

TEXTS = ["first text", "", "third, with ümlaut", 'quotes " and \\ slashes', "tab\tand\nline", "中文", "x" * 50]


def random_rows(seed, n=60):
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(TEXTS, k=rng.randrange(4))), "n": i, "source": "ab"[i % 2]} for i in range(n)]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows)).encode()


def texts_of(source, shards=None):
    shards = plan(source, "raw") if shards is None else shards
    found = []
    for shard in shards:
        for batch in read_batches(source, shard, "raw"):
            found += batch.texts if isinstance(batch.texts, list) else batch.texts.to_pylist()
    return found


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def write_all_formats(folder, rows):
    texts = [row["text"].replace("\n", " ") for row in rows]
    lines = "".join(text + "\r\n" for text in texts).encode()
    contents = {
        "a.jsonl": jsonl(rows),
        "a.jsonl.gz": gzip.compress(jsonl(rows)),
        "a.jsonl.zst": zstd(jsonl(rows)),
        "a.txt": lines,
        "a.txt.gz": gzip.compress(lines),
        "a.txt.zst": zstd(lines),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
    return {name: texts if ".txt" in name else [row["text"] for row in rows] for name in [*contents, "a.parquet"]}


@pytest.mark.parametrize("size", [1, 13, 100, 1000, 64 << 20])
@pytest.mark.parametrize("block", [1, 50, 4 << 20])
def test_every_format_gives_its_texts_in_shards_of_any_size(tmp_path, monkeypatch, size, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    for name, expected in write_all_formats(tmp_path, random_rows(size)).items():
        path = tmp_path / name
        assert list(read_texts(path)) == expected
        shards = plan(path, "raw", size)
        assert texts_of(path, shards) == expected, name
        if name in ("a.jsonl", "a.txt", "a.parquet") and size <= 100:
            assert len(shards) > 5


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_sources_in_memory_give_their_texts_in_shards_of_any_size(rows):
    listed = random_rows(5)
    expected = [row["text"] for row in listed]
    dataset = datasets.Dataset.from_list(listed)
    sources = (listed, tuple(expected), dataset, dataset.shuffle(seed=0), datasets.DatasetDict(train=dataset))
    for source in sources:
        shards = plan(source, "raw", rows=rows)
        assert texts_of(source, shards) == list(read_texts(source))
        assert len(shards) == -(-60 // rows)
    stream = dataset.to_iterable_dataset()
    assert texts_of(stream) == expected


def test_chat_rows_and_prompts_are_read_from_every_format(tmp_path):
    chat = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    pairs = [{"prompt": f"q{i}", "completion": "a"} for i in range(9)]
    for rows in (chat, pairs):
        (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", datasets.Dataset.from_list(rows), rows):
            assert texts_of(source) == [f"q{i}\na" for i in range(9)]


def test_rows_of_mixed_forms_are_read_in_one_file(tmp_path):
    rows = [{"text": "plain"}, {"prompt": "q", "completion": "a"}, {"text": "again", "source": 7}, {"text": "\ud800"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n \n")
    assert texts_of(tmp_path / "a.jsonl") == ["plain", "q\na", "again", "\ud800"]


def test_sources_of_rows_are_kept(tmp_path):
    rows = random_rows(1, 20)
    write_all_formats(tmp_path, rows)
    wanted = [row["source"] for row in rows]
    for source in (tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst", tmp_path / "a.parquet", rows):
        assert [name for batch in read_all(source, "raw") for name in batch.sources or ()] == wanted
    assert [batch.sources for batch in read_all(tmp_path / "a.txt", "raw")] == [None]
    batch = next(read_all([{"text": "a", "source": None}, {"text": "b", "source": 3}], "raw"))
    assert batch.sources == ["", "3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b"[1, 2]", "a list, not an object"),
        (b'{"other": 1}', r"no text in the columns \['other'\]"),
        (b'{"text": null}', "None is neither"),
        (b'{"text": 5}', "5 is neither"),
    ],
)
@pytest.mark.parametrize("size", [20, 64 << 20])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_broken_line_is_named_by_file_and_number(tmp_path, monkeypatch, line, message, size, ending):
    monkeypatch.setattr(module, "BLOCK_BYTES", 30)
    path = tmp_path / f"pool.jsonl{ending}"
    content = b'{"text": "fine"}\n\n' * 5 + line + b'\n{"text": "fine"}\n'
    path.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(DataSelectionError, match=rf"pool\.jsonl{ending}:11: {message}|:11.*{message}"):
        texts_of(path, plan(path, "raw", size))


def test_a_txt_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "pool.txt").write_bytes(b"fine\n" * 7 + b"caf\xe9\n")
    with pytest.raises(DataSelectionError, match=r"pool\.txt:8: not UTF-8"):
        texts_of(tmp_path / "pool.txt", plan(tmp_path / "pool.txt", "raw", 10))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path, name):
    rows = [{"text": f"{random.Random(i).random()} text {i}"} for i in range(3000)]
    write_all_formats(tmp_path, rows)
    content = (tmp_path / name).read_bytes()
    if name == "a.parquet":
        (tmp_path / name).write_bytes(content[:50] + bytes(500) + content[550:])
    else:
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    for read in (texts_of, lambda path: list(read_texts(path))):
        with pytest.raises(DataSelectionError, match=rf"{name}: cannot be read: .* cut short"):
            read(tmp_path / name)


def test_a_null_is_named_by_its_row(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [*"abcdefgh", None]})
    parquet.write_table(dataset.data.table, tmp_path / "a.parquet", row_group_size=4)
    for source in (dataset, tmp_path / "a.parquet"):
        with pytest.raises(DataSelectionError, match="row 8, column 'text': None"):
            texts_of(source)


def test_fingerprints_follow_the_content_and_not_the_place(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(jsonl(random_rows(0)))
    import os

    for folder in ("x", "y"):
        os.utime(tmp_path / folder / "a.jsonl", (1, 1))
    first = fingerprint(tmp_path / "x" / "a.jsonl", "raw")
    assert first == fingerprint(tmp_path / "y" / "a.jsonl", "raw")
    with (tmp_path / "x" / "a.jsonl").open("ab") as file:
        file.write(b"{}")
    assert first != fingerprint(tmp_path / "x" / "a.jsonl", "raw")
    dataset = datasets.Dataset.from_list(random_rows(0))
    assert fingerprint(dataset, "raw") != fingerprint(dataset.select(range(59)), "raw")
    assert fingerprint(["a", "bc"], "raw") != fingerprint(["ab", "c"], "raw")
    with pytest.raises(DataSelectionError, match="raw is a list_iterator, which cannot be cut"):
        fingerprint(iter(["a"]), "raw")
