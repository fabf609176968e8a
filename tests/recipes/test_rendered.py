"""What check shows of the data, and what it refuses where the model cannot hold it."""

import io

import pytest
from rich.console import Console
from transformers import LlamaConfig

from krontune.recipes.loader import load
from krontune.recipes.preflight import check
from krontune.recipes.preview import adapter_lines, styled
from krontune.recipes.rendered import SHOWN, Rendered, load_tokenizer, longest_prompt, rendered_rows, sft_row

from .conftest import write_rows

CHAT = {
    "messages": [
        {"role": "user", "content": "Say one."},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Say two."},
        {"role": "assistant", "content": "Two."},
    ]
}


def faults_of(file, *overrides):
    return [str(fault).replace(str(file), "r") for fault in check(load(file, overrides))]


def short_context(tmp_path, tokenizer, positions=128):
    """A model of few positions, with the embedded model's tokenizer, as a folder."""
    config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=positions, vocab_size=len(tokenizer))
    config.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    return "base.model=./short"


def test_a_row_marks_what_the_assistant_says_and_names_the_columns(small, tmp_path, tokenizer):
    write_rows(tmp_path / "chat.jsonl", [CHAT])
    recipe = load(small, ["stages.sft.data=chat.jsonl"])
    sft, rl = rendered_rows(recipe)
    assert sft.title.startswith("sft, a row with the columns source, messages: ") and sft.title.endswith(" trained")
    assert [text.strip() for text, trained in sft.pieces if trained] == ["One.<|im_end|>", "Two.<|im_end|>"]
    assert "[[One.<|im_end|>" in sft.plain() and "Say two." in sft.plain()
    assert rl.title.startswith("rl, a prompt of ") and "given the columns completion, instance" in rl.title
    assert rl.plain().endswith("<|im_start|>assistant") and "Choose the most rows" in rl.plain()


def test_a_row_is_cut_where_the_trainer_cuts_it(small, tokenizer):
    recipe = load(small, ["stages.sft.trainer.max_length=5"])
    text = "one two three four five six seven eight"
    row = sft_row({"text": text}, recipe.stage("sft"), tokenizer, "sft")
    assert ": 5 tokens of " in row.title and "cut at max_length, 5 trained" in row.title
    assert row.pieces == [("one two three four five", True)]


def test_long_pieces_are_cut_in_the_middle():
    row = Rendered("title", [("a" * SHOWN + "b" * 1000 + "c" * (SHOWN // 3), False)])
    assert row.plain() == f"title\n{'a' * SHOWN} ... 1000 characters ... {'c' * (SHOWN // 3)}"


def test_a_terminal_gets_colours_and_no_marks():
    row = Rendered("title", [("asked ", False), ("said", True)])
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=80).print(styled(row))
    assert "\x1b[1;32msaid" in out.getvalue() and "[[" not in out.getvalue()


def test_the_adapter_of_each_stage_is_told(small):
    first, *others = adapter_lines(load(small, ["stages.sft.adapter.target_modules=[k_proj]"]))
    assert first.startswith("sft adapter: 30 modules, ") and "trainable parameters (0." in first
    assert others == ["  30 of 192 x 576: 16x18 (x) 12x32, 24x16 (x) 8x36, 16x24 (x) 12x24, 12x24 (x) 16x24, "
                      "24x12 (x) 8x48"]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.trainer.max_length=129", "max_length is 129 and the model's context 128; give at most that"),
        ("stages.sft.trainer.max_length=128", None),
        ("stages.rl.trainer.max_completion_length=100", "tokens and max_completion_length 100 do not fit the model's"),
        ("stages.verify.max_new_tokens=128", "max_new_tokens is 128 and the model's context 128; leave room"),
    ],
)
def test_lengths_beyond_the_context_are_faults(small, tmp_path, tokenizer, override, message):
    model = short_context(tmp_path, tokenizer)
    lengths = ["stages.rl.trainer.max_completion_length=8", "stages.verify.max_new_tokens=8"]
    faults = faults_of(small, model, *lengths, override)
    assert len(faults) == (message is not None) and all(message in fault for fault in faults)


def test_completions_of_trl_s_default_length_count_too(small, tmp_path, tokenizer):
    [fault] = faults_of(small, short_context(tmp_path, tokenizer, 256))
    assert "max_completion_length 512 do not fit the model's context of 256; give at most 1" in fault


def test_messages_for_a_model_without_a_chat_template_are_a_fault_of_each_stage(small, tmp_path, tokenizer):
    model = short_context(tmp_path, tokenizer, 4096)
    (tmp_path / "short" / "chat_template.jinja").unlink()
    write_rows(tmp_path / "chat.jsonl", [CHAT])
    sft, rl = faults_of(small, model, "stages.sft.data=chat.jsonl")
    assert "tokenizer has no chat template" in sft and sft.startswith("override 'stages.sft.data")
    assert "tokenizer has no chat template" in rl and rl.startswith("r:11:5")


def test_the_longest_of_some_prompts_is_found(tokenizer):
    rows = [{"prompt": "one"}, {"prompt": "one two three"}, {"prompt": "one two"}]
    assert longest_prompt(rows, tokenizer) == 3 and longest_prompt([], tokenizer) == 0


def test_a_folder_without_a_tokenizer_shows_no_row(small, tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bare")
    recipe = load(small, ["base.model=./bare"])
    assert load_tokenizer(recipe.base) is None and list(rendered_rows(recipe)) == []


# ---------------------------------------------------------------- what excludes each other


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.rl.credit={}", "stages.rl.trainer.importance_sampling_level=sequence"], "erases token credit"),
        (["stages.rl.risk={weight: 0.6}"], "weight 0.6 with the 0/1 reward 'certificate' leaves seldom solved"),
    ],
)
def test_what_excludes_each_other_is_refused_with_the_reason(small, overrides, message):
    [fault] = faults_of(small, *overrides)
    assert message in fault
