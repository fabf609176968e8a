"""TRL's fused head over labelled positions alone, against the head over all of them."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from trl.trainer import utils as trl_utils

from krontune.adapters import MokaConfig
from krontune.rl import score_labelled_only

FIELDS = ("log_probs", "entropy", "is_top1")


def tiny(dtype=torch.float32, config=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2)
    )
    config = config or MokaConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
    torch.manual_seed(1)
    return get_peft_model(model.to(dtype), config)


def fused(model, **options):
    trl_utils.add_fused_lm_head(model.get_base_model(), outputs=FIELDS, **options)
    return model


def batch(rows=3, length=11, seed=0):
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, length), generator=chance)
    labels = ids.masked_fill(torch.rand(rows, length, generator=chance) < 0.6, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def learn(model, inputs):
    scored = model(**inputs, fused_lm_head=True)
    scored.loss.backward()
    return scored, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labelled", ["some", "all", "none", "last", "first"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("count", [None, 17])
def test_same_values_and_gradients(dtype, labelled, shifted, count, projected):
    inputs = batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    if labelled == "all":
        labels = ids.clone()
    elif labelled != "some":
        labels = torch.full_like(ids, -100)
        at = {"last": -1, "first": 1}.get(labelled)
        if at is not None:
            labels[1, at] = ids[1, at]
    inputs["labels"] = labels
    wanted = int((labels[:, 1:] != -100).sum())
    if shifted:
        del inputs["labels"]
        inputs["shift_labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    if count:
        inputs["num_items_in_batch"] = count
    everywhere, ours = fused(tiny(dtype)), fused(tiny(dtype))
    score_labelled_only(ours)
    first, slow = learn(everywhere, inputs)
    second, quick = learn(ours, inputs)
    exact = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for name in ("loss", "log_probs", "entropy", "label_mask", "is_top1"):
        torch.testing.assert_close(second[name], first[name], **exact)
    assert slow.keys() == quick.keys()
    for name in slow:
        torch.testing.assert_close(quick[name], slow[name], **exact)
    assert projected == [first.log_probs.numel(), wanted]  # TRL's own takes all where there is no Triton


def test_other_calls_are_the_models_own(projected):
    model = fused(tiny())
    score_labelled_only(model)
    plain, inputs = tiny(), batch()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        mine, own = model(**given), plain(**given)
        assert torch.equal(mine.logits, own.logits) and (mine.loss is None or torch.equal(mine.loss, own.loss))
    ids = inputs["input_ids"][:1]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    assert not projected


def test_temperature_and_a_model_without_adapter():
    model, twin = tiny().unload(), tiny().unload()
    for one in (model, twin):
        trl_utils.add_fused_lm_head(one, temperature=0.7, outputs=FIELDS)
    score_labelled_only(model)
    mine, own = (one(**batch(), fused_lm_head=True) for one in (model, twin))
    torch.testing.assert_close(mine.log_probs, own.log_probs)
    torch.testing.assert_close(mine.entropy, own.entropy)


@pytest.mark.parametrize("config", [None, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)])
def test_checkpointing_computes_the_same(config):
    plain, model = fused(tiny(config=config)), fused(tiny(config=config))
    score_labelled_only(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    slow, quick = learn(plain.train(), batch())[1], learn(model.train(), batch())[1]
    assert slow.keys() == quick.keys()
    for name in slow:
        torch.testing.assert_close(quick[name], slow[name])


def with_learned_prompt():
    return tiny(config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), batch()


def with_pictures():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"model_type": "llama", **size, "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0}
    eyes = {**size, "image_size": 32, "patch_size": 8}
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(vision_config=eyes, text_config=words, image_token_id=3, scale_factor=2)
    )
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"].clamp(min=5)
    inputs["input_ids"][:, 1:5] = 3
    inputs["pixel_values"] = torch.randn(3, 1, 3, 32, 32)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=".*text_model.*q_proj", init_lora_weights=False)
    ), inputs


@pytest.mark.parametrize("make", [with_learned_prompt, with_pictures])
def test_a_learned_prompt_before_the_labels_and_a_model_that_reads_pictures(make, projected):
    found = []
    for ours in (False, True):
        model, inputs = make()
        fused(model)
        if ours:
            score_labelled_only(model)
        found.append(learn(model, inputs))
    (first, slow), (second, quick) = found
    for name in ("loss", "log_probs", "entropy", "label_mask"):
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)
    assert slow.keys() == quick.keys() and slow
    for name in slow:
        torch.testing.assert_close(quick[name], slow[name], rtol=1e-4, atol=1e-5)
    assert projected[1] == int(first.label_mask.sum()) < projected[0]
