"""Every kind of source gives the same texts, and a source that cannot be read says where and why."""

import json
from pathlib import Path

import datasets
import pytest

from krontune.data_selection import DataSelectionError
from krontune.data_selection.texts import read_texts, row_text, source_name

TEXTS = ["first text", "", "third, with ümlaut", 'quotes " and \\ slashes']
ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_list_of_texts_is_read_as_it_is():
    assert list(read_texts(TEXTS)) == TEXTS
    assert list(read_texts(tuple(TEXTS))) == TEXTS
    assert list(read_texts(text for text in TEXTS)) == TEXTS


def test_rows_datasets_and_streams_give_the_same_texts():
    dataset = datasets.Dataset.from_list(ROWS)
    assert list(read_texts(ROWS)) == TEXTS
    assert list(read_texts(dataset)) == TEXTS
    assert list(read_texts(dataset.with_format("arrow"))) == TEXTS
    assert list(read_texts(dataset.to_iterable_dataset())) == TEXTS


def test_jsonl_parquet_and_txt_give_the_same_texts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.txt").write_bytes("\r\n".join(TEXTS).encode())
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        assert list(read_texts(tmp_path / name)) == TEXTS
        assert list(read_texts(str(tmp_path / name))) == TEXTS


def test_a_list_of_paths_is_the_files_one_after_the_other(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = tmp_path / "b.txt"
    second.write_text("last\n")
    assert list(read_texts([first, second])) == [*TEXTS, "last"]
    assert list(read_texts([str(first), str(second)])) == [*TEXTS, "last"]


def test_texts_that_mention_files_are_texts():
    texts = ["see a.jsonl", "or this"]
    assert list(read_texts(texts)) == texts
    assert list(read_texts(["two lines\nend in a.txt"])) == ["two lines\nend in a.txt"]


def test_many_rows_keep_their_order():
    texts = [str(i) for i in range(2500)]
    assert list(read_texts(datasets.Dataset.from_dict({"text": texts}))) == texts


def test_messages_become_one_text():
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "text", "text": "answer"}, {"type": "image"}]},
    ]
    assert row_text({"messages": messages}, "row") == "question\n\nanswer"


def test_prompt_and_completion_become_one_text_plain_or_as_messages():
    plain = {"prompt": "question", "completion": "answer"}
    chat = {name: [{"role": "user", "content": text}] for name, text in plain.items()}
    assert row_text(plain, "row") == row_text(chat, "row") == "question\nanswer"
    assert list(read_texts(datasets.Dataset.from_list([plain]))) == ["question\nanswer"]
    assert list(read_texts(datasets.Dataset.from_list([chat]))) == ["question\nanswer"]


def test_text_goes_before_messages():
    assert row_text({"text": "text", "messages": []}, "row") == "text"


def test_blank_lines_of_jsonl_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": "b"}\n\n')
    assert list(read_texts(tmp_path / "a.jsonl")) == ["a", "b"]


@pytest.mark.parametrize("line", [b'{"text": "cut', b"\xff\xfe", b"[1, 2]", b'{"other": 1}', b'{"text": null}'])
def test_a_broken_jsonl_line_is_named_by_file_and_number(tmp_path, line):
    (tmp_path / "pool.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataSelectionError, match=r"pool\.jsonl:3"):
        list(read_texts(tmp_path / "pool.jsonl"))


def test_a_txt_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "pool.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(DataSelectionError, match=r"pool\.txt:2: not UTF-8"):
        list(read_texts(tmp_path / "pool.txt"))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "pool.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataSelectionError, match=r"pool\.parquet: not a parquet file"):
        list(read_texts(tmp_path / "pool.parquet"))


def test_a_missing_column_lists_the_columns_there_are(tmp_path):
    dataset = datasets.Dataset.from_dict({"body": ["a"], "prompt": ["b"]})
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    for source in (dataset, tmp_path / "a.parquet", [{"body": "a", "prompt": "b"}]):
        with pytest.raises(DataSelectionError, match=r"\['body', 'prompt'\].*'messages'"):
            list(read_texts(source))


def test_a_null_text_is_named_by_its_row(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["a", None]})
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    for source in (dataset, tmp_path / "a.parquet"):
        with pytest.raises(DataSelectionError, match=r"row 1, column 'text': None"):
            list(read_texts(source))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.jsonl", "no file 'no/such.jsonl'"),
        (["no/such.jsonl", "nor/such.txt"], "no file 'no/such.jsonl'"),
        (Path("data.csv"), r"'data.csv' does not end in one of .jsonl, .jsonl.gz, .jsonl.zst, .parquet"),
        ("just some text", "pass texts as a list"),
        (b"bytes", "is a bytes"),
        (None, "is a NoneType"),
        (7, "is a int"),
        (["a", 7], "item 1: 7 is a int"),
        (["a", None], "item 1: None is a NoneType"),
        ({"text": ["a"]}, r"a mapping with the keys \['text'\]"),
        ([{"messages": "x", "text": 3}], "3 is neither a string nor a list of messages"),
        ([{"messages": ["x"]}], "message 0: 'x' is no message"),
    ],
)
def test_what_cannot_be_read_says_so(source, message):
    with pytest.raises(DataSelectionError, match=f"pool.*{message}"):
        list(read_texts(source, "pool"))


def test_a_dataset_dict_is_its_only_split_or_train():
    rows = datasets.Dataset.from_list(ROWS)
    other = datasets.Dataset.from_dict({"text": ["other"]})
    assert list(read_texts(datasets.DatasetDict(anything=rows))) == TEXTS
    assert list(read_texts(datasets.DatasetDict(test=other, train=rows))) == TEXTS
    with pytest.raises(DataSelectionError, match=r"\['test', 'dev'\]; pass one"):
        list(read_texts(datasets.DatasetDict(test=other, dev=rows)))


def test_a_data_frame_is_not_taken_for_its_column_names():
    frame = datasets.Dataset.from_list(ROWS).to_pandas()
    with pytest.raises(DataSelectionError, match="DataFrame"):
        list(read_texts(frame))
    assert list(read_texts(frame["text"])) == TEXTS


def test_a_source_of_files_is_called_by_their_names():
    assert source_name("a/b.jsonl", "else") == "b.jsonl"
    assert source_name([Path("a/b.jsonl"), Path("c.txt")], "else") == "b.jsonl, c.txt"
    assert source_name(["a text"], "else") == "else"
