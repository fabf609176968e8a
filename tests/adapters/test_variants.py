"""MoKA_s, the start at the nearest Kronecker sum, trained biases, and layers of other kinds and odd sizes."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Wav2Vec2Config, Wav2Vec2ForCTC

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, export_merged, load_base
from krontune.adapters.identity import identity_mix, identity_sizes
from krontune.adapters.initial import nearest_kron_sum


def layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def naive_identity_matrix(factors, gates, fixed, n_in):
    total = 0
    for stack, gate in zip(factors, gates, strict=True):
        eye = torch.eye(n_in // stack.shape[2], dtype=stack.dtype)
        for factor, g in zip(stack, gate, strict=True):
            total = total + g * (torch.kron(eye, factor) if fixed == "A" else torch.kron(factor, eye))
    return total


@pytest.mark.parametrize("fixed", ["A", "B"])
@pytest.mark.parametrize("rows", [(), (1,), (3, 5)])
def test_products_with_an_identity_equal_their_kron_in_values_and_gradients(fixed, rows):
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = 36, 24
    factors = [
        torch.randn(k, n_out // s, n_in // s, generator=generator, dtype=torch.float64).requires_grad_()
        for k, s in ((2, 6), (1, 12), (3, 1))
    ]
    gates = [torch.rand(len(f), generator=generator, dtype=torch.float64).requires_grad_() for f in factors]
    x = torch.randn(*rows, n_in, generator=generator, dtype=torch.float64, requires_grad=True)
    fast = identity_mix(x, factors, gates, fixed)
    slow = x @ naive_identity_matrix(factors, gates, fixed, n_in).T
    torch.testing.assert_close(fast, slow)
    weights = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    inputs = [x, *factors, *gates]
    for one, other in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sizes", [(4096, 4096), (1024, 4096), (576, 192), (11008, 4096), (896, 128), (49152, 576)])
def test_identities_divide_the_layer_and_leave_light_factors(sizes):
    n_out, n_in = sizes
    found = identity_sizes(n_out, n_in, 5)
    assert len(set(found)) == len(found) > 0
    for size in found:
        assert n_out % size == 0 and n_in % size == 0
        assert size == max(found) or n_out * n_in // size**2 <= (n_out * n_in) ** 0.5


@pytest.mark.parametrize("fixed", ["A", "B"])
def test_moka_s_starts_at_the_base_trains_merges_and_reads_back(tiny_llama, tokens, shake, tmp_path, fixed):
    base = logits(tiny_llama(), tokens)
    config = MokaConfig(target_modules="all-linear", identity=fixed, r=4, n_shapes=4)
    model = get_peft_model(tiny_llama(), config)
    torch.testing.assert_close(logits(model, tokens), base)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(f".moka_{fixed}." in name for name in names)
    shake(model, scale=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name in names)
    for layer in layers(model):
        x = torch.randn(4, layer.in_features)
        torch.testing.assert_close(
            layer(x) - layer.base_layer(x), x @ layer.get_delta_weight("default").T, rtol=1e-3, atol=1e-4
        )
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path), tokens), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-4)


def test_moka_s_costs_less_than_moka(tiny_llama):
    whole, light = (
        get_peft_model(tiny_llama(), MokaConfig(identity=identity)).get_nb_trainable_parameters()[0]
        for identity in (None, "A")
    )
    assert light < whole


def test_identities_that_cannot_be_are_refused_by_name():
    linear = torch.nn.Sequential(torch.nn.Linear(7, 9))
    with pytest.raises(AdapterError, match="9 outputs and 7 inputs have none"):
        get_peft_model(linear, MokaConfig(target_modules=["0"], identity="A"))
    linear = torch.nn.Sequential(torch.nn.Linear(8, 16))
    with pytest.raises(AdapterError, match="makes B 8 x 4, and an identity is square"):
        get_peft_model(linear, MokaConfig(target_modules=["0"], identity="B", shapes=[(2, 2)]))


def naive_error_of_best_products(weight, shape, k):
    """Eckart and Young: what the first k terms of the SVD of the rearranged matrix leave over."""
    (m, n), (m_a, n_a) = weight.shape, shape
    rows = [
        weight[i * (m // m_a) : (i + 1) * (m // m_a), j * (n // n_a) : (j + 1) * (n // n_a)].reshape(-1)
        for i in range(m_a)
        for j in range(n_a)
    ]
    return torch.linalg.svdvals(torch.stack(rows))[k:].square().sum().sqrt()


@pytest.mark.parametrize(
    ("size", "shape", "k"), [((36, 24), (6, 4), 3), ((36, 24), (3, 8), 1), ((640, 576), (32, 16), 2)]
)
def test_the_nearest_kronecker_sum_of_one_shape_is_the_best_one(size, shape, k):
    torch.manual_seed(0)
    weight = torch.randn(size)
    # A spectrum that falls, as that of real weights does: a projection finds the first terms of a flat one less well.
    weight = weight + 3 * torch.kron(torch.randn(shape), torch.randn(size[0] // shape[0], size[1] // shape[1]))
    (a,), (b,) = nearest_kron_sum(weight, [shape], [k])
    near = sum(torch.kron(one, other) for one, other in zip(a, b, strict=True))
    torch.testing.assert_close(
        (weight - near).norm(), naive_error_of_best_products(weight, shape, k), rtol=2e-3, atol=0
    )


def test_a_second_shape_adds_nothing_where_the_first_one_leaves_nothing():
    torch.manual_seed(0)
    weight = torch.kron(torch.randn(4, 6), torch.randn(9, 4))
    stacks = nearest_kron_sum(weight, [(4, 6), (12, 3)], [1, 1])
    near = sum(torch.kron(a[0], b[0]) for a, b in zip(*stacks, strict=True))
    torch.testing.assert_close(near, weight, rtol=1e-4, atol=1e-4)


def test_a_sum_over_two_shapes_is_nearer_than_over_one():
    torch.manual_seed(0)
    weight = torch.kron(torch.randn(4, 6), torch.randn(9, 4)) + torch.kron(torch.randn(12, 3), torch.randn(3, 8))
    left = []
    for shapes in ([(4, 6)], [(4, 6), (12, 3)]):
        stacks = nearest_kron_sum(weight, shapes, [1] * len(shapes))
        left.append((weight - sum(torch.kron(a[0], b[0]) for a, b in zip(*stacks, strict=True))).norm())
    assert left[1] < 0.6 * left[0]


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_start_at_the_nearest_sum_leaves_output_and_base_and_points_a(tiny_folder, tokens, quantization):
    base, _ = load_base(tiny_folder, quantization, device="cpu")
    expected = logits(base, tokens)
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    model = get_peft_model(base, MokaConfig(r=5, init_weights="nearest"))
    assert torch.equal(logits(model, tokens), expected)
    layer = layers(model)[0]
    assert torch.equal(layer.base_layer.weight, before)
    a = layer.moka_A["default"][0]
    (near, *_), _ = nearest_kron_sum(layer.base_matrix(), [tuple(a.shape[1:])], [len(a)])
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), near.flatten(1)).abs()
    torch.testing.assert_close(cosine, torch.ones(len(a)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        a.flatten(1).norm(dim=1), torch.full((len(a),), (a.shape[1] / 3) ** 0.5), rtol=2e-3, atol=0
    )


def test_products_beyond_the_rank_of_the_weight_start_at_random():
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    linear[0].weight.data = torch.kron(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    model = get_peft_model(linear, MokaConfig(target_modules=["0"], r=3, shapes=[(2, 2)], init_weights="nearest"))
    a = layers(model)[0].moka_A["default"][0]
    assert torch.isfinite(a).all() and (a.flatten(1).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(("bias", "trained"), [("none", set()), ("moka_only", {"q"}), ("all", {"q", "k", "v"})])
def test_biases_are_trained_and_saved_as_asked(tiny_llama, tokens, tmp_path, bias, trained):
    model = get_peft_model(tiny_llama(attention_bias=True), MokaConfig(target_modules=["q_proj"], bias=bias))
    names = {name.split("_proj")[0][-1] for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    assert names - {"o"} == trained
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bias" in name:
            torch.nn.init.normal_(parameter.data)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(attention_bias=True), tmp_path)
    assert torch.equal(logits(again, tokens), expected)


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=32, n_embd=24, n_layer=2, n_head=2, initializer_range=0.1)
    return GPT2LMHeadModel(config).eval()


def test_the_conv1d_of_gpt2_is_adapted_merged_and_exported(tokens, shake, tmp_path):
    model = shake(get_peft_model(tiny_gpt2(), MokaConfig(target_modules=["c_attn", "c_proj"], r=4)), scale=0.1).eval()
    layer = layers(model)[0]
    assert (layer.in_features, layer.out_features) == (24, 72) and layer.get_delta_weight("default").shape == (24, 72)
    expected = logits(model, tokens)
    exported = GPT2LMHeadModel.from_pretrained(export_merged(model, tmp_path, torch.float32))
    torch.testing.assert_close(logits(exported, tokens), expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)


def test_a_model_of_sound_without_input_embeddings_is_adapted():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    config = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = get_peft_model(Wav2Vec2ForCTC(config), MokaConfig(target_modules=["q_proj", "lm_head"], r=2))
    model(torch.randn(1, 400)).logits.sum().backward()
    assert any(p.grad.any() for name, p in model.named_parameters() if "lm_head.moka_B" in name)


@pytest.mark.parametrize("size", [(896, 896), (11008, 64), (64, 11008), (1536, 576), (151936, 8), (49152, 16), (13, 7)])
def test_odd_widths_and_primes_are_adapted(size, shake):
    n_out, n_in = size
    model = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
    adapted = shake(get_peft_model(model, MokaConfig(target_modules=["0"], r=3)))
    x = torch.randn(2, n_in)
    layer = layers(adapted)[0]
    torch.testing.assert_close(
        adapted(x) - layer.base_layer(x), x @ layer.get_delta_weight("default").T, rtol=1e-3, atol=2e-3
    )
