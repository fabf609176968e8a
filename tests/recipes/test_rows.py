import gzip
import json
from importlib.resources import files

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from krontune.data_selection import DataSelectionError
from krontune.recipes.rows import fingerprint, read_sources, source_rows, tokenize
from krontune.recipes.schema_sources import Columns, HubTexts, Puzzles, Shipped
from krontune.rl.tasks.worked import worked_examples


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- from sources to rows


def test_sources_are_read_one_after_the_other_and_each_row_names_its_own(tmp_path):
    first = lines(tmp_path / "first.jsonl", [{"text": "a"}, {"text": "b", "source": "theirs"}])
    (tmp_path / "second.txt").write_text("c\nd\n")
    rows = read_sources([str(tmp_path / "second.txt"), first], "raw")
    assert [row["text"] for row in rows] == ["c", "d", "a", "b"]
    assert [row["source"] for row in rows] == [str(tmp_path / "second.txt")] * 2 + [first, "theirs"]


def test_a_row_whose_source_is_null_or_empty_counts_as_its_files(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a", "source": None}, {"text": "b", "source": ""}, {"text": "c"}])
    assert [row["source"] for row in read_sources([path], "raw")] == [path] * 3
    columns = Columns(path=path, text="text")
    assert [row["source"] for row in read_sources([columns], "raw")] == [path] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_a_data_set_fill_a_template_or_are_taken_as_they_are(tmp_path, stream):
    lines(tmp_path / "train.jsonl", [{"q": "why", "a": "so"}, {"q": "how", "a": "thus"}])
    filled = HubTexts(hub=str(tmp_path), text="{q}? {a}.")
    assert [row["text"] for row in source_rows(filled, "raw", stream)] == ["why? so.", "how? thus."]
    with pytest.raises(DataSelectionError, match=r"train\[0\]: no text in the columns"):
        list(source_rows(HubTexts(hub=str(tmp_path)), "raw", stream))
    with pytest.raises(DataSelectionError, match=r"train\[0\]: column 'b' of text: there is no such column"):
        list(source_rows(HubTexts(hub=str(tmp_path), text="b"), "raw", stream))
    with pytest.raises(DataSelectionError, match="cannot be loaded.*nosuch"):
        list(source_rows(HubTexts(hub=str(tmp_path), split="nosuch"), "raw", stream))


def test_the_shipped_text_is_all_of_the_file():
    packed = files("krontune.recipes.data") / "prose.jsonl.gz"
    expected = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    assert read_sources([Shipped(shipped="prose")], "raw") == expected


def test_puzzles_become_one_turn_of_chat_and_carry_their_kind():
    source = Puzzles.model_validate({"puzzles": ["lis", "sorting"], "size": 3, "n": [4, 4], "split": "test", "seed": 5})
    rows = read_sources([source], "raw")
    assert [row["source"] for row in rows] == ["lis"] * 3 + ["sorting"] * 3
    for row, puzzle in zip(rows[:3], worked_examples("lis", 3, 5, [4, 4], "test"), strict=True):
        assert row["prompt"] == [{"role": "user", "content": puzzle["prompt"]}]
        assert row["completion"] == [{"role": "assistant", "content": puzzle["completion"]}]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"text": "a"}\n{"text": "b"\n', "rows.jsonl:2: not JSON"),
        ('{"text": "a"}\n\n[1]\n', "rows.jsonl:3: a list, not an object"),
        ('{"txt": "a"}\n', "rows.jsonl:1: no text in the columns"),
        ('{"text": "a"}\n{"text": null}\n', "rows.jsonl:2, column 'text': None is neither"),
    ],
)
def test_a_broken_line_is_named_with_file_and_number(tmp_path, content, fault):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataSelectionError) as caught:
        read_sources([str(tmp_path / "rows.jsonl")], "raw")
    assert str(caught.value).startswith(f"{tmp_path}/{fault}")


def test_a_missing_file_is_named_with_the_key_it_stands_under(tmp_path):
    with pytest.raises(DataSelectionError, match=r"^target: there is no file .*gone.jsonl"):
        read_sources([str(tmp_path / "gone.jsonl")], "target")


def test_a_fingerprint_is_of_content_and_order_and_not_of_the_order_of_columns():
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    assert fingerprint(rows) == fingerprint([{"n": 1, "text": "a"}, {"n": 2, "text": "b"}])
    others = [rows[::-1], rows[:1], [*rows, {"text": ""}], [{"text": "a", "n": 1}, {"text": "b", "n": "2"}], []]
    assert len({fingerprint(other) for other in [rows, *others]}) == 6


# ---------------------------------------------------------------- from rows to tokens


def learned(row, tokenizer) -> str:
    """The text of the tokens that are learned; the others must be exactly those labelled -100."""
    ids, labels = (tokenize(row, tokenizer)[key] for key in ("input_ids", "labels"))
    assert len(ids) == len(labels) and all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


def whole(row, tokenizer) -> str:
    return tokenizer.decode(tokenize(row, tokenizer)["input_ids"])


def turn(role, content):
    return {"role": role, "content": content}


def test_all_of_a_text_and_the_end_are_learned(tokenizer):
    row = {"text": "Once upon a time.\n", "source": "x"}
    assert learned(row, tokenizer) == whole(row, tokenizer) == "Once upon a time.\n" + tokenizer.eos_token


def test_of_strings_the_completion_and_the_end_are_learned(tokenizer):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert whole(row, tokenizer) == "2 + 2 = 4" + tokenizer.eos_token
    assert learned(row, tokenizer) == " 4" + tokenizer.eos_token


@pytest.mark.parametrize("form", ["<s> $A", "<s> $A </s>", "$A"])
def test_what_the_tokenizer_adds_at_the_start_stays_and_the_end_comes_once(form):
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    start = [0] if "<s>" in form else []
    assert tokenize({"text": "a b"}, tokenizer)["input_ids"] == [*start, 3, 4, 1]
    if "</s>" not in form:
        tokens = tokenize({"prompt": "a", "completion": "b"}, tokenizer)
        assert tokens == {"input_ids": [*start, 3, 4, 1], "labels": [-100] * len([*start, 3]) + [4, 1]}


def test_of_chat_prompts_the_completion_is_learned_and_the_whole_is_as_the_template_renders_it(tokenizer):
    prompt, completion = [turn("user", "How many?"), turn("assistant", "Of what?"), turn("user", "Rows")], "Three."
    row = {"prompt": prompt, "completion": [turn("assistant", completion)]}
    rendered = tokenizer.apply_chat_template([*prompt, turn("assistant", completion)], tokenize=False)
    assert whole(row, tokenizer) == rendered
    assert learned(row, tokenizer) == rendered[rendered.index(completion) :] == "Three.<|im_end|>\n"


def test_of_messages_every_assistant_turn_is_learned_and_nothing_else(tokenizer):
    messages = [turn("system", "S"), turn("user", "U"), turn("assistant", "A one"), turn("user", "V")]
    row = {"messages": [*messages, turn("assistant", "A two")]}
    assert learned(row, tokenizer) == "A one<|im_end|>\nA two<|im_end|>\n"
    assert whole(row, tokenizer) == tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert learned({"messages": messages}, tokenizer) == "A one<|im_end|>\n"
    assert whole({"messages": messages}, tokenizer).endswith("A one<|im_end|>\n"), "a last question teaches nothing"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"title": "a", "source": "x"}, r"the columns \['source', 'title'\] cannot be trained on"),
        ({"prompt": "a", "completion": [turn("assistant", "b")]}, "both strings or both lists"),
        ({"prompt": "a"}, "cannot be trained on"),
        ({"messages": [turn("user", "a")]}, "no message of the row is the assistant's"),
        ({"messages": []}, "no message of the row is the assistant's"),
        ({"messages": [{"content": "a"}, turn("assistant", "b")]}, "has no 'role'"),
    ],
)
def test_a_row_that_teaches_nothing_is_refused(tokenizer, row, fault):
    with pytest.raises(DataSelectionError, match=fault):
        tokenize(row, tokenizer)


def test_chat_without_a_chat_template_is_refused_and_text_is_not(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataSelectionError, match="no chat template"):
        tokenize({"messages": [turn("user", "a"), turn("assistant", "b")]}, tokenizer)
    assert learned({"text": "a"}, tokenizer) == "a" + tokenizer.eos_token


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(tokenizer, monkeypatch):
    """As some reasoning models' templates do, which drop what was thought in earlier turns."""
    forgetful = (
        "{% for m in messages %}{{ m['role'] }}:\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", forgetful)
    one = [turn("user", "a"), turn("assistant", "b")]
    assert learned({"messages": one}, tokenizer) == "b\n"
    with pytest.raises(DataSelectionError, match="tokens of earlier turns"):
        tokenize({"messages": [*one, *one]}, tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        '{"messages": "hello"}',
        '{"messages": []}',
        '{"messages": [{"role": 1, "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "assistant", "content": null}]}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"text": "\\ud800 abc"}',
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_with_its_file_and_line(row, tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text('{"text": "fine"}\n' + row + "\n")
    with pytest.raises(DataSelectionError, match=r"pool\.jsonl:2: "):
        read_sources([str(file)], "raw")
