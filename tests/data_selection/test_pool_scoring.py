import importlib.util
import os
import signal
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from krontune.data_selection import DataSelectionError, Store, pool_scoring, score_samples
from krontune.data_selection.encoding import encode
from krontune.data_selection.gradients import plan_gradients
from krontune.data_selection.projections import CountSketch, Factorised, projected_size

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

WORDS = tiny.tokenizer()
MODEL = tiny.with_lora(tiny.tiny_llama(), lora_dropout=0.1)
ROWS = [{"prompt": f"{i}+{i * i}=" + "?" * (i % 7), "completion": f"{i + i * i}"} for i in range(30)]
SCORES = ("nll", "ppl", "el2n", "entropy", "grand")


def naive(model, rows, names):
    """Scores and gradients of one row at a time: {name: (N,)} and (N, d)."""
    parameters = dict(model.named_parameters())
    found, vectors = {name: [] for name in SCORES}, []
    model.eval()
    for row in rows:
        encoded = encode(WORDS, row, "row")
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        chosen = [parameters[name].requires_grad_(True) for name in names]
        logits = model(input_ids=encoded.input_ids[None]).logits[0, :-1]
        kept = encoded.labels[1:] != -100
        logits, targets = logits[kept], encoded.labels[1:][kept]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])
        p = torch.softmax(logits.detach(), -1)
        one_hot = torch.nn.functional.one_hot(targets, p.shape[1])
        values = (loss, loss.exp(), (p - one_hot).norm(dim=1).mean(), -(p * p.log()).sum(1).mean(), grad.norm())
        for name, value in zip(SCORES, values, strict=True):
            found[name].append(value.item())
        vectors.append(grad)
    return {name: np.array(values) for name, values in found.items()}, torch.stack(vectors)


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def in_child(work):
    """Run `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # the child must never come back into the test runner
            os._exit(1)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_store_holds_what_one_row_at_a_time_gives(tmp_path):
    store = score_samples(MODEL, WORDS, ROWS, SCORES, projection=None, out_dir=tmp_path / "whole")
    plan = plan_gradients(MODEL, "last")
    scores, vectors = naive(MODEL, ROWS, plan.names)
    for name in SCORES:
        assert store.scores[name].dtype == np.float64
        np.testing.assert_allclose(store.scores[name], scores[name], rtol=2e-5)
    assert store.vectors.shape == (30, plan.size) and store.vectors.dtype == np.float32
    errors = np.linalg.norm(store.vectors - vectors.numpy(), axis=1) / vectors.norm(dim=1).numpy()
    assert errors.max() < 1e-5
    np.testing.assert_allclose(store.norms, scores["grand"], rtol=1e-5)

    small = score_samples(MODEL, WORDS, Dataset.from_list(ROWS), projection=64, seed=4, out_dir=tmp_path / "small")
    assert set(small.scores) == {"nll", "el2n", "entropy"} and small.vectors.dtype == np.float16
    expected = torch.zeros(30, 64)
    CountSketch(plan.size, 64, 4, torch.device("cpu")).add(expected, vectors, 0)
    np.testing.assert_allclose(small.vectors, torch.nn.functional.normalize(expected), atol=1e-3)
    assert np.array_equal(Store(tmp_path / "small").vectors, small.vectors)

    shapes = plan.shapes
    factorised = score_samples(MODEL, WORDS, ROWS, projection=Factorised(4), seed=4, out_dir=tmp_path / "factorised")
    assert factorised.vectors.shape == (30, projected_size(Factorised(4), shapes))
    assert factorised.vectors.dtype == np.float16
    np.testing.assert_allclose(factorised.norms, scores["grand"], rtol=1e-5)
    with pytest.raises(DataSelectionError, match="projection: .*'factorised'.* there"):
        score_samples(MODEL, WORDS, ROWS, projection=Factorised(8), seed=4, out_dir=tmp_path / "factorised")


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny.with_lora(tiny.tiny_llama(), lora_dropout=0.1).train()
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    score_samples(model, WORDS, ROWS[:4], ("nll", "epistemic"), members=2, out_dir=tmp_path / "s")
    assert modes == [module.training for module in model.modules()]
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_scoring, "BLOCK", 16)
    options = {"scores": (*SCORES, "epistemic"), "members": 2, "batch_size": 4, "projection": 32}
    score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "once", **options)

    write = Store.write

    def killed_after_three(store, rows, scores, vectors):
        if store.done.sum() >= 12:
            with (store.folder / "vectors.f16").open("r+b") as file:  # a row that was half written
                file.seek(rows[0] * 64)
                file.write(b"\xff" * 40)
            os.kill(os.getpid(), signal.SIGKILL)
        write(store, rows, scores, vectors)

    def work():
        Store.write = killed_after_three
        score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "twice", **options)

    assert status_of(in_child(work)) == -signal.SIGKILL
    broken = Store(tmp_path / "twice")
    assert broken.done.sum() == 12 and not broken.complete
    with pytest.raises(DataSelectionError, match="12 of 30 rows"):
        broken.scores["nll"]
    scored = []
    monkeypatch.setattr(Store, "write", lambda store, rows, *rest: (scored.extend(rows), write(store, rows, *rest)))
    score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "twice", **options)
    assert len(scored) == 18
    assert everything(tmp_path / "once") == everything(tmp_path / "twice")


def test_two_processes_fill_one_store_with_the_same_bytes(tmp_path):
    score_samples(MODEL, WORDS, ROWS, batch_size=4, out_dir=tmp_path / "one")

    def work(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        score_samples(MODEL, WORDS, ROWS, batch_size=4, out_dir=tmp_path / "two")

    children = [in_child(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [status_of(child) for child in children] == [0, 0]
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_parts_do_disjoint_rows(tmp_path):
    half = score_samples(MODEL, WORDS, ROWS, batch_size=4, out_dir=tmp_path / "s", part=(0, 2))
    first = half.done.copy()
    assert 0 < first.sum() < 30
    with pytest.raises(DataSelectionError, match="of 30 rows"):
        half.vectors  # noqa: B018
    whole = score_samples(MODEL, WORDS, ROWS, batch_size=4, out_dir=tmp_path / "s", part=(1, 2))
    assert whole.complete and np.isfinite(whole.scores["nll"]).all()


@pytest.mark.parametrize("name", ["scores.arrow", "vectors.f16", "done.map"])
def test_a_store_that_lost_a_file_or_half_of_one_is_refused_and_not_read_as_zeros(name, tmp_path):
    score_samples(MODEL, WORDS, ROWS[:4], out_dir=tmp_path / "s")
    file, whole = tmp_path / "s" / name, (tmp_path / "s" / name).read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(whole[: len(whole) // 2])):
        damage()
        with pytest.raises(DataSelectionError, match=rf"({name.replace('.', '[.]')}|scores.rows).*delete the folder"):
            score_samples(MODEL, WORDS, ROWS[:4], out_dir=tmp_path / "s").scores["nll"]  # noqa: B018
        with pytest.raises(DataSelectionError, match="delete the folder"):
            Store(tmp_path / "s").scores, Store(tmp_path / "s").vectors  # noqa: B018
        file.write_bytes(whole)
    assert score_samples(MODEL, WORDS, ROWS[:4], out_dir=tmp_path / "s").complete


def test_a_store_that_was_cut_before_its_first_file_is_begun(tmp_path):
    score_samples(MODEL, WORDS, ROWS[:4], out_dir=tmp_path / "whole")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "store.json").write_bytes((tmp_path / "whole" / "store.json").read_bytes())
    with pytest.raises(DataSelectionError, match="0 of 4 rows"):
        Store(tmp_path / "s").scores  # noqa: B018
    score_samples(MODEL, WORDS, ROWS[:4], out_dir=tmp_path / "s")
    assert everything(tmp_path / "s") == everything(tmp_path / "whole")


def test_another_key_is_refused_by_name(tmp_path):
    score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "s")
    moved = tiny.with_lora(tiny.tiny_llama(), lora_dropout=0.1)
    score_samples(moved, WORDS, ROWS, out_dir=tmp_path / "s")  # the same numbers are the same model
    with torch.no_grad():
        next(p for name, p in moved.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
    other_template = tiny.tokenizer()
    other_template.chat_template = "x"
    cases = [
        (moved, WORDS, ROWS, {}, "adapter: "),
        (tiny.with_lora(tiny.tiny_llama(initializer_range=0.2), lora_dropout=0.1), WORDS, ROWS, {}, "model: "),
        (MODEL, other_template, ROWS, {}, "template: "),
        (MODEL, WORDS, [*ROWS[:-1], "x"], {}, "data: "),
        (MODEL, WORDS, ROWS, {"gradients": [0]}, "layers: "),
        (MODEL, WORDS, ROWS, {"projection": 512}, "projection: .*width: "),
        (MODEL, WORDS, ROWS, {"scores": ["nll"]}, "columns: "),
        (MODEL, WORDS, ROWS, {"seed": 1}, "seed: "),
    ]
    for model, words, rows, options, message in cases:
        with pytest.raises(DataSelectionError, match=message):
            score_samples(model, words, rows, out_dir=tmp_path / "s", **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataSelectionError, match="holds other files"):
        score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "other")


def test_rows_without_answer_are_marked_and_do_not_disturb_others(tmp_path):
    rows = [*ROWS[:5], {"messages": [{"role": "user", "content": "hi"}]}, *ROWS[5:8]]
    store = score_samples(MODEL, WORDS, rows, SCORES, out_dir=tmp_path / "s")
    assert np.flatnonzero(np.isnan(store.scores["nll"])).tolist() == [5]
    assert np.isnan(store.scores["grand"][5]) and not store.vectors[5].any() and store.vectors[4].any()


def test_scores_without_adapter_or_gradients(tmp_path):
    store = score_samples(tiny.tiny_llama(), WORDS, ROWS[:5], gradients=None, out_dir=tmp_path / "s")
    assert np.isfinite(store.scores["entropy"]).all()
    with pytest.raises(DataSelectionError, match="holds no vectors"):
        store.vectors  # noqa: B018


def test_adapters_as_members_equal_their_own_forwards(tmp_path):
    model = tiny.with_lora(tiny.tiny_llama())
    torch.manual_seed(3)
    model.add_adapter("second", model.peft_config["default"])
    store = score_samples(
        model, WORDS, ROWS[:3], ["nll", "epistemic"], members=("default", "second"), out_dir=tmp_path / "s"
    )
    assert list(model.active_adapters) == ["default"]
    for i, row in enumerate(ROWS[:3]):
        encoded, p = encode(WORDS, row, "row"), []
        for name in ("default", "second"):
            model.set_adapter(name)
            with torch.no_grad():
                logits = model(input_ids=encoded.input_ids[None]).logits[0, :-1][encoded.labels[1:] != -100]
            p.append(torch.softmax(logits.double(), -1))
        mean = (p[0] + p[1]) / 2
        forward = sum((q * (q / mean).log()).sum(1).mean() for q in p) / 2
        reverse = sum((mean * (mean / q).log()).sum(1).mean() for q in p) / 2
        assert store.scores["epistemic"][i] == pytest.approx(forward.item(), rel=1e-4, abs=1e-7)
        assert store.scores["epistemic_reverse"][i] == pytest.approx(reverse.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["perplexity"]}, "must be some of nll, ppl"),
        ({"scores": ["grand"], "gradients": None}, "'grand' is the norm of a gradient"),
        ({"scores": ["log_ig"]}, "no image_token_id"),
        ({"scores": ["epistemic"]}, "names of at least two loaded adapters"),
        ({"scores": ["epistemic"], "members": ["default", "x"]}, "names of at least two loaded adapters"),
        ({"projection": 0}, "projection=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"part": (2, 2)}, "part="),
        ({"gradients": "first"}, "gradients='first'"),
    ],
)
def test_bad_arguments_are_named(options, message, tmp_path):
    with pytest.raises(DataSelectionError, match=message):
        score_samples(MODEL, WORDS, ROWS, out_dir=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_rows_may_hold_paths_dates_and_numbers_of_numpy(tmp_path):
    row = {"text": "ab", "file": Path("a"), "day": date(2026, 1, 2), "n": np.float32(2), "at": datetime(2026, 1, 2, 3)}
    first = score_samples(MODEL, WORDS, [row], gradients=None, out_dir=tmp_path / "s")
    for other in ({"file": Path("b")}, {"day": date(2026, 1, 3)}, {"n": np.float32(3)}, {"at": datetime(2026, 1, 3)}):
        with pytest.raises(DataSelectionError, match="data: "):
            score_samples(MODEL, WORDS, [row | other], gradients=None, out_dir=tmp_path / "s")
    assert first.complete


def test_a_pool_that_cannot_be_read_again_is_refused(tmp_path):
    with pytest.raises(DataSelectionError, match="cannot be read again"):
        score_samples(MODEL, WORDS, iter(ROWS), out_dir=tmp_path / "s")
    with pytest.raises(DataSelectionError, match="no rows"):
        score_samples(MODEL, WORDS, [], out_dir=tmp_path / "s")
