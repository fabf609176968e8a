"""A base of mixed precision: its scores, its loading, and adapters over it."""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from krontune.adapters import BaseModelError, BitPlan, MokaConfig, bit_plan, dense_weights, export_merged, load_base
from krontune.adapters.mixed import (
    layer_at,
    linears,
    make_plan,
    sample_windows,
    score_layers,
    token_nll,
    transformer_layers,
)
from krontune.adapters.precision import lim, zd

pytestmark = pytest.mark.filterwarnings("ignore:Merging into quantised weights", "ignore:MatMul8bitLt")
CLASSES = {16: torch.nn.Linear, 8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}
TEXTS = ["the quick brown fox jumps over the lazy dog " * 20] * 3


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory, tiny_folder, tiny_llama):
    """A random Llama of four layers with biases, as a checkpoint."""
    folder = tmp_path_factory.mktemp("four-layers")
    tiny_llama(num_hidden_layers=4, attention_bias=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def plan_of(folder, bits):
    """A plan with these bits by hand: the sizes are the model's."""
    plain, _ = load_base(folder, None, device="cpu")
    order = {4: 0.0, 8: 1.0, 16: 2.0}
    plan = make_plan(plain, "nll", [order[b] for b in bits], [16, 8, 4], 16)
    return BitPlan(**(vars(plan) | {"bits": tuple(bits)}))


@pytest.fixture
def mixed(four_layers):
    return load_base(four_layers, precision=plan_of(four_layers, [8, 4, 16, 4]), device="cpu")[0]


# ---------------------------------------------------------------- loading


def test_each_layer_has_the_bits_of_the_plan_and_the_rest_is_as_loaded(mixed):
    for layer, bits in zip(mixed.model.layers, [8, 4, 16, 4], strict=True):
        assert {type(m) for m in linears(layer).values()} == {CLASSES[bits]}
    assert type(mixed.lm_head) is torch.nn.Linear and mixed.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not mixed.training and not any(p.requires_grad for p in mixed.parameters())


@pytest.mark.parametrize(("bits", "quantization"), [(4, "nf4"), (8, "int8"), (16, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_plan_of_one_level_is_the_model_that_transformers_quantises_bit_by_bit(
    four_layers, tokens, bits, quantization, dtype
):
    expected, _ = load_base(four_layers, quantization, device="cpu", dtype=dtype)
    model, _ = load_base(four_layers, precision=plan_of(four_layers, [bits] * 4), device="cpu", dtype=dtype)
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_a_mixed_model_is_put_together_from_the_layers_of_uniform_ones(four_layers, mixed, tokens):
    expected, _ = load_base(four_layers, None, device="cpu")
    for number, quantization in ((0, "int8"), (1, "nf4"), (3, "nf4")):
        expected.model.layers[number] = load_base(four_layers, quantization, device="cpu")[0].model.layers[number]
    assert torch.equal(logits(mixed, tokens), logits(expected, tokens))


def test_the_accounting_is_that_of_the_tensors(four_layers):
    plain, _ = load_base(four_layers, None, device="cpu")
    scores = [2.0, 0.0, 1.0, 3.0]
    for avg_bits in (4, 7, 12, 16):
        plan = make_plan(plain, "nll", scores, [16, 8, 4], avg_bits)
        model, _ = load_base(four_layers, precision=plan, device="cpu")
        assert plan.weights == tuple(sum(m.weight.numel() for m in linears(x).values()) for x in plain.model.layers)
        assert plan.average_bits == avg_bits
        assert plan.bytes == packed_bytes(model)


def packed_bytes(model):
    found = 0
    for layer in model.model.layers:
        for module in linears(layer).values():
            found += module.weight.nbytes
            if isinstance(module, bnb.nn.Linear8bitLt):
                found += (module.weight.SCB if module.weight.SCB is not None else module.state.SCB).nbytes
            if isinstance(module, bnb.nn.Linear4bit):
                state = module.weight.quant_state
                found += state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    return found


def test_layer_1_is_not_layer_10(tmp_path, tiny_llama, tiny_folder):
    tiny_llama(num_hidden_layers=11).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    model, _ = load_base(tmp_path, precision=plan_of(tmp_path, [4, 16, *[4] * 8, 8]), device="cpu")
    kinds = [type(layer.mlp.up_proj) for layer in model.model.layers]
    assert kinds == [CLASSES[4], CLASSES[16], *[CLASSES[4]] * 8, CLASSES[8]]


def test_a_plan_of_another_model_is_refused(four_layers, tiny_folder, tmp_path, tiny_llama):
    plan = plan_of(four_layers, [8, 4, 4, 4])
    with pytest.raises(BaseModelError, match="with 4 layers, and this model has 2"):
        load_base(tiny_folder, precision=plan, device="cpu")
    tiny_llama(num_hidden_layers=4, intermediate_size=64).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="weights in layer 0, and this model has"):
        load_base(tmp_path, precision=plan, device="cpu")


@pytest.mark.parametrize("quantization", ["int8", "fp4"])
def test_precision_beside_another_quantization_is_refused(four_layers, quantization):
    with pytest.raises(BaseModelError, match="contradicts precision"):
        load_base(four_layers, quantization, precision=plan_of(four_layers, [8, 4, 4, 4]), device="cpu")


def test_a_model_without_linear_modules_or_with_quantised_weights_is_refused(tmp_path, four_layers):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=128))
    with pytest.raises(BaseModelError, match="layer 0 of this GPT2LMHeadModel has no linear module"):
        transformer_layers(model)
    with pytest.raises(BaseModelError, match="quantised already"):
        transformer_layers(load_base(four_layers, "nf4", device="cpu")[0])


# ---------------------------------------------------------------- the trap of AVX512_BF16


def gradients(model, tokens):
    model.train()
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_before_and_after_a_generate(mixed, tokens, shake):
    model = shake(get_peft_model(mixed, MokaConfig(target_modules="all-linear", r=4)), scale=0.1)
    before = gradients(model, tokens)
    model.generate(tokens[:, :5], max_new_tokens=3, do_sample=False)
    after = gradients(model, tokens)
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert all(g.abs().sum() > 0 for g in before.values())


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks weights only where there is AVX512_BF16")
def test_no_four_bit_layer_is_repacked_by_a_forward(mixed, tokens):
    logits(mixed, tokens)
    layers = [m for m in mixed.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers)


def test_the_scores_leave_the_trap_closed_too(four_layers, tokens):
    plain, tokenizer = load_base(four_layers, None, device="cpu")
    with layer_at(plain.model.layers[1], 4, torch.bfloat16, torch.device("cpu")):
        logits(plain, tokens)
        assert not any(m.support_avx512bf16_for_cpu for m in plain.modules() if isinstance(m, bnb.nn.Linear4bit))


# ---------------------------------------------------------------- adapters


def test_an_adapter_over_it_saves_and_reads_back_with_its_plan(four_layers, mixed, tokens, shake, tmp_path):
    model = shake(get_peft_model(mixed, MokaConfig(target_modules="all-linear", r=4)), scale=0.1).eval()
    plan_of(four_layers, [8, 4, 16, 4]).save(tmp_path)
    model.save_pretrained(tmp_path)
    base, _ = load_base(four_layers, precision=tmp_path, device="cpu")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path), tokens), logits(model, tokens))


def test_merging_and_unmerging_leaves_every_bit(mixed, tokens, shake):
    model = shake(get_peft_model(mixed, MokaConfig(target_modules="all-linear", r=4)), scale=0.1).eval()
    expected = logits(model, tokens)
    with model.disable_adapter():
        effect = (logits(model, tokens) - expected).norm()
    for _ in range(2):
        model.merge_adapter()
        assert (logits(model, tokens) - expected).norm() < 0.8 * effect
        model.unmerge_adapter()
        assert torch.equal(logits(model, tokens), expected)


def test_dense_weights_give_the_same_up_to_rounding(mixed, tokens, shake):
    model = shake(get_peft_model(mixed, MokaConfig(target_modules="all-linear", r=4)), scale=0.1).eval()
    expected = logits(model, tokens)
    with model.disable_adapter():
        effect = (logits(model, tokens) - expected).norm()
    with dense_weights(model):
        inside = logits(model, tokens)
    assert (inside - expected).norm() < 0.03 * expected.norm() < 0.3 * effect
    assert torch.equal(logits(model, tokens), expected)


def test_the_export_is_a_plain_checkpoint_of_the_mixed_base(four_layers, mixed, tokens, shake, tmp_path):
    model = shake(get_peft_model(mixed, MokaConfig(target_modules="all-linear", r=4)), scale=0.1).eval()
    expected = logits(model, tokens)
    model.peft_config["default"].base_model_name_or_path = str(four_layers)
    model.save_pretrained(tmp_path / "adapter")
    plan_of(four_layers, [8, 4, 16, 4]).save(tmp_path / "adapter")
    for source, name in ((model, "a"), (tmp_path / "adapter", "b")):
        options = {} if source is model else {"precision": tmp_path / "adapter"}
        plain = AutoModelForCausalLM.from_pretrained(export_merged(source, tmp_path / name, **options))
        assert (logits(plain, tokens) - expected).norm() < 0.03 * expected.norm()


def test_a_trl_trainer_trains_over_it(four_layers, mixed, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(four_layers)
    model = get_peft_model(mixed, MokaConfig(target_modules=["q_proj", "down_proj"], r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            save_strategy="no",
            max_length=32,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_dict({"text": ["abc def"] * 8}),
        processing_class=tokenizer,
    )
    trainer.train()
    after = dict(model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before if "moka_B" in name)


# ---------------------------------------------------------------- scores and plans


@pytest.fixture
def windows(four_layers):
    return sample_windows(TEXTS, AutoTokenizer.from_pretrained(four_layers), 120)


def test_windows_are_the_first_tokens_in_rows(four_layers):
    tokenizer = AutoTokenizer.from_pretrained(four_layers)
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert sample_windows(TEXTS, tokenizer, 100).tolist() == [ids[:100]]
    rows = sample_windows(TEXTS, tokenizer, 600)
    assert rows.shape == (2, 256) and rows.flatten().tolist() == ids[:512]
    with pytest.raises(BaseModelError, match="the sample has 0 tokens"):
        sample_windows([], tokenizer, 100)


def test_lim_reads_the_states_before_and_after_each_layer(four_layers, windows):
    model, _ = load_base(four_layers, None, device="cpu", dtype=torch.float32)
    found = score_layers(model, "lim", windows, 4)
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    assert found[:-1] == pytest.approx([lim(a, b) for a, b in zip(states, states[1:-1], strict=False)], abs=1e-5)
    assert len(found) == 4  # the last of the states is past the final norm, so the last layer is tried by the next test


def test_a_layer_that_adds_nothing_has_the_least_lim_and_goes_down_first(four_layers, windows):
    model, _ = load_base(four_layers, None, device="cpu")
    for number in (1, 3):
        layer = model.model.layers[number]
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data.zero_()
            if module.bias is not None:
                module.bias.data.zero_()
    scores = score_layers(model, "lim", windows, 4)
    assert scores[1] == pytest.approx(-1) and scores[3] == pytest.approx(-1) and min(scores[0], scores[2]) > -0.99
    assert make_plan(model, "lim", scores, [16, 8, 4], 6).bits == (8, 4, 8, 4)


def test_zd_reads_the_linear_weights_of_each_layer(four_layers):
    model, _ = load_base(four_layers, None, device="cpu")
    expected = [zd([p.data for n, p in x.named_parameters() if n.endswith("proj.weight")]) for x in model.model.layers]
    assert score_layers(model, "zd", None, 4) == expected


def test_nll_is_the_rise_of_the_loss_of_a_model_with_that_layer_alone_quantised(four_layers, windows):
    plain, _ = load_base(four_layers, None, device="cpu")
    before = {name: p.clone() for name, p in plain.named_parameters()}
    found = score_layers(plain, "nll", windows, 4)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    for number in range(4):
        bits = [4 if i == number else 16 for i in range(4)]
        model, _ = load_base(four_layers, precision=plan_of(four_layers, bits), device="cpu")
        with torch.no_grad():
            rise = sum(model(w[None], labels=w[None]).loss - plain(w[None], labels=w[None]).loss for w in windows)
        assert found[number] == pytest.approx(float(rise) / len(windows), abs=2e-3)
    assert max(found) - min(found) > 1e-3


def test_nll_protects_a_layer_that_quantisation_destroys(four_layers, windows):
    model, _ = load_base(four_layers, None, device="cpu", dtype=torch.float32)
    model.lm_head.weight.data *= 5
    # Huge weights on inputs that are silent: in 4 bits they drown their neighbours, in 16 they do nothing.
    model.model.layers[2].mlp.up_proj.weight.data[::64] = 0
    model.model.layers[2].mlp.down_proj.weight.data *= 5
    model.model.layers[2].mlp.down_proj.weight.data[:, ::64] = 300.0
    said = model.generate(windows[:, :8], max_new_tokens=56, min_new_tokens=56, do_sample=False)  # text it knows
    scores = score_layers(model, "nll", said, 4)
    assert scores[2] > 2 * max(scores[:2] + scores[3:]) > 0
    assert make_plan(model, "nll", scores, [8, 4], 5).bits == (4, 4, 8, 4)


def test_token_nll_is_the_loss_of_each_token(four_layers, windows):
    model, _ = load_base(four_layers, None, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logp = model(windows).logits.log_softmax(-1)
    expected = [
        [-float(logp[i, t, windows[i, t + 1]]) for t in range(windows.shape[1] - 1)] for i in range(len(windows))
    ]
    torch.testing.assert_close(token_nll(model, windows), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scorer", ["lim", "zd", "nll"])
def test_a_plan_is_made_saved_and_loaded_by_name(four_layers, tmp_path, scorer):
    plan = bit_plan(str(four_layers), scorer, avg_bits=5.0, texts=TEXTS, tokens=64, device="cpu")
    assert plan.counts() == {16: 0, 8: 1, 4: 3} and plan.average_bits == 5.0 and len(plan.scores) == 4
    assert (plan.sample is None) == (scorer == "zd")
    model, _ = load_base(four_layers, precision=plan.save(tmp_path), device="cpu")
    kinds = [type(layer.mlp.up_proj) for layer in model.model.layers]
    assert kinds == [CLASSES[b] for b in plan.bits]
    assert plan == bit_plan(str(four_layers), scorer, avg_bits=5.0, texts=TEXTS, tokens=64, device="cpu")


def test_unknown_scorers_budgets_and_missing_text_are_refused_before_or_with_a_reason(four_layers):
    with pytest.raises(BaseModelError, match="scorer 'kl' is unknown; allowed: 'lim', 'zd' or 'nll'"):
        bit_plan(str(four_layers), "kl")
    with pytest.raises(BaseModelError, match=r"avg_bits 3.0 is below"):
        bit_plan("no-such-model", "zd", avg_bits=3.0)
    with pytest.raises(BaseModelError, match="need text"):
        bit_plan(str(four_layers), "lim", device="cpu")
