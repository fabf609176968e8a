"""Scores and gradients of tiny random LLaVA, SmolVLM, Idefics3 and Qwen2-VL, against one row at a time by hand.

The processors are made of PIL image processors and a small tokenizer, without torchvision and without a network.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from krontune.data_selection import DataSelectionError, score_samples
from krontune.data_selection.encoding import encode, image_tokens, without_images
from krontune.data_selection.identity import template_identity
from krontune.data_selection.image_dropout import ImageDropCollator
from krontune.data_selection.processors import images_only

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
PLAIN = ["user:", "bot:", "what", "is", "it", "and", "this", "red", "blue", "cat", "dog", "\n", "\n\n"]
MARKS = {
    "llava": ["<image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    + [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)],
    "qwen2_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
MARKS["smolvlm"] = MARKS["idefics3"]
IMAGE = {"llava": "<image>", "idefics3": "<image>", "smolvlm": "<image>"}
IMAGE["qwen2_vl"] = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = (
    "{%% for m in messages %%}{{ 'user: ' if m['role'] == 'user' else 'bot: ' }}"
    "{%% for part in m['content'] %%}{{ '%s ' if part['type'] == 'image' else part['text'] + ' ' }}{%% endfor %%}"
    "{%% endfor %%}{%% if add_generation_prompt %%}{{ 'bot: ' }}{%% endif %%}"
)
SIZE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EYES = {**SIZE, "hidden_size": 32, "num_hidden_layers": 1}


def words_of(kind):
    listed = [*SPECIAL, *PLAIN, *MARKS[kind]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    words.add_special_tokens({"additional_special_tokens": MARKS[kind]})
    words.chat_template = TEMPLATE % IMAGE[kind]
    return words


def llava(words):
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    processor = LlavaProcessor(
        pixels, words, patch_size=10, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**EYES, image_size=30, patch_size=10, projection_dim=64),
        text_config=LlamaConfig(**SIZE, num_key_value_heads=2, vocab_size=40, max_position_embeddings=256),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


def tiles(words, config_class, model_class):
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(pixels, words, image_seq_len=4, chat_template=words.chat_template)
    config = config_class(
        vision_config={**EYES, "image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**SIZE, num_key_value_heads=2, vocab_size=40, max_position_embeddings=512),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return model_class(config), processor


def qwen2_vl(words):
    pixels = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    processor = images_only(Qwen2VLProcessor, pixels, words, chat_template=words.chat_template)
    number = words.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        text_config={
            **SIZE, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 256, "bos_token_id": 2,
            "eos_token_id": 3, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), processor


@pytest.fixture(scope="module", params=list(MARKS))
def vlm(request):
    words, kind = words_of(request.param), request.param
    torch.manual_seed(0)
    model, processor = {
        "llava": lambda: llava(words),
        "idefics3": lambda: tiles(words, Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": lambda: tiles(words, SmolVLMConfig, SmolVLMForConditionalGeneration),
        "qwen2_vl": lambda: qwen2_vl(words),
    }[kind]()
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return SimpleNamespace(
        kind=kind, processor=processor, words=words, image=IMAGE[kind], model=get_peft_model(model, lora).eval()
    )


def picture(seed, width, height):
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def rows_of(vlm):
    """No image, one, two, and of several sizes; prompts of several lengths."""
    image, two = vlm.image, [picture(2, 24, 48), picture(3, 33, 30)]
    return [
        {"prompt": f"user: {image} what is it bot: ", "completion": "red", "images": [picture(0, 40, 32)]},
        {"prompt": f"{image} ", "completion": "blue cat", "images": [picture(1, 32, 32)]},
        {"prompt": f"{image} and {image} what ", "completion": "dog", "images": two},
        {"prompt": "user: what is this bot: ", "completion": "red dog"},
        {"prompt": f"this {image} ", "completion": "cat", "images": [picture(4, 20, 20)]},
    ]


def answer_nlls(vlm, row, blind=False):
    """By hand: one row through processor and model, the answer counted from the end; the NLL of each of its tokens."""
    text = row["prompt"] + row["completion"] + "</s>"
    if blind or not row.get("images"):
        inputs = vlm.words(text.replace(vlm.image, ""), return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    else:
        inputs = vlm.processor(text=[text], images=row["images"], return_tensors="pt")
    ids = inputs["input_ids"][0]
    tail = min(len(row["completion"].split()) + 1, len(ids) - 1)  # the first token of all is not predicted
    logits = vlm.model(**inputs).logits[0, len(ids) - tail - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, ids[-tail:], reduction="none")


def test_scores_grounding_and_gradients_of_ragged_rows_equal_one_row_by_hand(vlm, tmp_path):
    rows = rows_of(vlm)
    options = {"projection": None, "batch_size": 5, "gradients": "all"}
    store = score_samples(vlm.model, vlm.processor, rows, ("nll", "log_ig"), **options, out_dir=tmp_path / "s")
    own = [(n, p) for n, p in vlm.model.named_parameters() if "lora_" in n and "vision" not in n and "visual" not in n]
    vlm.model.requires_grad_(False)
    chosen = [parameter.requires_grad_(True) for _, parameter in own]
    for i, row in enumerate(rows):
        seen, blind = answer_nlls(vlm, row), answer_nlls(vlm, row, blind=True)
        assert store.scores["nll"][i] == pytest.approx(seen.mean().item(), rel=1e-4)
        # Both means are over the tokens that both can predict: of row 1 the first answer token stands first of all.
        assert store.scores["log_ig"][i] == pytest.approx((blind.mean() - seen[-len(blind) :].mean()).item(), abs=2e-4)
        grad = torch.cat([grad.flatten() for grad in torch.autograd.grad(seen.mean(), chosen)]).numpy()
        assert np.linalg.norm(store.vectors[i] - grad) < 1e-4 * np.linalg.norm(grad)
    assert store.scores["log_ig"][3] == 0 and np.abs(store.scores["log_ig"][[0, 1, 2, 4]]).min() > 1e-4


def test_without_images_nothing_of_them_is_left(vlm):
    marks = image_tokens(vlm.model, vlm.processor)
    for row in rows_of(vlm):
        encoded = encode(vlm.processor, row, "row")
        blind = without_images(encoded, marks)
        text = row["prompt"] + row["completion"] + "</s>"
        assert blind.input_ids.tolist() == vlm.words(text.replace(vlm.image, ""))["input_ids"]
        assert not blind.images and encoded.answers == len(row["completion"].split()) + 1
        bare = {"input_ids": encoded.input_ids, "labels": encoded.labels, **encoded.images}
        left = without_images(encode(vlm.processor, bare, "row"), marks).input_ids.tolist()
        lines = vlm.words.convert_tokens_to_ids(["\n", "\n\n"])
        assert [token for token in left if token not in lines] == blind.input_ids.tolist()


def test_chats_with_images_in_several_turns_have_their_answers_labelled(vlm):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
    encoded = encode(vlm.processor, {"messages": turns, "images": [picture(5, 40, 24), picture(6, 24, 24)]}, "row")
    labelled = encoded.labels[encoded.labels != -100]
    assert vlm.words.convert_ids_to_tokens(labelled.tolist()) == ["red", "cat", "blue"]
    assert torch.equal(encoded.input_ids[encoded.labels != -100], labelled)
    before = (encoded.labels != -100).nonzero()[:, 0] - 1
    assert vlm.words.convert_ids_to_tokens(encoded.input_ids[before].tolist()) == ["bot:", "red", "bot:"]
    blind = without_images(encoded, image_tokens(vlm.model, vlm.processor))
    assert blind.answers == 3 and len(blind) == 9


def test_a_caption_is_read_but_for_its_image(vlm, tmp_path):
    encoded = encode(vlm.processor, {"text": f"{vlm.image} red cat", "image": picture(7, 32, 24)}, "row")
    labelled = vlm.words.convert_ids_to_tokens(encoded.labels[encoded.labels != -100].tolist())
    assert [word for word in labelled if not word.startswith("<|vision")] == ["red", "cat", "</s>"]

    row = {"text": f"red {vlm.image} blue cat", "image": picture(7, 32, 24)}
    store = score_samples(vlm.model, vlm.processor, [row], ("log_ig",), gradients=None, out_dir=tmp_path / "s")
    halves = {"prompt": f"red {vlm.image} ", "completion": "blue cat", "images": [row["image"]]}
    seen, blind = answer_nlls(vlm, halves), answer_nlls(vlm, halves, blind=True)
    assert store.scores["log_ig"][0] == pytest.approx((blind.mean() - seen.mean()).item(), abs=2e-4)


def test_batches_with_dropped_images_train(vlm):
    batch = ImageDropCollator(vlm.model, vlm.processor, drop=0.4)(rows_of(vlm))
    with torch.no_grad():
        assert torch.isfinite(vlm.model(**batch).loss)
    image = image_tokens(vlm.model)[0]
    assert (batch["input_ids"] == image).any(1).tolist() == [True, True, True, False, False]


def test_rows_whose_text_and_images_do_not_match_are_refused_by_name(vlm):
    with pytest.raises(DataSelectionError, match="row 4: the text has a place for an image"):
        encode(vlm.processor, {"prompt": f"{vlm.image} what ", "completion": "cat"}, "row 4")
    two = {"prompt": f"{vlm.image} what ", "completion": "cat", "images": [picture(0, 20, 20), picture(1, 20, 20)]}
    with pytest.raises(DataSelectionError, match="row 5: .*image"):
        encode(vlm.processor, two, "row 5")


def test_a_store_of_other_pixels_is_another_store(vlm):
    before = template_identity(vlm.processor)
    vlm.processor.image_processor.do_normalize = False
    try:
        assert template_identity(vlm.processor) != before
    finally:
        vlm.processor.image_processor.do_normalize = True
    assert template_identity(vlm.processor) == before
