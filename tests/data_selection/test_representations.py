import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from krontune.data_selection import AdaptInf, DataSelectionError, score_samples
from krontune.data_selection.encoding import encode
from krontune.data_selection.representations import represent_samples, select_rds

specification = importlib.util.spec_from_file_location("tiny_adapters", Path(__file__).parent / "tiny_adapters.py")
tiny = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tiny)

WORDS = tiny.tokenizer()
POOL = [{"prompt": f"{i}+{i * i}=" + "?" * (i % 7), "completion": f"{i + i * i}"} for i in range(23)]
POOL.append({"input_ids": [5, 6, 7], "labels": [-100] * 3})  # no answer
TARGET = [{"text": "11+12="}, {"prompt": "what", "completion": "ever"}, {"text": "z"}]


def naive(model, row):
    """By Python loops from the model's own list of hidden states."""
    ids = encode(WORDS, row, "row").input_ids
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
    total = sum((i + 1) * states[i] for i in range(len(ids))) / sum(range(1, len(ids) + 1))
    return (total / total.norm()).numpy(), float(total.norm())


def test_vectors_are_the_weighted_means_of_one_row_at_a_time(tmp_path):
    for name, model in (("bare", tiny.tiny_llama()), ("lora", tiny.with_lora(tiny.tiny_llama()))):
        store = represent_samples(model, WORDS, POOL, out_dir=tmp_path / name, batch_size=4)
        assert store.vectors.shape == (24, 64) and not store.vectors[23].any()
        for i in range(23):
            unit, norm = naive(model, POOL[i])
            np.testing.assert_allclose(np.float32(store.vectors[i]), unit, atol=1e-3)
            assert store.norms[i] == pytest.approx(norm, rel=1e-4)


def test_examples_pick_the_nearest_row_left_in_turn(tmp_path):
    model = tiny.tiny_llama()
    pool = represent_samples(model, WORDS, POOL, out_dir=tmp_path / "pool")
    target = represent_samples(model, WORDS, TARGET, out_dir=tmp_path / "target")
    own = [naive(model, row)[0] for row in POOL[:23]]
    left, expected = set(range(23)), {}
    for turn in range(8):
        goal = naive(model, TARGET[turn % 3])[0]
        best = max(left, key=lambda i: own[i] @ goal)
        left.remove(best)
        expected[best] = f"{turn % 3:08d}"
    picked = select_rds(pool, target, budget=8)
    assert dict(zip(picked.indices.tolist(), (r["task"] for r in picked.reasons), strict=True)) == expected
    assert 23 not in select_rds(pool, target, budget=23).indices
    balanced = AdaptInf(selector="random").select(pool, budget=6)
    assert len(balanced) == 6, "clusters of a store without scores"
    with pytest.raises(DataSelectionError, match="no score asked for"):
        AdaptInf().select(pool, budget=6)


def test_gradients_are_not_taken_for_hidden_states(tmp_path):
    model = tiny.with_lora(tiny.tiny_llama())
    states = represent_samples(model, WORDS, TARGET, out_dir=tmp_path / "states")
    gradients = score_samples(model, WORDS, TARGET, out_dir=tmp_path / "gradients")
    for pool, target, named in ((gradients, states, "store"), (states, gradients, "target")):
        with pytest.raises(DataSelectionError, match=f"^{named}: .*gradients holds no hidden states"):
            select_rds(pool, target, budget=1)


def test_it_goes_on_and_refuses_another_model(tmp_path):
    model = tiny.tiny_llama()
    represent_samples(model, WORDS, POOL, out_dir=tmp_path / "a", part=(1, 2), batch_size=3)
    represent_samples(model, WORDS, POOL, out_dir=tmp_path / "a", part=(0, 2), batch_size=3)
    represent_samples(model, WORDS, POOL, out_dir=tmp_path / "b", batch_size=3)
    assert (tmp_path / "a" / "vectors.f16").read_bytes() == (tmp_path / "b" / "vectors.f16").read_bytes()
    other = represent_samples(tiny.tiny_llama(initializer_range=0.2), WORDS, TARGET, out_dir=tmp_path / "c")
    with pytest.raises(DataSelectionError, match="cannot be compared"):
        select_rds(represent_samples(model, WORDS, POOL, out_dir=tmp_path / "b", batch_size=3), other, budget=2)
