"""The Triton kernels, in Triton's interpreter, against the eager computation and the sum of torch.kron."""

import importlib.util
import os
import sys

import pytest
import torch
from peft import get_peft_model

from krontune.adapters import MokaConfig, kronecker, use_fused
from krontune.adapters.kronecker import kron_mix

pytest.importorskip("triton")

# (n_out, n_in) and the shapes of A: odd sizes, primes, equal and mixed shapes, rank one, dense, powers of two.
MIXTURES = [
    ((21, 10), [(7, 2), (7, 2), (7, 2)]),
    ((12, 30), [(3, 5), (2, 15), (3, 5), (12, 1)]),
    ((30, 12), [(5, 3), (1, 12), (15, 2), (30, 1), (5, 3)]),
    ((7, 13), [(1, 13), (7, 1)]),
    ((37, 1), [(37, 1), (1, 1)]),
    ((9, 9), [(9, 9), (3, 3)]),
    ((256, 256), [(16, 16), (16, 16), (8, 32), (32, 8)]),
    ((66, 130), [(6, 10), (33, 65), (6, 10), (2, 5)]),
]
# Rounding of T and y to the dtype of x, in units of the size of what is computed.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def kernels():
    """The module of the kernels, defined for the interpreter whatever was imported before."""
    name = "krontune.adapters.fused"
    old, set_before = sys.modules.pop(name, None), os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    yield importlib.import_module(name)
    del sys.modules[name]
    os.environ.pop("TRITON_INTERPRET") if set_before is None else os.environ.update(TRITON_INTERPRET=set_before)
    if old is not None:
        sys.modules[name] = old


@pytest.fixture
def fused(kernels):
    use_fused(True)
    yield kernels
    use_fused(False)


def make(size, shapes, rows, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    n_out, n_in = size
    a = [draw(*shape) for shape in shapes]
    b = [draw(n_out // a_out, n_in // a_in) for a_out, a_in in shapes]
    return draw(rows, n_in), a, b, draw(len(shapes))


def naive_kron_mix(x, a, b, gate):
    return x @ sum(g * torch.kron(one, other) for g, one, other in zip(gate, a, b, strict=True)).T


def outcome(function, x, a, b, gate):
    """The value, and the gradients of every argument."""
    y = function(x, a, b, gate)
    weights = (torch.arange(y.numel()) % 7 - 2.0).view(y.shape).to(y.dtype)  # exact in every dtype
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *a, *b, gate])]


def in_float64(x, a, b, gate):
    def wide(tensor):
        return tensor.detach().double().requires_grad_()

    return wide(x), [wide(f) for f in a], [wide(f) for f in b], wide(gate)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("size", "shapes"), MIXTURES)
def test_values_and_gradients_are_those_of_the_sum_of_kron_and_of_the_eager_twin(fused, size, shapes, dtype, rows):
    arguments = make(size, shapes, rows, dtype)
    found = outcome(kron_mix, *arguments)
    use_fused(False)
    eager = outcome(kron_mix, *arguments)
    exact = outcome(naive_kron_mix, *in_float64(*arguments))
    for one, twin, wanted in zip(found, eager, exact, strict=True):
        assert one.dtype == twin.dtype == dtype
        assert (one.double() - wanted).norm() <= TOLERANCES[dtype] * wanted.norm()
        assert (one.double() - twin.double()).norm() <= 2 * TOLERANCES[dtype] * wanted.norm()


@pytest.mark.parametrize("rows", [0, 17, 70])
def test_any_number_of_rows_also_where_programs_share_a_gradient(fused, monkeypatch, rows):
    monkeypatch.setattr(fused, "_PARTS", 3)
    arguments = make((12, 30), [(3, 5), (2, 15)], rows, torch.float32)
    exact = outcome(naive_kron_mix, *in_float64(*arguments))
    for one, wanted in zip(outcome(kron_mix, *arguments), exact, strict=True):
        assert (one.double() - wanted).norm() <= 2e-6 * wanted.norm()


def test_outputs_that_go_through_tile_by_tile(fused, monkeypatch):
    monkeypatch.setattr(fused, "_TILE", 2**9)
    arguments = make((66, 130), [(33, 5), (6, 65), (2, 5)], 3, torch.float32)
    exact = outcome(naive_kron_mix, *in_float64(*arguments))
    for one, wanted in zip(outcome(kron_mix, *arguments), exact, strict=True):
        assert (one.double() - wanted).norm() <= 2e-6 * wanted.norm()


def test_the_kernels_run_and_the_matrix_is_never_built(fused, monkeypatch):
    taken = []
    for module, name in ((fused, "add_sum"), (fused, "sum_gradients"), (kronecker, "add_group")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=original: taken.append(n) or f(*args))
    monkeypatch.setattr(kronecker, "weight_is_cheaper", lambda *_: pytest.fail("asked for the matrix"))
    outcome(kron_mix, *make((12, 30), [(3, 5), (2, 15)], 4, torch.float32))
    assert taken == ["add_sum", "sum_gradients", "add_sum"]  # the last one is the gradient of x


def test_no_gradient_is_computed_for_an_x_that_wants_none(fused):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], 4, torch.float32)
    kron_mix(x.detach(), a, b, gate).sum().backward()
    assert x.grad is None and gate.grad is not None and a[0].grad is not None


def test_a_second_derivative_is_refused(fused):
    x, a, b, gate = make((12, 30), [(3, 5), (2, 15)], 4, torch.float32)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kron_mix(x, a, b, gate).sum(), x, create_graph=True)


def test_a_whole_adapted_model_gives_the_loss_and_gradients_of_the_eager_one(fused, tiny, tokens, shake):
    tokens = tokens[:1]
    model = shake(get_peft_model(tiny, MokaConfig(target_modules=["q_proj"], r=4)), scale=0.1).train()
    results = []
    for on in (True, False):
        use_fused(on)
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 1
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_dtype_that_the_kernels_do_not_know_is_refused(fused):
    with pytest.raises(RuntimeError, match="not in torch.float64; call use_fused"):
        kron_mix(*make((12, 30), [(3, 5)], 4, torch.float64))


def test_a_row_too_large_for_the_chip_is_refused(fused):
    with pytest.raises(RuntimeError, match=r"one input row of A \(1, 2\) and B \(1, 131074\) takes 4194304 numbers"):
        kron_mix(torch.zeros(1, 262148), [torch.zeros(1, 2)], [torch.zeros(1, 131074)])


def test_a_cpu_without_the_interpreter_is_refused(fused, monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="x is on cpu; move the model, call use_fused"):
        kron_mix(*make((12, 30), [(3, 5)], 4, torch.float32))


def test_without_triton_the_switch_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kronecker, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="pip install 'triton"):
        use_fused(True)


@pytest.mark.parametrize("pointer", ["*fp32", "*bf16"])
def test_the_kernels_compile_for_a_gpu(kernels, pointer, monkeypatch):
    """The interpreter takes Python that the compiler refuses. Compiling needs no GPU."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET")
    specification = importlib.util.spec_from_file_location("krontune.adapters.fused_compiled", kernels.__file__)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def ptx(kernel, signature, constants):
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        return compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    orders = [kronecker.Order(True, 2, 7, 2, 3, 5), kronecker.Order(False, 1, 3, 7, 7, 9)]
    shapes = tuple((*order, 0, 99, *module._blocks(order), module._first_tile(order, 2)) for order in orders)
    signature = {"x_at": pointer, "y_at": pointer, "factors_at": pointer, "rows": "i32"}
    assert ptx(module._add_sum, signature, {"SHAPES": shapes, "R": 2, "WIDEN": False})
    signature = {f"{name}_at": pointer for name in ("x", "grad", "left", "right")}
    signature |= {"left_sums_at": "*fp32", "right_sums_at": "*fp32", "rows": "i32", "parts": "i32"}
    names = ("K", "m_a", "n_a", "m_b", "n_b", "MA", "NA", "MB", "NB", "R", "WIDEN")
    values = (*orders[0][1:], *module._blocks(orders[0]), 2, False)
    assert ptx(module._add_factor_gradients, signature, dict(zip(names, values, strict=True)))
