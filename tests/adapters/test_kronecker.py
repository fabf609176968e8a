"""The Kronecker mathematics against the obvious way: building the matrix with torch.kron."""

from itertools import product

import pytest
import torch
import torch.utils.checkpoint
from torch.utils.flop_counter import FlopCounterMode

from krontune.adapters import kronecker
from krontune.adapters.kronecker import balanced_shapes, kron_mix

# (n_out, n_in) and the shapes of A: odd sizes, one shape, equal shapes, mixed shapes, rank one and dense.
MIXTURES = [
    ((21, 10), [(3, 5)]),
    ((21, 10), [(7, 2), (7, 2), (7, 2)]),
    ((12, 30), [(3, 5), (2, 15), (3, 5), (12, 1)]),
    ((30, 12), [(5, 3), (1, 12), (15, 2), (30, 1), (5, 3)]),
    ((7, 13), [(1, 13), (7, 1)]),
    ((9, 9), [(9, 9), (1, 1), (3, 3)]),
]
FEW, MANY = 1, 400


def naive_kron_mix(x, factors_a, factors_b, gate):
    weight = sum(g * torch.kron(a, b) for g, a, b in zip(gate, factors_a, factors_b, strict=True))
    return x @ weight.T


def make(size, shapes, rows, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    n_out, n_in = size
    x = draw(*(rows if isinstance(rows, tuple) else (rows,)), n_in)
    a = [draw(*shape) for shape in shapes]
    b = [draw(n_out // a_out, n_in // a_in) for a_out, a_in in shapes]
    return x, a, b, draw(len(shapes))


def gradients(function, x, a, b, gate):
    y = function(x, a, b, gate)
    weights = (torch.arange(y.numel()) % 7 - 2.0).view(y.shape).to(y.dtype)  # exact in every dtype
    return y, torch.autograd.grad((y * weights).sum(), [x, *a, *b, gate])


@pytest.mark.parametrize("rows", [FEW, 3, MANY])
@pytest.mark.parametrize(("size", "shapes"), MIXTURES)
def test_values_and_gradients_are_those_of_the_sum_of_kron(size, shapes, rows):
    arguments = make(size, shapes, rows)
    y, grads = gradients(kron_mix, *arguments)
    expected, expected_grads = gradients(naive_kron_mix, *arguments)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [3, MANY])
def test_lower_precision_stays_near_the_float64_result(dtype, tolerance, rows):
    arguments = make((12, 30), [(3, 5), (2, 15), (3, 5), (12, 1)], rows, dtype)
    exact = [part.detach().double() for part in (arguments[0], arguments[3])]
    exact_a, exact_b = ([f.detach().double() for f in factors] for factors in arguments[1:3])
    y, grads = gradients(kron_mix, *arguments)
    leaves = [exact[0], *exact_a, *exact_b, exact[1]]
    for leaf in leaves:
        leaf.requires_grad_()
    expected, expected_grads = gradients(naive_kron_mix, exact[0], exact_a, exact_b, exact[1])
    assert y.dtype == dtype
    for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,), (40, 10)])
def test_any_leading_dimensions(lead):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], lead)
    y = kron_mix(x, a, b, gate)
    assert y.shape == (*lead, 12)
    torch.testing.assert_close(y, naive_kron_mix(x, a, b, gate))


def test_a_transposed_view_is_read_in_the_right_order():
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], 4)
    view = x.detach().T.contiguous().T
    torch.testing.assert_close(kron_mix(view, a, b, gate), naive_kron_mix(x, a, b, gate))


def test_no_gate_means_weight_one():
    x, a, b, _ = make((12, 30), [(3, 5), (2, 15)], 4)
    ones = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(kron_mix(x, a, b), naive_kron_mix(x, a, b, ones))


def test_a_gate_of_higher_precision_leaves_the_dtype_of_x():
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], 4, torch.bfloat16)
    assert kron_mix(x, a, b, gate.float()).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "built"), [(FEW, False), (MANY, True)])
def test_few_rows_go_through_the_factors_and_many_through_the_built_matrix(rows, built, monkeypatch):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], rows)
    taken = []
    for name in ("add_group", "kron_weight"):
        original = getattr(kronecker, name)
        monkeypatch.setattr(kronecker, name, lambda *args, n=name, f=original: taken.append(n) or f(*args))
    kron_mix(x, a, b, gate)
    assert set(taken) == {"kron_weight" if built else "add_group"}


def test_products_of_equal_shape_share_one_call(monkeypatch):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15), (3, 5), (3, 5), (2, 15)], FEW)
    sizes = []
    original = kronecker.arrange
    monkeypatch.setattr(kronecker, "arrange", lambda a, b, g: sizes.append(a.shape[0]) or original(a, b, g))
    kron_mix(x, a, b, gate)
    assert sorted(sizes) == [2, 3]


def naive_multiplications(m_a, n_a, m_b, n_b):
    """(A first, B first), X being (n_a, n_b): each entry takes one multiplication a summand."""
    a_then_b = m_a * n_b * n_a + m_a * m_b * n_b
    b_then_a = n_a * m_b * n_b + m_a * m_b * n_a
    return a_then_b, b_then_a


def test_a_first_is_the_order_of_fewer_multiplications():
    for m_a, n_a, m_b, n_b in product([1, 2, 3, 5, 16], repeat=4):
        a_then_b, b_then_a = naive_multiplications(m_a, n_a, m_b, n_b)
        assert kronecker.a_first(m_a, n_a, m_b, n_b) == (a_then_b < b_then_a)


@pytest.mark.parametrize(
    "shape", [(16, 256, 256, 16), (256, 16, 16, 256), (1, 64, 64, 1), (64, 1, 1, 64), (8, 4, 2, 16)]
)
def test_the_cheaper_order_is_the_one_computed(shape):
    m_a, n_a, m_b, n_b = shape
    k, rows = 3, 2
    a, b, gate = torch.randn(k, m_a, n_a), torch.randn(k, m_b, n_b), torch.randn(k)
    with FlopCounterMode(display=False) as counted:
        kronecker.kron_group(torch.randn(rows, n_a * n_b), a, b, gate)
    assert counted.get_total_flops() == 2 * rows * k * min(naive_multiplications(*shape))


def test_kron_weight_is_the_gated_sum_of_kron():
    x, a, b, gate = make((21, 10), [(7, 2), (7, 2), (7, 2)], 1)
    expected = sum(g * torch.kron(m, n) for g, m, n in zip(gate, a, b, strict=True))
    torch.testing.assert_close(kronecker.kron_weight(torch.stack(a), torch.stack(b), gate), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, a, b, g: (x, [], [], None), "at least one"),
        (lambda x, a, b, g: (x, a, b[:1], g), "got 2 and 1"),
        (lambda x, a, b, g: (x, a, b, g[:1]), r"gate must have shape \(2,\)"),
        (lambda x, a, b, g: (x[:, :-1], a, b, g), "product 0"),
        (lambda x, a, b, g: (x, a, [b[0], b[1][:-1]], g), "product 1"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        kron_mix(*change(*make((12, 30), [(3, 5), (2, 15)], 4)))


def naive_cheapest(n_out, n_in):
    sizes = product(range(1, n_out + 1), range(1, n_in + 1))
    return min(parameters(n_out, n_in, (o, i)) for o, i in sizes if n_out % o == 0 and n_in % i == 0)


def parameters(n_out, n_in, shape):
    a_out, a_in = shape
    return a_out * a_in + (n_out // a_out) * (n_in // a_in)


@pytest.mark.parametrize(("n_out", "n_in"), [(576, 576), (192, 576), (64, 128), (7, 13), (1, 1), (96, 100), (11, 64)])
@pytest.mark.parametrize("n_shapes", [1, 3, 5])
def test_balanced_shapes_divide_are_distinct_and_cheap(n_out, n_in, n_shapes):
    shapes = balanced_shapes(n_out, n_in, n_shapes)
    costs = [parameters(n_out, n_in, shape) for shape in shapes]
    assert 1 <= len(shapes) <= n_shapes
    assert len(set(shapes)) == len(shapes)
    assert all(n_out % a_out == 0 and n_in % a_in == 0 for a_out, a_in in shapes)
    assert costs[0] == naive_cheapest(n_out, n_in)
    assert costs == sorted(costs)
    assert costs[-1] <= 2 * costs[0]


def test_fewer_balanced_shapes_are_a_prefix_of_more():
    assert balanced_shapes(192, 576, 5)[:2] == balanced_shapes(192, 576, 2)


def test_the_five_shapes_of_a_4096_square_layer():
    assert balanced_shapes(4096, 4096, 5) == [(64, 64), (32, 128), (128, 32), (16, 256), (256, 16)]


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, -1, 1), (4, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="positive"):
        balanced_shapes(*sizes)


FACTORED = [((256, 256), [(16, 16), (16, 16), (8, 32), (32, 8)]), ((66, 130), [(6, 10), (33, 65), (6, 10), (2, 5)])]


@pytest.mark.parametrize(("size", "shapes"), FACTORED)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_products_summed_in_slices_have_the_values_and_gradients_of_kron(size, shapes, rows, monkeypatch):
    monkeypatch.setattr(kronecker, "_SLICE_BYTES", 2 * 8 * size[1])  # two rows a slice
    monkeypatch.setattr(kronecker, "weight_is_cheaper", lambda *_: False)
    for x, a, b, gate in [make(size, shapes, rows), make(size, shapes, 5 * rows)]:
        y, grads = gradients(kron_mix, x, a, b, gate)
        expected, expected_grads = gradients(naive_kron_mix, x, a, b, gate)
        for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_slices_of_lower_precision_stay_near_the_float64_result(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(kronecker, "_SLICE_BYTES", 2**13)
    monkeypatch.setattr(kronecker, "weight_is_cheaper", lambda *_: False)
    leaves = make((66, 130), [(6, 10), (33, 65), (6, 10), (2, 5)], 70, dtype)
    exact = [
        [f.detach().double().requires_grad_() for f in part] if isinstance(part, list) else part.detach().double()
        for part in leaves
    ]
    exact[0].requires_grad_(), exact[3].requires_grad_()
    y, grads = gradients(kron_mix, *leaves)
    expected, expected_grads = gradients(naive_kron_mix, *exact)
    for got, want in zip((y, *grads), (expected, *expected_grads), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_the_backward_pass_keeps_x_and_the_factors_alone():
    x, a, b, gate = make((256, 256), [(16, 16), (16, 16), (8, 32), (32, 8)], 64, torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kron_mix(x, a, b, gate)
    factors = sum(f.numel() for f in a + b)
    assert sum(kept.values()) <= 4 * (x.numel() + 4 * factors)


def test_a_second_derivative_is_refused():
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], FEW)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kron_mix(x, a, b, gate).sum(), x, create_graph=True)


def test_only_what_needs_a_gradient_gets_one():
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], FEW)
    kron_mix(x.detach(), a, b, gate.detach()).sum().backward()
    assert x.grad is None and gate.grad is None and a[0].grad is not None


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_leaves(rows):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], rows, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = gradients(kron_mix, x, a, b, gate)
    _, expected = gradients(naive_kron_mix, x, a, b, gate)
    assert y.dtype == torch.bfloat16
    for got, want in zip(grads, expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 4e-2 * want.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], 2)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(kron_mix, *arguments, use_reentrant=reentrant)

    _, expected = gradients(kron_mix, x, a, b, gate)
    checkpointed(x, a, b, gate).backward((torch.arange(24) % 7 - 2.0).view(2, 12).double())
    torch.testing.assert_close(x.grad, expected[0])
    if not reentrant:  # reentrant checkpoints do not look for leaves inside lists
        torch.testing.assert_close([p.grad for p in (*a, *b, gate)], list(expected[1:]))


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_compile_takes_it_whole_and_gives_the_same_gradients(rows):
    arguments = make((12, 30), [(3, 5), (2, 15), (3, 5)], rows)
    compiled = torch.compile(kron_mix, backend="aot_eager", fullgraph=True)
    y, grads = gradients(compiled, *arguments)
    expected, expected_grads = gradients(kron_mix, *arguments)
    torch.testing.assert_close((y, *grads), (expected, *expected_grads))
