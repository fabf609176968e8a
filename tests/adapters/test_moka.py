"""MoKA as a PEFT tuner on a tiny random Llama: structure, forward, configuration, several adapters."""

from dataclasses import replace

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from krontune.adapters import AdapterError, MokaConfig, MokaLayer, MokaLinear
from krontune.adapters.kronecker import balanced_shapes


def layers(model):
    return [module for module in model.modules() if isinstance(module, MokaLayer)]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def naive_delta_weight(layer, adapter="default"):
    a = [matrix for stack in layer.moka_A[adapter] for matrix in stack]
    b = [matrix for stack in layer.moka_B[adapter] for matrix in stack]
    g = torch.softmax(layer.moka_gate[adapter].logits, dim=0)
    alpha = layer.moka_alpha[adapter]
    return alpha * sum(g[i] * torch.kron(a[i], b[i]) for i in range(len(a)))


def test_training_starts_at_the_base_model(tiny, tokens):
    expected = logits(tiny, tokens)
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear"))
    assert torch.equal(logits(model, tokens), expected)


def test_b_and_the_gate_logits_start_at_zero_and_a_does_not(tiny_llama):
    model = get_peft_model(tiny_llama().bfloat16(), MokaConfig(target_modules="all-linear"))
    assert len(layers(model)) == 14
    for layer in layers(model):
        gate = layer.moka_gate["default"].logits
        assert gate.dtype == torch.float32 and not gate.any()
        assert all(not b.any() for b in layer.moka_B["default"])
        assert all(a.abs().min(dim=0).values.max() > 0 for a in layer.moka_A["default"])


def test_every_a_factor_of_balanced_shapes_is_kaiming_uniform_in_its_own_fan_in():
    torch.manual_seed(0)
    layer = MokaLinear(torch.nn.Linear(1024, 1024), "default", MokaConfig(r=5, shapes="balanced"), r=5, alpha=5.0)
    assert len(layer.moka_A["default"]) == 5
    for a in layer.moka_A["default"]:
        bound = a.shape[-1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert abs(a.std() - bound / 3**0.5) < 0.1 * bound


def test_only_the_adapter_is_trained(tiny):
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"]))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".moka_" in name and ".q_proj." in name for name in trained)


def test_default_targets_are_q_and_v(tiny):
    model = get_peft_model(tiny, MokaConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_delta_weight_is_the_gated_sum_of_kron_and_the_effect_of_the_forward(tiny, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear", r=7, alpha=3.0)))
    for layer in layers(model):
        for rows in (1, 5, 600):
            x = torch.randn(rows, layer.in_features)
            delta = layer.get_delta_weight("default")
            torch.testing.assert_close(delta, naive_delta_weight(layer), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ delta.T, rtol=1e-3, atol=1e-3)


def test_one_step_moves_b_and_a_second_one_moves_everything(tiny, tokens):
    torch.manual_seed(0)
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear", r=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".moka_" in name}


def naive_parameter_count(n_out, n_in, r, n_shapes):
    shapes = balanced_shapes(n_out, n_in, n_shapes)
    return r + sum(
        a_out * a_in + (n_out // a_out) * (n_in // a_in) for a_out, a_in in (shapes[i % len(shapes)] for i in range(r))
    )


@pytest.mark.parametrize(("r", "n_shapes"), [(10, 5), (7, 3), (2, 5), (1, 1)])
def test_number_of_parameters(tiny, r, n_shapes):
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear", r=r, n_shapes=n_shapes, shapes="balanced"))
    expected = sum(naive_parameter_count(m.out_features, m.in_features, r, n_shapes) for m in layers(model))
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("shapes", ["ladder", "balanced"])
def test_ten_products_on_4096_square_cost_81920_parameters_and_ten_gates(shapes):
    base = torch.nn.Linear(4096, 4096, device="meta")
    layer = MokaLinear(base, "default", MokaConfig(shapes=shapes), r=10, alpha=10.0)
    factors = [*layer.moka_A.parameters(), *layer.moka_B.parameters()]
    assert sum(p.numel() for p in factors) == 81_920
    assert layer.moka_gate["default"].logits.numel() == 10


def test_products_are_spread_evenly_where_n_shapes_does_not_divide_r(tiny):
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], r=8, n_shapes=3))
    assert layers(model)[0].moka_counts["default"] == [3, 3, 2]


def test_explicit_shapes_are_used_and_recorded(tiny):
    shapes = [(8, 16), (4, 2)]
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], r=4, shapes=shapes))
    layer = layers(model)[0]
    assert [tuple(a.shape) for a in layer.moka_A["default"]] == [(2, 8, 16), (2, 4, 2)]
    assert [tuple(b.shape) for b in layer.moka_B["default"]] == [(2, 8, 4), (2, 16, 32)]
    assert model.peft_config["default"].resolved_shapes == {"64x64:5": shapes}


def test_explicit_shapes_that_do_not_divide_the_layer_are_refused_with_those_that_do(tiny):
    with pytest.raises(AdapterError, match=r"shape \(48, 64\) does not fit .* divide 64 \(1, 2, 4, 8, 16, 32, 64\)"):
        get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], shapes=[(48, 64)]))


def test_rank_and_alpha_patterns(tiny, shake):
    config = MokaConfig(
        target_modules=["q_proj", "down_proj"],
        r=6,
        alpha=6.0,
        rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        alpha_pattern={"q_proj": 1.5},
    )
    model = get_peft_model(tiny, config).base_model.model.model
    q0, q1, down = (
        model.layers[0].self_attn.q_proj,
        model.layers[1].self_attn.q_proj,
        model.layers[1].mlp.down_proj,
    )
    assert [sum(m.moka_counts["default"]) for m in (q0, q1, down)] == [6, 3, 2]
    assert [m.moka_alpha["default"] for m in (q0, q1, down)] == [1.5, 1.5, 6.0]
    assert q0.mixture_weights("default").tolist() == pytest.approx([0.25] * 6)


@pytest.mark.parametrize(("options", "share"), [({}, 1), ({"shapes": "ladder"}, 2), ({"shapes": [(4, 4)]}, 1)])
def test_alpha_follows_the_layers_r_when_it_is_not_given(tiny, options, share):
    config = MokaConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, **options)
    attention = get_peft_model(tiny, config).base_model.model.model.layers[0].self_attn
    alphas = attention.q_proj.moka_alpha["default"], attention.v_proj.moka_alpha["default"]
    assert alphas == (4.0 * share, 2.0 * share)


def test_a_config_used_again_with_other_n_shapes_takes_other_shapes(tiny_llama):
    config = MokaConfig(r=4, n_shapes=4, target_modules=["q_proj"])
    get_peft_model(tiny_llama(), config)
    model = get_peft_model(tiny_llama(), replace(config, n_shapes=2))
    assert layers(model)[0].moka_counts["default"] == [2, 2]


@pytest.mark.parametrize("changes", [{"shapes": "ladder"}, {"identity": "A"}, {"identity": "B", "r": 2}])
def test_a_config_used_again_with_another_choice_takes_the_shapes_of_that_choice(tiny_llama, changes):
    options = {"r": 4, "target_modules": ["q_proj"]}
    config = MokaConfig(**options)
    get_peft_model(tiny_llama(), config)
    again = get_peft_model(tiny_llama(), replace(config, **changes))
    fresh = get_peft_model(tiny_llama(), MokaConfig(**options | changes))
    for one, other in zip(again.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert one.shape == other.shape


def test_a_float64_base_is_adapted_and_merged_in_float64(tiny_llama, tokens, shake):
    model = shake(get_peft_model(tiny_llama().double(), MokaConfig(target_modules="all-linear")), scale=0.1)
    expected = logits(model, tokens)
    assert {p.dtype for name, p in model.named_parameters() if ".moka_" in name} == {torch.float64}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"identity": "A"}])
def test_a_model_without_memory_passes_shapes_forward_and_backward(tiny_llama, tokens, options):
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(), MokaConfig(target_modules=["q_proj"], **options))
    loss = model(input_ids=tokens.to("meta"), labels=tokens.to("meta")).loss
    loss.backward()
    assert all(p.grad.shape == p.shape for name, p in model.named_parameters() if ".moka_" in name)


def test_peft_reports_the_state_of_every_adapter(tiny):
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj"]))
    model.add_adapter("other", MokaConfig(target_modules=["q_proj"], r=2))
    model.merge_adapter(["default"])
    status = peft.get_model_status(model)
    assert status.peft_types == {"default": "MOKA", "other": "MOKA"} and status.num_adapter_layers == 2
    assert status.merged_adapters == ["default"] and status.requires_grad == {"default": True, "other": False}


def test_layers_to_transform_and_exclude_modules(tiny):
    config = MokaConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"])
    model = get_peft_model(tiny, config)
    assert model.base_model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def test_without_a_gate_the_products_have_fixed_equal_weights(tiny):
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear", r=4, alpha=2.0, gate="none"))
    assert not any("moka_gate" in name for name, _ in model.named_parameters())
    assert layers(model)[0].mixture_weights("default").tolist() == [0.5] * 4


def test_dropout_acts_on_the_adapter_in_training_only(tiny, tokens, shake):
    expected = logits(tiny, tokens)
    model = get_peft_model(tiny, MokaConfig(target_modules="all-linear", dropout=0.5))
    model.train()
    assert torch.equal(logits(model, tokens), expected)  # B is zero: dropout touches nothing of the base
    shake(model)
    assert not torch.equal(logits(model, tokens), logits(model, tokens))
    model.eval()
    with_dropout = logits(model, tokens)
    for layer in layers(model):
        layer.moka_dropout["default"] = torch.nn.Identity()
    assert torch.equal(with_dropout, logits(model, tokens))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r must be a positive whole number"),
        ({"r": 2.5}, "r must be a positive whole number"),
        ({"r": True}, "r must be a positive whole number"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be"),
        ({"n_shapes": 0}, "n_shapes must be"),
        ({"n_shapes": "3"}, "n_shapes must be"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"alpha": float("nan")}, "alpha must be a positive number"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be"),
        ({"gate": "sigmoid"}, "gate must be 'softmax' or 'none', got 'sigmoid'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": "no"}, r"dropout must be in \[0, 1\)"),
        ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'moka_only'"),
        ({"identity": "C"}, "identity must be None, 'A' or 'B'"),
        ({"init_weights": "svd"}, "init_weights must be True, False or 'nearest'"),
        ({"init_weights": "nearest", "identity": "A"}, "use one of the two"),
        ({"shapes": "square"}, "shapes must be 'ladder', 'balanced'"),
        ({"shapes": []}, "shapes must be 'ladder', 'balanced'"),
        ({"shapes": [8, 8]}, "shapes must be 'ladder', 'balanced'"),
        ({"shapes": [(8,)]}, "shapes must be 'ladder', 'balanced'"),
        ({"shapes": [(8, 0)]}, "shapes must be 'ladder', 'balanced'"),
        ({"shapes": [(8, 8), (4, 4)], "r": 1}, "r=1 products cannot fill them"),
        ({"layers_pattern": "layers"}, "layers_pattern is used with layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "regular expression"),
    ],
)
def test_wrong_configurations_are_refused_by_name(options, words):
    with pytest.raises(AdapterError, match=words):
        MokaConfig(**options)


def test_a_target_that_is_not_linear_is_named_in_the_error(tiny):
    with pytest.raises(AdapterError, match="'model.embed_tokens' is of type Embedding"):
        get_peft_model(tiny, MokaConfig(target_modules=["embed_tokens"]))


def test_two_adapters_switch_add_up_and_are_deleted(tiny, tokens, shake):
    base = logits(tiny, tokens)
    model = get_peft_model(tiny, MokaConfig(target_modules=["q_proj", "v_proj"], r=3))
    model.add_adapter("other", MokaConfig(target_modules=["v_proj", "up_proj"], r=2, n_shapes=1))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other" in name)
    shake(model), shake(model, "other", seed=2)
    first = logits(model, tokens)
    model.set_adapter("other")
    second = logits(model, tokens)
    assert not torch.allclose(first, second, atol=1e-2)
    trained = {name.split(".moka_")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".other" in name for name in trained)
    model.base_model.set_adapter(["default", "other"])
    v_proj = model.base_model.model.model.layers[0].self_attn.v_proj
    x = torch.randn(3, 64)
    both = v_proj.get_delta_weight("default") + v_proj.get_delta_weight("other")
    torch.testing.assert_close(v_proj(x) - v_proj.base_layer(x), x @ both.T, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), base)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model, tokens), first)
    assert not any("other" in name for name in model.state_dict())
    for layer in layers(model):
        assert "other" not in layer._all_available_adapter_names()


def test_scales_multiply_the_trained_update(tiny, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], alpha=3.0)))
    layer = layers(model)[0]
    trained = layer.get_delta_weight("default").detach()
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * trained)
    layer.scale_layer(4.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2.0 * trained)
    layer.unscale_layer(4.0)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * trained)
    layer.unscale_layer()
    assert torch.equal(layer.get_delta_weight("default"), trained)


def test_a_bfloat16_gate_becomes_float32_at_the_next_forward_and_keeps_its_gradient(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"])))
    gates = [layer.moka_gate["default"].logits for layer in layers(model)]
    for gate in gates:
        gate.data = gate.data.bfloat16()
    with torch.inference_mode():
        model(tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for gate, layer in zip(gates, layers(model), strict=True):
        assert layer.moka_gate["default"].logits is gate
        assert gate.dtype == torch.float32 and gate.grad.dtype == torch.float32 and gate.grad.any()


def test_a_step_too_small_for_bfloat16_moves_factors_that_a_trainer_cast_to_it(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"])))
    factors = [p for layer in layers(model) for p in (*layer.moka_A.parameters(), *layer.moka_B.parameters())]
    for p in factors:
        p.data = p.data.bfloat16()
    before = [p.detach().float().clone() for p in factors]
    optimizer = torch.optim.SGD(factors, lr=1.0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    for p in factors:
        p.grad = torch.full_like(p, 1e-4)
    optimizer.step()
    for p, was in zip(factors, before, strict=True):
        torch.testing.assert_close(was - p.float(), torch.full_like(was, 1e-4), rtol=1e-2, atol=0)


def test_adapter_weights_keep_the_base_dtype_where_autocasting_is_off(tiny_llama):
    model = get_peft_model(tiny_llama().bfloat16(), MokaConfig(), autocast_adapter_dtype=False)
    model(torch.tensor([[3, 4]]))
    dtypes = {p.dtype for name, p in model.named_parameters() if ".moka_" in name}
    assert dtypes == {torch.bfloat16}


def test_autocast_computes_the_update_in_bfloat16(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear")), scale=0.1)
    expected = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = logits(model, tokens)
    assert (near - expected).norm() < 0.05 * expected.norm()


def test_gradient_checkpointing_gives_the_same_gradients(tiny, tokens, shake):
    model = shake(get_peft_model(tiny, MokaConfig(target_modules="all-linear")), scale=0.1).train()

    def gradients():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    for grad, same in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(grad, same)


def test_an_adapter_may_stand_on_a_layer_with_a_bias(shake):
    model = torch.nn.Sequential(torch.nn.Linear(24, 36))
    x = torch.randn(5, 24)
    expected = model(x)
    adapted = get_peft_model(model, MokaConfig(target_modules=["0"], r=3))
    torch.testing.assert_close(adapted(x), expected)
    layer = layers(shake(adapted))[0]
    torch.testing.assert_close(adapted(x), expected + x @ layer.get_delta_weight("default").T)


def test_moka_and_lora_do_not_share_a_model_silently(tiny):
    model = get_peft_model(tiny, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError):
        model.add_adapter("moka", MokaConfig(target_modules=["q_proj"]))


def test_peft_knows_the_tuner_by_name():
    assert peft.get_peft_config({"peft_type": "MOKA", "r": 3}).r == 3
