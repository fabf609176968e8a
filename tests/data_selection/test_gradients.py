import importlib.util
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from krontune.adapters import MokaConfig, load_base
from krontune.data_selection import DataSelectionError
from krontune.data_selection.gradients import plan_gradients, scoring_mode, take_gradients
from krontune.data_selection.per_sample import kron_gradient
from krontune.data_selection.projections import (
    CountSketch,
    Factorised,
    FactorProjection,
    projection_key,
    projector,
    squared_norms,
)

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)


def naive_gradients(model, names, inputs, labels):
    """One sample at a time, without padding, by plain autograd: (B, d)."""
    model.eval()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    chosen = [parameters[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    rows = []
    for ids, mask, wanted in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True):
        length = int(mask.sum())
        ids, wanted = ids[None, :length], wanted[:length]
        logits = model(input_ids=ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, wanted[1:], ignore_index=-100)
        grads = torch.autograd.grad(loss, chosen)
        rows.append(torch.cat([grad.float().flatten() for grad in grads]))
    return torch.stack(rows)


def both(model, layers="last", data=None, sketch=None):
    inputs, labels = data or tiny.batch()
    plan = plan_gradients(model, layers)
    with scoring_mode(model):
        taken = take_gradients(model, plan, inputs, labels, sketch)
    expected = naive_gradients(model, plan.names, inputs, labels)
    return taken, expected


def relative_errors(found, expected):
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


ADAPTERS = {
    "lora": lambda model: tiny.with_lora(model),
    "lora_dropout": lambda model: tiny.with_lora(model, lora_dropout=0.3).train(),
    "moka": lambda model: tiny.with_moka(model),
    "moka_one_shape": lambda model: tiny.with_moka(model, n_shapes=1, r=3, gate="none", dropout=0.2).train(),
    "moka_identity_a": lambda model: tiny.with_moka(model, identity="A"),
    "moka_identity_b": lambda model: tiny.with_moka(model, identity="B", alpha=3.0),
}


@pytest.mark.parametrize("layers", ["last", "all", [0]])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_batched_gradients_equal_one_by_one(adapter, layers):
    taken, expected = both(ADAPTERS[adapter](tiny.tiny_llama()), layers)
    assert expected.norm(dim=1).min() > 0
    assert relative_errors(taken.vectors, expected) < 1e-5
    torch.testing.assert_close(taken.norms, expected.norm(dim=1), rtol=1e-5, atol=0)


def test_the_rows_are_told_apart():
    taken, expected = both(tiny.with_lora(tiny.tiny_llama()))
    assert relative_errors(taken.vectors, expected.flip(0)) > 0.5


@pytest.mark.parametrize("adapter", ["lora", "moka"])
def test_gradients_over_nf4_equal_one_by_one(adapter, tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base, _ = load_base(tmp_path, "nf4", dtype=torch.float32, device="cpu")
    taken, expected = both(ADAPTERS[adapter](base), "all")
    assert relative_errors(taken.vectors, expected) < 1e-4


@pytest.mark.parametrize("adapter", ["lora", "moka"])
def test_gradients_over_bfloat16_point_where_one_by_one_ones_do(adapter):
    taken, expected = both(ADAPTERS[adapter](tiny.tiny_llama().bfloat16()), "all")
    assert torch.cosine_similarity(taken.vectors, expected).min() > 0.999


@pytest.mark.parametrize("adapter", ["lora", "moka"])
def test_non_reentrant_checkpointing_changes_nothing(adapter):
    model = ADAPTERS[adapter](tiny.tiny_llama())
    plain, _ = both(model, "all")
    calls = []
    model.get_base_model().model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs, labels = tiny.batch()
    with scoring_mode(model):
        taken = take_gradients(model, plan_gradients(model, "all"), inputs, labels)
    assert len(calls) == 2, "the layer was not computed again, so checkpointing was off"
    assert torch.equal(taken.vectors, plain.vectors)


def test_reentrant_checkpointing_is_refused():
    model = tiny.with_lora(tiny.tiny_llama())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(DataSelectionError, match="use_reentrant"), scoring_mode(model):
        pass


@pytest.mark.parametrize("config", [LoraConfig(r=4, target_modules="all-linear"), MokaConfig(r=4)])
def test_a_fresh_adapter_is_refused_with_the_cure(config):
    with pytest.raises(DataSelectionError, match="warm-up"):
        plan_gradients(get_peft_model(tiny.tiny_llama(), config), "last")


def test_a_fresh_adapter_of_one_factor_is_taken():
    taken, expected = both(get_peft_model(tiny.tiny_llama(), MokaConfig(r=2, identity="A")))
    assert expected.norm(dim=1).min() > 0 and relative_errors(taken.vectors, expected) < 1e-5


def test_what_is_not_known_is_refused():
    model = tiny.tiny_llama()
    with pytest.raises(DataSelectionError, match="has none"):
        plan_gradients(model, "last")
    with pytest.raises(DataSelectionError, match="DoRA"):
        plan_gradients(tiny.with_lora(tiny.tiny_llama(), use_dora=True), "last")
    with pytest.raises(DataSelectionError, match="numbers of decoder layers"):
        plan_gradients(tiny.with_lora(tiny.tiny_llama()), [2])
    with pytest.raises(DataSelectionError, match="numbers of decoder layers"):
        plan_gradients(tiny.with_lora(tiny.tiny_llama()), "first")
    merged = tiny.with_lora(tiny.tiny_llama())
    merged.merge_adapter()
    with pytest.raises(DataSelectionError, match="unmerge"):
        plan_gradients(merged, "last")


def test_only_the_layers_asked_for_run_backward():
    model = tiny.with_lora(tiny.tiny_llama())
    inputs, labels = tiny.batch()
    seen = []

    def watch(module, args, output):
        seen.append(output.requires_grad)

    layers = model.get_base_model().model.layers
    layers[0].mlp.register_forward_hook(watch)
    layers[1].mlp.register_forward_hook(watch)
    with scoring_mode(model):
        take_gradients(model, plan_gradients(model, "last"), inputs, labels)
    assert seen == [False, True]


def test_modes_and_gradients_are_put_back_after_an_error():
    model = tiny.with_lora(tiny.tiny_llama()).train()
    model.get_base_model().model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), scoring_mode(model):
        raise KeyError
    assert modes == [module.training for module in model.modules()]
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]


def test_a_row_without_answer_has_no_gradient():
    inputs, labels = tiny.batch()
    labels[1] = -100
    model = tiny.with_lora(tiny.tiny_llama())
    with scoring_mode(model):
        taken = take_gradients(model, plan_gradients(model, "last"), inputs, labels)
    assert taken.norms[1] == 0 and not taken.vectors[1].any() and taken.norms[0] > 0


KRONECKER_SHAPES = [(1, 2, 3, 5, 7), (3, 4, 1, 2, 6), (2, 1, 5, 3, 1), (2, 16, 2, 2, 16), (2, 2, 16, 16, 2)]


@pytest.mark.parametrize(("k", "m_a", "n_a", "m_b", "n_b"), KRONECKER_SHAPES)
def test_kronecker_gradients_equal_autograd_of_the_dense_matrix(k, m_a, n_a, m_b, n_b):
    torch.manual_seed(0)
    x = torch.randn(3, 4, n_a, n_b, dtype=torch.float64)
    g = torch.randn(3, 4, m_a, m_b, dtype=torch.float64)
    a, b = torch.randn(k, m_a, n_a, dtype=torch.float64), torch.randn(k, m_b, n_b, dtype=torch.float64)
    of_a, of_b = kron_gradient(x, g, b), kron_gradient(x.mT, g.mT, a)
    for s in range(3):
        leaves = [tensor.clone().requires_grad_() for tensor in (a, b)]
        dense = sum(torch.kron(leaves[0][i], leaves[1][i]) for i in range(k))
        expected = torch.autograd.grad(((x[s].flatten(1) @ dense.T) * g[s].flatten(1)).sum(), leaves)
        torch.testing.assert_close(of_a[s], expected[0])
        torch.testing.assert_close(of_b[s], expected[1])


@pytest.mark.parametrize(("k", "m_a", "n_a", "m_b", "n_b"), KRONECKER_SHAPES)
def test_kronecker_gradients_take_the_cheaper_order_and_no_other_product(k, m_a, n_a, m_b, n_b):
    x, g, b = torch.ones(3, 4, n_a, n_b), torch.ones(3, 4, m_a, m_b), torch.ones(k, m_b, n_b)
    with FlopCounterMode(display=False) as counter:
        kron_gradient(x, g, b)
    b_after_g = m_a * m_b * n_b + m_a * n_b * n_a  # (G B) X^T
    b_after_x = m_b * n_b * n_a + m_a * m_b * n_a  # G (B X^T)
    assert counter.get_total_flops() == 2 * 3 * 4 * k * min(b_after_g, b_after_x)


def test_the_sketch_is_the_seeded_linear_map_that_it_says():
    sketch = CountSketch(50, 8, seed=3, device=torch.device("cpu"))
    grads = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(50, 8)
    for j in range(50):
        dense[j, sketch.buckets[j]] = sketch.signs[j]
    found = torch.zeros(2, 8)
    sketch.add(found, grads[:, :30], 0)
    sketch.add(found, grads[:, 30:], 30)
    torch.testing.assert_close(found, grads @ dense)
    longer = CountSketch(70, 8, seed=3, device=torch.device("cpu"))
    assert torch.equal(longer.buckets[:50], sketch.buckets)
    other = CountSketch(50, 8, seed=4, device=torch.device("cpu"))
    assert not torch.equal(other.buckets, sketch.buckets)


def test_the_sketch_keeps_cosines():
    rows = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(0))
    rows += torch.randn(20_000, generator=torch.Generator().manual_seed(1))  # so that cosines are about one half
    sketch = CountSketch(20_000, 1024, seed=0, device=torch.device("cpu"))
    found = torch.zeros(40, 1024)
    sketch.add(found, rows, 0)
    unit, small = torch.nn.functional.normalize(rows), torch.nn.functional.normalize(found)
    assert (unit @ unit.T - small @ small.T).abs().max() < 0.12  # about four standard deviations of 1/sqrt(1024)
    assert abs(float((unit @ unit.T - small @ small.T).mean())) < 0.02


def test_sketched_gradients_are_the_sketch_of_whole_ones():
    model = tiny.with_moka(tiny.tiny_llama())
    whole, _ = both(model, "all")
    sketch = CountSketch(whole.vectors.shape[1], 64, seed=0, device=torch.device("cpu"))
    taken, _ = both(model, "all", sketch=sketch)
    expected = torch.zeros(4, 64)
    sketch.add(expected, whole.vectors, 0)
    torch.testing.assert_close(taken.vectors, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(taken.norms, whole.norms)


def naive_projection(shapes, projection, gradients):
    """Of whole gradients (B, d), matrix by matrix, by the projection's own matrices."""
    found, start = [], 0
    for (k, m, n), left, right in zip(shapes, projection.left, projection.right, strict=True):
        for i in range(k):
            whole = gradients[:, start : start + m * n].view(-1, m, n)
            start += m * n
            p = torch.eye(m) if left is None else left[i]
            q = torch.eye(n) if right is None else right[i]
            found += [torch.stack([p @ one @ q.T for one in whole]).flatten(1)]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("adapter", ["lora", "moka", "moka_one_shape", "moka_identity_a"])
def test_factorised_vectors_are_the_projection_of_exact_gradients(adapter, side=3):
    model = ADAPTERS[adapter](tiny.tiny_llama())
    plan = plan_gradients(model, "all")
    projection = projector(Factorised(side), plan.shapes, 7, torch.device("cpu"))
    taken, expected = both(model, "all", sketch=projection)
    assert taken.vectors.shape == (4, projection.size) and projection.size < plan.size
    assert relative_errors(taken.vectors, naive_projection(plan.shapes, projection, expected)) < 1e-5
    torch.testing.assert_close(taken.norms, expected.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [2, 40])  # fewer numbers than the gradient has, and more
def test_a_gradient_is_projected_alike_whether_it_is_formed_or_not(tokens):
    torch.manual_seed(0)
    x, g = torch.randn(2, tokens, 31), torch.randn(2, tokens, 20)
    projection = FactorProjection([(1, 20, 31)], 8, 1, torch.device("cpu"))
    found, formed = torch.zeros(2, projection.size), torch.zeros(2, projection.size)
    squares = projection.put_products(found, 0, x, g)
    whole = torch.einsum("btm,btn->bmn", g, x)
    projection.put(formed, 0, whole[:, None])
    torch.testing.assert_close(found, naive_projection([(1, 20, 31)], projection, whole.flatten(1)))
    torch.testing.assert_close(found, formed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares, whole.square().sum((1, 2)))
    torch.testing.assert_close(squared_norms(x, g), whole.square().sum((1, 2)))


@pytest.mark.parametrize(("m", "n"), [(20, 31), (5, 31), (20, 5), (5, 5)])  # shorter than the side, and longer
def test_the_gradients_of_several_matrices_are_each_projected(m, n):
    grads = torch.randn(2, 3, m, n, generator=torch.Generator().manual_seed(0))
    projection = FactorProjection([(2, 4, 4), (3, m, n)], 8, 1, torch.device("cpu"))
    found = torch.zeros(2, projection.size)
    projection.put(found, 1, grads)
    others = torch.zeros(2, 2 * 4 * 4)
    expected = naive_projection([(2, 4, 4), (3, m, n)], projection, torch.cat([others, grads.flatten(1)], dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "moka"])
def test_inner_products_of_factorised_vectors_are_those_of_exact_gradients_on_average(adapter):
    """Over 200 seeds, within four standard errors, for all pairs of samples, norms included."""
    model = ADAPTERS[adapter](tiny.tiny_llama())
    plan = plan_gradients(model, "last")
    own = [i for i, name in enumerate(plan.names) if ".down_proj." in name]
    inputs, labels = tiny.batch()
    exact = torch.nn.functional.normalize(naive_gradients(model, [plan.names[i] for i in own], inputs, labels))
    found = []
    for seed in range(200):
        projection = projector(Factorised(3), [plan.shapes[i] for i in own], seed, torch.device("cpu"))
        vectors, start = torch.zeros(4, projection.size), 0
        for place, (k, m, n) in enumerate(plan.shapes[i] for i in own):
            projection.put(vectors, place, exact[:, start : start + k * m * n].view(4, k, m, n))
            start += k * m * n
        found.append(vectors @ vectors.T)
    products = torch.stack(found)
    errors = products.mean(0) - exact @ exact.T
    deviation = products.std(0) / len(found) ** 0.5
    assert (0 < deviation).all() and deviation.max() < 0.08, "or the test could not tell"
    assert (errors.abs() < 4 * deviation).all()


def test_factorised_projections_differ_by_seed_side_and_matrix_and_by_nothing_else():
    cpu, shapes = torch.device("cpu"), [(2, 40, 50), (1, 40, 8)]
    one, same = (FactorProjection(shapes, 16, 3, cpu) for _ in range(2))
    assert one.size == 2 * 16 * 16 + 16 * 8 and one.right[1] is None
    assert torch.equal(one.left[0], same.left[0]) and not torch.equal(one.left[0][0], one.left[0][1])
    assert torch.equal(one.left[0], FactorProjection(shapes[:1], 16, 3, cpu).left[0])
    assert not torch.equal(one.left[0][:1], one.left[1])
    assert not torch.equal(one.left[0], FactorProjection(shapes, 16, 4, cpu).left[0])
    with pytest.raises(DataSelectionError, match="side"):
        projection_key(Factorised(0))
    with pytest.raises(DataSelectionError, match="projection"):
        projection_key(0)
