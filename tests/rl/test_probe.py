import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from krontune.rl.errors import RlError
from krontune.rl.heads import split_heads
from krontune.rl.rhythm import middle_third, probe, read_rhythm

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 60,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
KINDS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral with window": ("Mistral", {"sliding_window": 7}),
    "gemma": ("Gemma", {}),
    "gemma3, layers with and without window": ("Gemma3Text", {"sliding_window": 7}),
    "smollm3, layers with and without rotary embedding": ("SmolLM3", {"bos_token_id": 1, "eos_token_id": 2}),
}
OPTIONS = {"window": 5, "horizon": (2, 20)}


def tiny(kind="Llama", attention="sdpa", **options):
    torch.manual_seed(0)
    name = {"Gemma3Text": "Gemma3ForCausalLM"}.get(kind, f"{kind}ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**TINY | options, attn_implementation=attention)
    return getattr(transformers, name)(config).eval()


def batch(vocabulary=60):
    torch.manual_seed(1)
    ids = torch.randint(1, vocabulary, (3, 50))
    attended = torch.ones_like(ids)
    attended[0, :9] = 0
    attended[1, -6:] = 0
    response = attended.clone()
    response[:, :20] = 0
    response[2, 30:36] = 0
    return ids, attended, response


def from_dense(share, response, window, horizon):
    """By the definitions, from a layer's (B, H, T, T) attention weights."""
    distance = torch.arange(share.shape[-1])[:, None] - torch.arange(share.shape[-1])
    share = share.double() * response[:, None, :, None]
    ahead = ((distance >= horizon[0]) & (distance <= horizon[1])) * response[:, :, None]
    fai = (share * ahead[:, None]).sum(-2) / ahead.sum(1).clamp(min=1)[:, None]
    span = (share * distance).sum((-1, -2)) / response.sum(1)[:, None]
    return (share * distance.clamp(max=window)).sum(-1), fai, span


def assert_reads_the_weights(model, layers, atol, vocabulary=60):
    ids, attended, response = batch(vocabulary)
    before = model.config._attn_implementation
    with probe(model, layers, response_mask=response, attention_mask=attended, **OPTIONS) as rhythms, torch.no_grad():
        model(input_ids=ids, attention_mask=attended)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=ids, attention_mask=attended, output_attentions=True).attentions
    model.set_attn_implementation(before)
    assert list(rhythms) == layers
    for layer, rhythm in rhythms.items():
        waad, fai, span = from_dense(weights[layer], response, **OPTIONS)
        keys = attended[:, None].bool()
        torch.testing.assert_close(rhythm.waad.double(), waad, rtol=0, atol=atol)
        torch.testing.assert_close(rhythm.fai.double(), fai * keys, rtol=0, atol=atol)
        torch.testing.assert_close(rhythm.span.double(), span, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_reads_what_output_attentions_gives(kind, attention):
    name, options = KINDS[kind]
    assert_reads_the_weights(tiny(name, attention, **options), [0, 1, 2, 3], atol=2e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_read_in_all_heads_and_in_settled_ones():
    model = tiny(attention="flex_attention")
    ids, attended, response = batch()
    heads = {1: ([0], [3]), 2: ([1, 2], [])}
    with torch.compiler.set_stance("force_eager"):
        assert_reads_the_weights(model, [0, 1, 2, 3], atol=2e-4)
        every = read_rhythm(model, ids, attended, response, [1, 2], **OPTIONS)
        some = read_rhythm(model, ids, attended, response, [1, 2], heads=heads, **OPTIONS)
    for layer, (local, remote) in heads.items():
        torch.testing.assert_close(some[layer].waad, every[layer].waad[:, local], rtol=0, atol=1e-5)
        torch.testing.assert_close(some[layer].fai, every[layer].fai[:, remote], rtol=0, atol=1e-6)


def two_dimensional(module, q, k, v, mask, scaling=None, **_):
    """In the place of flash attention, which needs a GPU: like it, it gets a mask (B, T) or none."""
    assert mask is None or mask.ndim == 2
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
    seen = seen if mask is None else seen & mask[:, None, None].bool()
    seen = seen | torch.eye(q.shape[2], dtype=torch.bool)  # a row of padding sees itself, or it would be nan
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("padded", [False, True])
def test_what_flash_attention_gets_stays_as_it_is_and_is_read(padded, monkeypatch):
    model = tiny()
    ids, attended, response = batch()
    attended = attended if padded else torch.ones_like(attended)
    response = response * attended
    expected = read_rhythm(model, ids, attended, response, [1, 2], **OPTIONS)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", two_dimensional)
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=attended).logits
    masks = {"response_mask": response, "attention_mask": attended}
    with probe(model, [1, 2], **masks, **OPTIONS) as rhythms:
        assert torch.equal(model(input_ids=ids, attention_mask=attended).logits, plain)
    for layer, rhythm in rhythms.items():
        torch.testing.assert_close(rhythm.waad, expected[layer].waad, rtol=0, atol=1e-4)
        torch.testing.assert_close(rhythm.fai, expected[layer].fai, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settled", [False, True])
def test_outputs_are_bit_identical_and_nothing_stays_behind(attention, settled):
    model = tiny(attention=attention)
    ids, attended, response = batch()
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    heads = {1: ([0], [3]), 2: ([1, 2], [])} if settled else None
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=attended).logits
    masks = {"response_mask": response, "attention_mask": attended}
    with probe(model, [1, 2], heads=heads, **masks, **OPTIONS) as rhythms:
        probed = model(input_ids=ids, attention_mask=attended).logits
    assert torch.equal(plain, probed)
    assert not probed.requires_grad
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    if settled:
        assert rhythms[2].waad.shape == (3, 2, 50) and rhythms[2].fai.shape == (3, 0, 50)


@pytest.mark.parametrize(("kind", "options"), [("Llama", {}), ("Mistral", {"sliding_window": 7})])
def test_settled_heads_read_as_among_all(kind, options):
    model = tiny(kind, **options)
    ids, attended, response = batch()
    every = read_rhythm(model, ids, attended, response, [1, 3], **OPTIONS)
    heads = split_heads({layer: rhythm.span.mean(0) for layer, rhythm in every.items()})
    masks = {"response_mask": response, "attention_mask": attended}
    with probe(model, [1, 3], heads=heads, **masks, **OPTIONS) as some:
        model(input_ids=ids, attention_mask=attended)
    for layer, (local, remote) in heads.items():
        torch.testing.assert_close(some[layer].waad, every[layer].waad[:, local], rtol=0, atol=1e-5)
        torch.testing.assert_close(some[layer].fai, every[layer].fai[:, remote], rtol=0, atol=1e-6)


def test_settled_heads_use_the_log_sum_exp_of_the_models_own_attention(monkeypatch):
    model = tiny()
    ids, attended, response = batch()
    heads = {1: ([0], [3]), 3: ([1, 2], [0])}
    every = read_rhythm(model, ids, attended, response, [1, 3], heads=heads, **OPTIONS)

    def again(*_, **__):
        raise AssertionError("the log-sum-exp is found again")

    monkeypatch.setattr("krontune.rl.rhythm.log_sum_exp", again)
    masks = {"response_mask": response, "attention_mask": attended}
    with probe(model, [1, 3], heads=heads, **masks, **OPTIONS) as kept:
        model(input_ids=ids, attention_mask=attended)
    for layer, rhythm in kept.items():
        torch.testing.assert_close(rhythm.waad, every[layer].waad, rtol=0, atol=1e-5)
        torch.testing.assert_close(rhythm.fai, every[layer].fai, rtol=0, atol=1e-6)


def test_an_error_in_the_forward_leaves_nothing_behind():
    model = tiny().train()
    model.model.layers[3].eval()
    modes = [module.training for module in model.modules()]
    functions = dict(ALL_ATTENTION_FUNCTIONS)

    def fail(*_):
        raise KeyboardInterrupt

    model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read_rhythm(model, *batch(), [2], **OPTIONS)
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions and torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes


def test_stopping_early_reads_the_same_and_runs_no_later_layer():
    model = tiny().train()
    ids, attended, response = batch()
    ran = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, *_: ran.append(module))
    early = read_rhythm(model, ids, attended, response, [0, 2], **OPTIONS)
    assert [id(module) for module in ran] == [id(layer.mlp) for layer in model.model.layers[:2]]
    assert all(module.training for module in model.modules())
    model.eval()
    with probe(model, [0, 2], response_mask=response, attention_mask=attended, **OPTIONS) as whole:
        model(input_ids=ids, attention_mask=attended)
    assert torch.equal(early[2].waad, whole[2].waad) and torch.equal(early[2].fai, whole[2].fai)


def test_dropout_is_off_while_reading():
    model = tiny(attention_dropout=0.5).train()
    ids, attended, response = batch()
    first, second = (read_rhythm(model, ids, attended, response, [3], **OPTIONS)[3].waad for _ in range(2))
    assert torch.equal(first, second)


def test_adapters_are_read_and_disabled_ones_refused():
    base = tiny()
    ids, attended, response = batch()
    plain = read_rhythm(base, ids, attended, response, [3], **OPTIONS)[3].waad
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    assert not torch.allclose(plain, read_rhythm(model, ids, attended, response, [3], **OPTIONS)[3].waad, atol=1e-3)
    assert_reads_the_weights(model.get_base_model(), [3], atol=2e-4)
    with model.disable_adapter(), pytest.raises(RlError, match="disabled"):
        read_rhythm(model, ids, attended, response, [3])


def test_a_training_step_after_the_pass_has_the_same_gradients():
    ids, attended, response = batch()
    gradients = []
    for read in (False, True):
        model = tiny().train()
        model.gradient_checkpointing_enable()
        if read:
            read_rhythm(model, ids, attended, response, **OPTIONS)
        model(input_ids=ids, attention_mask=attended, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


def test_packed_rows_read_as_the_rows_they_hold():
    model = tiny()
    ids, _, response = batch()
    response[:, :20], response[:, 20:] = 0, 1
    ones = torch.ones_like(ids[:2])
    apart = read_rhythm(model, ids[:2], ones, response[:2], [0], **OPTIONS)[0]
    packed = ids[:2].reshape(1, -1)
    segments = torch.tensor([0] * 50 + [1] * 50)[None]
    places = torch.arange(50).repeat(2)[None]
    masks = {"response_mask": response[:2].reshape(1, -1), "segment_ids": segments}
    with probe(model, [0], **masks, **OPTIONS) as rhythms:
        model(input_ids=packed, position_ids=places, use_cache=False)
    torch.testing.assert_close(rhythms[0].waad[0], torch.cat(list(apart.waad), -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(rhythms[0].fai[0], torch.cat(list(apart.fai), -1), rtol=0, atol=1e-5)


def test_attention_that_cannot_be_read_is_refused_by_name():
    ids, attended, response = batch()
    moe = {"num_local_experts": 2, "num_experts_per_tok": 1}
    mla = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    mla |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 4}
    unreadable = {
        "softcap": ("Gemma2", {}),
        "sinks": ("GptOss", moe),
        "latent": ("DeepseekV3", mla),
        "linear_attention": ("Qwen3Next", {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
    }
    for name, (kind, options) in unreadable.items():
        model = tiny(kind, "eager", **options)
        with pytest.raises(RlError, match=name):
            read_rhythm(model, ids, attended, response, [1])


def test_misuse_of_the_probe_is_refused():
    model = tiny()
    ids, attended, response = batch()
    with pytest.raises(RlError, match="from 0 to 3"):
        read_rhythm(model, ids, attended, response, [4])
    with pytest.raises(RlError, match=r"heads are of the layers \[1\], read are \[1, 2\]"):
        read_rhythm(model, ids, attended, response, [1, 2], heads={1: ([0], [1])})
    with pytest.raises(RlError, match="did not call"), probe(model, [1], response_mask=response):
        pass
    with pytest.raises(RlError, match="twice"), probe(model, [1], response_mask=response):
        model(input_ids=ids)
        model(input_ids=ids)
    cache = model(input_ids=ids[:, :-1]).past_key_values
    with pytest.raises(RlError, match="cache"), probe(model, [1], response_mask=response[:, -1:]):
        model(input_ids=ids[:, -1:], past_key_values=cache)
    with pytest.raises(RlError, match="ModuleList"):
        read_rhythm(torch.nn.ModuleList([model]), ids, attended, response)
    assert ALL_ATTENTION_FUNCTIONS.get("eager") is None


def test_another_model_may_run_inside_a_probe_and_probes_may_nest():
    one, other = tiny(), tiny("Qwen3")
    ids, attended, response = batch()
    alone = [read_rhythm(model, ids, attended, response, [1], **OPTIONS)[1].waad for model in (one, other)]
    masks = {"response_mask": response, "attention_mask": attended}
    with probe(one, [1], **masks, **OPTIONS) as first, probe(other, [1], **masks, **OPTIONS) as second:
        one(input_ids=ids, attention_mask=attended)
        other(input_ids=ids, attention_mask=attended)
    assert torch.equal(first[1].waad, alone[0]) and torch.equal(second[1].waad, alone[1])


def test_the_middle_third_is_five_layers_or_as_many_as_there_are():
    assert middle_third(36) == [12, 15, 18, 21, 24]
    assert middle_third(30) == [10, 13, 15, 18, 20]
    assert [middle_third(n) for n in (1, 2, 4)] == [[0], [0, 1], [1, 2]]


def test_smollm2_reads_as_output_attentions():
    from krontune.adapters import load_base

    model, _ = load_base("smollm2-135m", quantization=None)
    assert_reads_the_weights(model.float().eval(), middle_third(30), atol=1e-3, vocabulary=40000)


def test_smollm2_in_four_bits_reads_as_output_attentions():
    from krontune.adapters import load_base

    model, _ = load_base("smollm2-135m", quantization="nf4")
    # Eager on both sides: in bfloat16 the hidden states of fused and eager attention differ more than the rhythm.
    model.set_attn_implementation("eager")
    assert_reads_the_weights(model.eval(), middle_third(30), atol=0.05, vocabulary=40000)
