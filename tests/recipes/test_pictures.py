"""Models that read pictures, from a recipe: a tiny random Idefics3 (SmolVLM's kind) built from a configuration."""

import io
import json
import string

import pyarrow
import pytest
import torch
from peft import PeftModel
from PIL import Image
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from krontune.adapters import load_base
from krontune.data_selection import DataSelectionError, Store
from krontune.data_selection.encoding import collate, encode, images_of
from krontune.recipes import lifelong, needs
from krontune.recipes.chain import run as run_recipe
from krontune.recipes.faults import RecipeError
from krontune.recipes.loader import load
from krontune.recipes.pictures import PictureCollator, as_paths, fitting, holds_pictures, kept, located, picture_lines
from krontune.recipes.plan import plan
from krontune.recipes.preflight import check
from krontune.recipes.rows import tokenize
from krontune.recipes.run_folder import RunError

from .conftest import write_rows

SPECIAL = ["<pad>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}
HEAD = "name: eyes\nbase: {model: ./eyes, quantization: null}\nstages:\n"
ADAPTER = "adapter: {r: 2, target_modules: '.*text_model.*(q_proj|v_proj)'}"
SELECT = (
    "- {stage: select, method: adapt_inf, raw: data/pool.jsonl, k: 6, clusters: 2, min_cluster: 1, max_length: null, "
    "scores: [nll, el2n, log_ig], warm_up: {steps: 2, batch_size: 4}}\n"
)
TRAINER = "{max_steps: 2, per_device_train_batch_size: 3, max_length: null}"
SFT = f"- {{stage: sft, controls: [random], {ADAPTER}, trainer: {TRAINER}}}\n"


def processor(splits=False):
    tokens = {token: number for number, token in enumerate([*SPECIAL, *string.printable])}
    words = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=SPECIAL[3:], **names)
    size = {"size": {"longest_edge": 64 if splits else 32}, "max_image_size": {"longest_edge": 32}}
    pixels = Idefics3ImageProcessorPil(**size, do_image_splitting=splits)
    return Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = len(processor().tokenizer)
    config = Idefics3Config(
        vision_config={**size, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **size, "num_key_value_heads": 2, "vocab_size": words, "pad_token_id": 0},
        image_token_id=3,
        scale_factor=2,
    )
    torch.manual_seed(0)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch, eyes):
    """data/pool.jsonl: twelve rows, nine of them with a picture beside the file; eyes: the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs, "hub_answers", lambda: False)
    (tmp_path / "eyes").symlink_to(eyes)
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(12):
        colour = list(COLOURS)[number % 4]
        row = {**chat(f"which colour {number}?", colour), "source": "seen" if number % 4 else "blind"}
        if number % 4:
            picture(colour, (20 + number, 30)).save(tmp_path / "data" / f"{number}.png")
            row["images"] = [f"{number}.png"]
        rows.append(row)
    write_rows(tmp_path / "data" / "pool.jsonl", rows)
    return tmp_path


def chat(question, answer):
    turn = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return dict(zip(("prompt", "completion"), turn, strict=True))


def picture(colour, size=(30, 20)):
    return Image.new("RGB", size, COLOURS[colour])


def written(folder, text):
    (folder / "r.yaml").write_text(HEAD + text)
    return folder / "r.yaml"


def faults_of(folder, text, *overrides):
    return [str(fault) for fault in check(load(written(folder, text), overrides))]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------- the whole recipe


@pytest.mark.slow
def test_the_shape_of_the_shipped_recipe_runs_from_pictures_to_an_adapter_that_loads(data):
    recipe = load(written(data, SELECT + SFT))
    assert check(recipe) == []
    run = run_recipe(recipe, "runs/eyes", say=lambda line: None)
    assert run.record["stages"]["select"]["pool"] == 12 and run.record["stages"]["sft"]["steps"] == 2
    for name in ("selected", "control", "balanced"):
        rows = lines_of(run.path / "select" / f"{name}.jsonl")
        paths = [run.path / "select" / path for row in rows for path in row.get("images", ())]
        assert len(rows) == 6 and paths and all(path.resolve().parent == data / "data" for path in paths)
    shown = run.record["data"]
    assert shown["sft"]["kept"] == shown["sft-random"]["kept"] == 6 and 0 < shown["sft"]["pictures"] <= 6
    base = AutoModelForImageTextToText.from_pretrained("eyes")
    tuned = PeftModel.from_pretrained(base, str(run.adapter))
    batch = collate(
        [encode(AutoProcessor.from_pretrained(run.adapter), {**chat("x", "red"), "image": picture("red")}, "r")], 0
    )[0]
    with torch.no_grad(), tuned.disable_adapter():
        before = tuned(**batch).logits
    with torch.no_grad():
        assert not torch.equal(tuned(**batch).logits, before), "the adapter was trained"
    assert not [name for name, _ in tuned.named_parameters() if "moka" in name and "vision" in name]
    card = (run.adapter / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText" in card
    assert [stage.memory for stage in plan(recipe).stages] == [None, None]


def test_pictures_in_a_parquet_file_are_kept_as_files_and_trained_on(data):
    rows = []
    for colour in COLOURS:
        buffer = io.BytesIO()
        picture(colour).save(buffer, "PNG")
        rows.append({**chat("colour?", colour), "image": {"bytes": buffer.getvalue(), "path": None}})
    parquet.write_table(pyarrow.Table.from_pylist(rows), data / "own.parquet")
    trainer = "trainer: {max_steps: 1, per_device_train_batch_size: 2}"
    recipe = load(written(data, f"- {{stage: sft, data: own.parquet, {ADAPTER}, {trainer}}}\n"))
    assert check(recipe) == []
    run = run_recipe(recipe, "run", say=lambda line: None)
    assert run.record["data"]["sft"]["pictures"] == 4
    files = sorted((run.path / "sft" / "pictures").iterdir())
    assert {Image.open(file).getpixel((0, 0)) for file in files} == set(COLOURS.values()) and len(files) == 4


@pytest.mark.slow
def test_pictures_are_found_behind_several_stages_of_a_kind(data):
    rows = []
    for number in range(8):
        buffer, colour = io.BytesIO(), list(COLOURS)[number % 4]
        picture(colour, (20 + number, 30)).save(buffer, "PNG")
        rows.append({**chat(f"which colour {number}?", colour), "image": {"bytes": buffer.getvalue(), "path": None}})
    parquet.write_table(pyarrow.Table.from_pylist([*rows, rows[0]]), data / "own.parquet")
    select = SELECT.replace(" raw: data/pool.jsonl,", "").replace("k: 6", "k: 4")
    sft = f"- {{stage: sft, trainer: {TRAINER}}}\n"
    stages = (
        "- {stage: dedup, data: [own.parquet, data/pool.jsonl]}\n" + select + sft.replace("sft,", f"sft, {ADAPTER},")
    )
    stages += select.replace(", warm_up: {steps: 2, batch_size: 4}", "")
    stages += "- {stage: dedup, data: select}\n" + sft.replace("sft,", "sft, data: dedup,")
    recipe = load(written(data, stages))
    assert check(recipe) == []
    run = run_recipe(recipe, "runs/eyes", say=lambda line: None)
    assert run.record["stages"]["dedup"]["rows"] == 21 and run.record["stages"]["select-2"]["n"] == 4
    for name in ("dedup/kept", "select/selected", "select-2/selected", "dedup-2/kept"):
        file = run.path / f"{name}.jsonl"
        found = [file.parent / path for row in lines_of(file) for path in images_of(row)]
        assert found and all(path.is_file() for path in found), name
        answers = [(row["completion"][0]["content"], images_of(row)) for row in lines_of(file)]
        for answer, paths in answers:
            assert all(Image.open(file.parent / path).getpixel((0, 0)) == COLOURS[answer] for path in paths), name
    shown = run.record["data"]
    assert shown["sft-2"]["rows"] == run.record["stages"]["dedup-2"]["kept"] and shown["sft-2"]["pictures"] > 0
    again = []
    run_recipe(recipe, "runs/eyes", say=again.append)
    assert all("skipped" in line for line in again), again


@pytest.mark.slow
def test_a_sequence_of_datasets_with_pictures_is_learned_and_goes_on_where_it_was_cut(data, monkeypatch):
    rows = lines_of(data / "data" / "pool.jsonl")
    for name, part in (("one", rows[:7]), ("two", rows[5:])):
        write_rows(data / "data" / f"{name}.jsonl", part)
    skills = "datasets: [{name: one, raw: data/one.jsonl}, {name: two, raw: data/two.jsonl, test: data/one.jsonl}]"
    select = SELECT.replace("raw: data/pool.jsonl", f"{skills}, keep: 3, held_out: 2").replace("k: 6", "k: 4")
    sft = SFT.replace("controls: [random], ", "").replace("max_steps: 2", "num_train_epochs: 1")
    recipe = load(written(data, select + sft))
    assert check(recipe) == []
    train = lifelong.AdapterLearner.train

    def cut(self, rows, count, folder):
        train(self, rows, count, folder)
        if folder.parent.name == "step-01":
            raise KeyboardInterrupt

    monkeypatch.setattr(lifelong.AdapterLearner, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, "cut", say=lambda line: None)
    monkeypatch.setattr(lifelong.AdapterLearner, "train", train)
    run = run_recipe(recipe, "cut", say=lambda line: None)
    whole = run_recipe(recipe, "whole", say=lambda line: None)
    found = run.record["stages"]["sft"]["lifelong"]
    assert found == whole.record["stages"]["sft"]["lifelong"]
    assert found["pool"] == [5, 10] and [sum(counts.values()) for counts in found["picked"]] == [4, 4]
    assert "log_ig" in Store(run.path / "sft" / "lifelong" / "step-01" / "store").scores
    (data / "data" / "1.png").unlink()
    [fault, *_] = [str(fault) for fault in check(recipe)]
    assert "row 2 of data/one.jsonl: no picture is at '1.png'" in fault


# ---------------------------------------------------------------- rows and batches


def test_a_picture_without_a_place_stands_before_the_question_and_only_the_answer_is_learned():
    words = processor()
    marked = chat([{"type": "image"}, {"type": "text", "text": "what?"}], [{"type": "text", "text": "red"}])
    plain, explicit = (
        encode(words, {**row, "images": [picture("red")]}, "row") for row in (chat("what?", "red"), marked)
    )
    assert torch.equal(plain.input_ids, explicit.input_ids) and torch.equal(plain.labels, explicit.labels)
    learned = words.tokenizer.convert_ids_to_tokens(plain.labels[plain.labels != -100])
    assert learned == [*"red", "</s>"] and (plain.input_ids == 3).sum() == 4


def test_a_batch_of_pictures_of_several_sizes_gives_the_loss_of_one_row_at_a_time(data, eyes):
    model, words = AutoModelForImageTextToText.from_pretrained(eyes).eval(), processor(splits=True)
    sizes = ((60, 60), (60, 20), (8, 60))
    rows = [{**chat(f"{n}?", "red"), "images": [picture("red", size)]} for n, size in enumerate(sizes)]
    rows.append(chat("none?", "blue"))
    rows = [as_paths(row, data) for row in rows]
    batch = PictureCollator(words)(list(picture_lines(rows)))
    assert batch["pixel_values"].shape[:2] == (3, 5), "the tiles of the largest, those of the others filled up"
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        for number, row in enumerate(rows):
            inputs, labels = collate([encode(words, row, "row")], 0)
            alone, places = model(**inputs).logits[0], labels[0] != -100
            found = together[number][batch["labels"][number] != -100]
            torch.testing.assert_close(found, alone[places], atol=1e-5, rtol=1e-5)


def test_paths_are_relative_to_the_file_and_survive_being_written_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "data", tmp_path / "run" / "select"):
        folder.mkdir(parents=True)
    picture("red").save(tmp_path / "data" / "a.png")
    row = located({"image": "a.png", "text": "x"}, tmp_path / "data")
    assert row == {"image": str(tmp_path / "data" / "a.png"), "text": "x"} and holds_pictures(row)
    there = kept(row, tmp_path / "run" / "select")
    assert there["image"] == "../../data/a.png" and located(there, tmp_path / "run" / "select") == row


@pytest.mark.parametrize("value", [None, [], "https://pictures.test/a.png", {"url": "a"}, 7, ["gone.png"]])
def test_what_is_no_picture_stays_as_it_is_and_is_text_for_a_base_of_text(tmp_path, tokenizer, value):
    row = {"text": "one two", "image": value}
    assert kept(row, tmp_path) == located(row, tmp_path) == row and not holds_pictures(row)
    assert tokenize(row, tokenizer) == tokenize({"text": "one two"}, tokenizer)


def test_load_base_gives_the_model_its_processor(eyes):
    model, words = load_base(eyes, None, dtype=torch.float32)
    assert type(model).__name__ == "Idefics3ForConditionalGeneration" and type(words).__name__ == "Idefics3Processor"
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"- {{stage: rl, task: {{name: lis, n: [3, 4]}}, {ADAPTER}}}\n",
            "the stage rl asks and trains language models",
        ),
        ("- {stage: verify, task: {name: lis, n: [3, 4]}}\n", "the stage verify asks and trains language models alone"),
        (SELECT + SFT.replace("max_steps: 2", "max_steps: 2, packing: true"), "TRL packs no rows with pictures"),
    ],
)
def test_what_is_not_there_for_pictures_is_a_fault(data, text, message):
    assert any(message in fault for fault in faults_of(data, text))


def test_a_picture_that_is_missing_or_none_is_a_fault_of_its_row(data):
    (data / "data" / "1.png").unlink()
    [fault, *_] = faults_of(data, SELECT + SFT)
    assert "row 2 of data/pool.jsonl: no picture is at '1.png', seen from the file of the row" in fault
    (data / "data" / "1.png").write_text("no picture")
    write_rows(data / "one.jsonl", [{**chat("a", "b"), "images": ["data/1.png"]}])
    text = f"- {{stage: sft, data: one.jsonl, {ADAPTER}}}\n"
    assert any("cannot be read as an image" in fault for fault in faults_of(data, text))
    write_rows(data / "one.jsonl", [{**chat("a", "b"), "images": ["data/2.png", "data/3.png"]}])
    assert faults_of(data, text) == []
    two = {"prompt": "<image> a", "completion": "b", "images": ["data/2.png", "data/3.png"]}
    with pytest.raises(DataSelectionError, match="the row: .*number of <image> tokens"):
        encode(processor(), two, "the row")


def test_pictures_need_a_base_that_reads_them(small, tmp_path):
    picture("red").save(tmp_path / "a.png")
    write_rows(tmp_path / "own.jsonl", [{"text": "one two", "image": "a.png"}])
    faults = [str(fault) for fault in check(load(small, ["stages.sft.data=own.jsonl"]))]
    assert any("loaded as one that reads text alone" in fault for fault in faults)


def test_rows_that_do_not_fit_are_left_out_and_none_left_ends_the_run(data, capsys):
    rows = [chat("a", "b"), {**chat("a" * 40, "b"), "images": ["data/1.png"]}]
    assert fitting(rows, processor(), "sft", None, True) == rows and capsys.readouterr().err == ""
    assert fitting(rows, processor(), "sft", 30, True) == rows[:1]
    assert "sft: 1 of 2 rows do not fit in max_length 30" in capsys.readouterr().err
    with pytest.raises(RunError, match="2 of 2 rows do not fit in max_length 3 "):
        fitting(rows, processor(), "sft", 3, True)


def test_a_push_of_picked_rows_with_pictures_is_refused_before_anything_is_picked(data):
    select = "- {stage: select, raw: RAW, target: data/pool.jsonl, k: 2, push: me/picks}\n"
    write_rows(data / "blind.jsonl", [chat(f"{number}?", "a") for number in range(4)])
    sft = SFT.replace("controls: [random], ", "")
    refused, taken = (faults_of(data, select.replace("RAW", raw) + sft) for raw in ("data/pool.jsonl", "blind.jsonl"))
    assert taken == [] and len(refused) == 1 and "rows of the pool hold pictures, which are not pushed" in refused[0]


def test_a_bit_plan_is_refused(data):
    with pytest.raises(RecipeError):
        load(written(data, SELECT + SFT), ["base.precision={}", "base.quantization=nf4"])
    assert any(
        "bit plans are of language models alone" in fault
        for fault in faults_of(data, SELECT + SFT, "base.precision={}", "base.quantization=null")
    )


def test_the_shipped_recipe_passes_check_and_says_that_it_needs_the_hub(monkeypatch):
    monkeypatch.setattr(needs, "hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    recipe = load("vlm_select")
    assert check(recipe) == [] and "needs the Hub and a GPU" in recipe.description
    told = needs.notes(recipe)
    assert any("'HuggingFaceTB/SmolVLM-500M-Instruct' is not on this machine and comes from the Hub" in n for n in told)
    assert any("data set 'trl-lib/llava-instruct-mix' comes from the Hub" in note for note in told)
