import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from krontune.data_selection import DataSelectionError, score_samples
from krontune.data_selection.encoding import collate, encode, image_tokens, without_images
from krontune.data_selection.identity import data_identity
from krontune.data_selection.image_dropout import ImageDropCollator

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "what", "colour", "is", "it", *COLOURS]


def processor():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    return LlavaProcessor(
        pixels, words, patch_size=10, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def tiny_llava():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=30, patch_size=10, projection_dim=64),
        text_config=LlamaConfig(**size, num_key_value_heads=2, vocab_size=16, max_position_embeddings=64),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def row(colour, question="<image> what colour is it "):
    return {"prompt": question, "completion": colour, "images": [Image.new("RGB", (30, 30), COLOURS[colour])]}


ROWS = [row("red"), row("blue", "<image> colour "), {"prompt": "is it ", "completion": "grey"}, row("green")]


def naive_nll(model, encoded):
    inputs, labels = collate([encoded], 0)
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:]).item()


def test_the_answer_after_an_image_is_found():
    encoded = encode(processor(), row("red"), "row 0")
    assert (encoded.input_ids == 4).sum() == 9 and encoded.images["pixel_values"].shape == (1, 3, 30, 30)
    assert encoded.labels[-2:].tolist() == [WORDS.index("red"), 3] and encoded.answers == 2
    blind = without_images(encoded, image_tokens(tiny_llava()))
    assert len(blind) == len(encoded) - 9 and blind.answers == 2 and not blind.images


def test_grounding_and_gradients_of_mixed_rows_equal_one_row_at_a_time(tmp_path):
    model = get_peft_model(
        tiny_llava(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    words = processor()
    store = score_samples(model, words, ROWS, ("nll", "log_ig"), projection=None, out_dir=tmp_path / "s")
    for i, one in enumerate(ROWS):
        encoded = encode(words, one, "row")
        blind = without_images(encoded, [4])
        assert store.scores["nll"][i] == pytest.approx(naive_nll(model, encoded), rel=1e-4)
        expected = naive_nll(model, blind) - naive_nll(model, encoded)
        assert store.scores["log_ig"][i] == pytest.approx(expected, abs=1e-4)
    assert store.scores["log_ig"][2] == 0 and np.abs(store.scores["log_ig"][[0, 1, 3]]).min() > 1e-4

    names = [name for name, _ in model.named_parameters() if "language_model.layers.1" in name and "lora_" in name]
    model.requires_grad_(False)
    chosen = [p.requires_grad_(True) for name, p in model.named_parameters() if name in names]
    for i, one in enumerate(ROWS):
        inputs, labels = collate([encode(words, one, "row")], 0)
        loss = torch.nn.functional.cross_entropy(model(**inputs).logits[0, :-1], labels[0, 1:])
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]).numpy()
        assert np.linalg.norm(store.vectors[i] - grad) < 1e-4 * np.linalg.norm(grad)


def test_images_need_a_processor_and_come_before_the_answer(tmp_path):
    with pytest.raises(DataSelectionError, match="give score_samples the model's processor"):
        score_samples(tiny_llava(), processor().tokenizer, ROWS, gradients=None, out_dir=tmp_path / "s")
    late = {"prompt": "what is ", "completion": "red <image>", "images": row("red")["images"]}
    with pytest.raises(DataSelectionError, match="row 0: an image stands inside an answer"):
        score_samples(tiny_llava(), processor(), [late], gradients=None, out_dir=tmp_path / "t")
    with pytest.raises(DataSelectionError, match="would cut images apart"):
        score_samples(tiny_llava(), processor(), ROWS, gradients=None, max_length=5, out_dir=tmp_path / "u")


def trained(drop):
    """A model after 150 batches of all four colours, two each."""
    model, words, order = tiny_llava(), processor(), random.Random(0)
    collator = ImageDropCollator(model, words, drop)
    encoded = [encode(words, row(colour), "row") for colour in COLOURS]
    ready = [{"input_ids": one.input_ids, "labels": one.labels, **one.images} for one in encoded]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = ready * 2
        order.shuffle(rows)
        optimizer.zero_grad()
        model(**collator(rows)).loss.backward()
        optimizer.step()
    return model


def bits(model, folder):
    """Image grounding of the colour's token, in bits, of each of the four rows."""
    rows = [row(colour) for colour in COLOURS]
    store = score_samples(model, processor(), rows, ("nll", "log_ig"), gradients=None, out_dir=folder)
    assert store.scores["nll"].max() < 0.2, "it has learned the colours"
    # The NLL is a mean over the colour, which the picture tells, and the end of the text, which needs none.
    return 2 * store.scores["log_ig"] / np.log(2)


def test_image_dropout_recovers_the_known_grounding_of_two_bits_and_plain_training_does_not(tmp_path):
    """Four colours, equally likely without the picture."""
    recovered, plain = bits(trained(0.5), tmp_path / "drop"), bits(trained(0.0), tmp_path / "plain")
    np.testing.assert_allclose(recovered, 2.0, atol=0.4)
    assert np.abs(plain - 2.0).max() > 1.0


def test_the_collator_leaves_out_the_images_of_the_last_half_and_carries_odd_rows_over():
    words, model = processor(), tiny_llava()
    rows = [row("red"), row("blue"), row("green"), row("grey")]
    whole = collate([encode(words, one, "row") for one in rows[:2]], 0)[0]["pixel_values"]
    batch = ImageDropCollator(model, words)(rows)
    assert torch.equal(batch["pixel_values"], whole)
    assert (batch["input_ids"] == 4).sum(1).tolist() == [9, 9, 0, 0]
    for labels, one in zip(batch["labels"], rows, strict=True):
        assert labels[labels != -100].tolist() == [WORDS.index(one["completion"]), 3]
    single = ImageDropCollator(model, words)
    assert ["pixel_values" in single([rows[0]]) for _ in range(6)] == [True, False] * 3
    third = ImageDropCollator(model, words, drop=1 / 3)
    assert sum("pixel_values" not in third([rows[0]]) for _ in range(30)) == 10
    assert "pixel_values" not in ImageDropCollator(model, words, drop=1.0)(rows)
    assert len(ImageDropCollator(model, words, drop=0.0)(rows)["pixel_values"]) == 4
    with pytest.raises(DataSelectionError, match="drop=1.5"):
        ImageDropCollator(model, words, drop=1.5)
    with pytest.raises(DataSelectionError, match="takes no images"):
        ImageDropCollator(model.get_decoder(), words)


def test_a_picture_that_was_changed_under_its_name_makes_other_data(tmp_path):
    file, found = tmp_path / "a.png", set()
    for side in (8, 80):
        Image.new("RGB", (side, side), (200, 0, 0)).save(file)
        for row in ({"images": [str(file)]}, {"image": file, "n": 1}, {"image": {"path": str(file), "bytes": None}}):
            found.add(data_identity([row]))
    assert len(found) == 6
