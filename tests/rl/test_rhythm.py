import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from krontune.rl.errors import RlError
from krontune.rl.rhythm import attention_rhythm


def naive_rhythm(q, k, response_mask, attention_mask, window, horizon, sliding_window=None, segment_ids=None):
    """From the dense softmax, by the definitions, in float64."""
    length = q.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & attention_mask.bool()[:, None, :]
    if sliding_window is not None:
        seen &= distance < sliding_window
    together = torch.ones_like(seen) if segment_ids is None else segment_ids[:, :, None] == segment_ids[:, None, :]
    seen &= together
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    share = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)  # (B, H, T, T)
    response = response_mask.bool() & attention_mask.bool()
    share = share * response[:, None, :, None]
    span = (share * distance).sum((-1, -2)) / response.sum(1).clamp(min=1)[:, None]
    waad = (share * distance.clamp(max=window)).sum(-1)
    ahead = (distance >= horizon[0]) & (distance <= horizon[1]) & response[:, :, None] & together
    ahead &= attention_mask.bool()[:, None, :]
    rows = ahead.sum(1)
    fai = (share * ahead[:, None]).sum(-2) / rows.clamp(min=1)[:, None]
    return waad, fai, span, rows


def batch(length, dtype=torch.float64, holes=False, segments=False, width=6, spread=2.0):
    """Left padding, right padding with tool turns, no response, and a short one after a long prompt."""
    torch.manual_seed(length)
    q = (torch.randn(4, 6, length, width, dtype=torch.float64) * spread).to(dtype)
    k = torch.randn(4, 2, length, width, dtype=torch.float64).to(dtype)
    attended = torch.ones(4, length, dtype=torch.int64)
    attended[0, : length // 5] = 0
    attended[1, -(length // 6) :] = 0
    if holes:
        attended[torch.rand(4, length) < 0.1] = 0
    response = torch.ones_like(attended)
    response[0, : length // 2] = 0
    response[1] = torch.rand(length) < 0.6
    response[2] = 0
    response[3, :-3] = 0
    ids = torch.randint(0, 3, (4, length)) if segments else None
    return q, k, response, attended, ids


def assert_equal(result, expected, **tolerance):
    for name, value in zip(("waad", "fai", "span", "rows"), expected, strict=True):
        got = getattr(result, name)
        torch.testing.assert_close(got.double(), value.double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


CASES = list(itertools.product((7, 131, 300), (None, 4, 70), (False, True), (False, True), ("auto", "tiled")))


@pytest.mark.parametrize(("length", "sliding_window", "holes", "segments", "backend"), CASES)
def test_the_rhythm_is_that_of_the_dense_softmax(length, sliding_window, holes, segments, backend):
    q, k, response, attended, ids = batch(length, holes=holes, segments=segments)
    options = {"window": 5, "horizon": (3, 40), "sliding_window": sliding_window, "segment_ids": ids}
    expected = naive_rhythm(q, k, response, attended, **options)
    assert_equal(attention_rhythm(q, k, response, attended, backend=backend, **options), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("horizon", [(0, 0), (0, 500), (10, 100), (130, 131), (400, 500)])
@pytest.mark.parametrize("window", [1, 500])
def test_windows_and_horizons_of_any_length_are_exact(window, horizon):
    q, k, response, attended, _ = batch(290)
    expected = naive_rhythm(q, k, response, attended, window, horizon)
    result = attention_rhythm(q, k, response, attended, window=window, horizon=horizon)
    assert_equal(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_read_in_float32(dtype, backend):
    q, k, response, attended, _ = batch(300, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention_rhythm(q, k, response, attended, backend=backend)
    assert result.waad.dtype == torch.float32
    assert_equal(result, naive_rhythm(q, k, response, attended, 10, (10, 100)), rtol=2e-5, atol=1e-4)


def test_scores_that_overflow_what_a_row_does_not_see_do_no_harm():
    q, k, response, attended, _ = batch(200, torch.float32, spread=200.0)
    result = attention_rhythm(q, k, response, attended)
    expected = naive_rhythm(q.double(), k.double(), response, attended, 10, (10, 100))
    assert torch.isfinite(result.waad).all() and torch.isfinite(result.fai).all()
    assert_equal(result, expected, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("given", [False, True])
def test_chosen_heads_read_as_they_do_among_all(given):
    q, k, response, attended, _ = batch(150)
    whole = attention_rhythm(q, k, response, attended)
    scores = q @ k.repeat_interleave(3, 1).mT * q.shape[-1] ** -0.5
    seen = torch.ones(150, 150, dtype=torch.bool).tril() & attended.bool()[:, None, :]
    lse = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1) if given else None
    for local, remote in (([4, 1], [5]), ([], [0, 3]), ([2], [])):
        some = attention_rhythm(q, k, response, attended, heads=(local, remote), lse=lse)
        torch.testing.assert_close(some.waad, whole.waad[:, local], rtol=0, atol=1e-12)
        torch.testing.assert_close(some.fai, whole.fai[:, remote], rtol=0, atol=1e-12)
        assert some.span is None


def test_only_the_chosen_heads_are_computed_and_a_given_log_sum_exp_is_not_found_again():
    def flops(heads, lse):
        with FlopCounterMode(display=False) as counted:
            attention_rhythm(q, k, response, attended, heads=heads, lse=lse, backend="tiled")
        return counted.get_total_flops()

    q, k, response, attended, _ = batch(300)
    every, lse = (range(6), range(6)), torch.zeros(q.shape[:3])
    assert flops(every, lse) == 6 * flops(([4], [5]), lse) > 0
    assert flops(every, None) == 6 * flops(([4], [5]), None) > 1.5 * flops(every, lse)


def test_gradients_do_not_flow_into_the_rhythm():
    q, k, response, attended, _ = batch(40)
    assert not attention_rhythm(q.requires_grad_(), k, response, attended).waad.requires_grad


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_no_tensor_grows_faster_than_the_sequence(backend):
    largest = []
    for length in (1024, 2048, 4096):
        q, k, mask = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8), torch.ones(1, length)
        with Largest() as seen:
            attention_rhythm(q, k, mask, backend=backend)
        largest.append(seen.numel)
    assert largest[2] <= 2.01 * largest[1] <= 4.1 * largest[0]
    assert largest[2] < 4096**2 / 10


def test_banded_refuses_what_it_would_have_to_tile():
    q, k, response, attended, _ = batch(30)
    with pytest.raises(RlError, match="sliding"):
        attention_rhythm(q, k, response, attended, sliding_window=8, backend="banded")
    whole = attention_rhythm(q, k, response, attended)
    torch.testing.assert_close(attention_rhythm(q, k, response, attended, backend="banded").fai, whole.fai)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"horizon": (5, 4)},
        {"horizon": (-1, 4)},
        {"sliding_window": 0},
        {"heads": ([0], [6])},
        {"backend": "dense"},
        {"k": torch.zeros(4, 4, 30, 6)},
        {"k": torch.zeros(4, 2, 31, 6)},
        {"response_mask": torch.zeros(4, 29)},
        {"lse": torch.zeros(4, 2, 30)},
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong):
    q, k, response, attended, _ = batch(30)
    arguments = {"q": q, "k": k, "response_mask": response, "attention_mask": attended} | wrong
    with pytest.raises(RlError, match=r"share|cache" if "k" in wrong else next(iter(wrong))):
        attention_rhythm(**arguments)
