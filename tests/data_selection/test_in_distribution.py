import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from krontune.data_selection import DataSelectionError
from krontune.data_selection.in_distribution import InDistributionTest, simes, token_maxima, two_sided
from krontune.data_selection.masking import HalfMaskCollator

specification = importlib.util.spec_from_file_location("of_masking", Path(__file__).parent / "test_masking.py")
of_masking = importlib.util.module_from_spec(specification)
specification.loader.exec_module(of_masking)
WORDS, MASK = of_masking.tokenizer(), 4


def trained(masked: bool, steps=60):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    rows, classes = of_masking.examples(1024, 3)
    collator, optimizer = (
        HalfMaskCollator(WORDS, most=1.0 if masked else 1e-9),
        torch.optim.AdamW(model.parameters(), 3e-3),
    )
    for step in range(steps):
        part = [(step * 32 + i) % 1024 for i in range(32)]
        batch = collator([{"input_ids": rows[i], "label": int(classes[i])} for i in part])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def masked(rows, seed, **options):
    batch = HalfMaskCollator(WORDS, seed=seed, **options)([{"input_ids": row} for row in rows])
    return batch["input_ids"].numpy()


def test_rows_masked_as_in_training_pass_and_strange_ones_do_not():
    model = trained(masked=True)
    test = InDistributionTest(model, WORDS, masks=HalfMaskCollator(WORDS, seed=1))
    test.fit(of_masking.examples(600, 10)[0])
    assert model.training, "left as it was"
    fresh = masked(of_masking.examples(400, 11)[0], seed=2)
    p = test.p_values(fresh)
    for level in (0.05, 0.2, 0.5, 0.8):  # uniform, within the noise of 200 rows of calibration and 400 of test
        assert abs((p <= level).mean() - level) < 0.11, level
    assert test.p_value(fresh) > 0.05

    strange = fresh.copy()
    strange[:, [0, -1]] = MASK  # no start and no end, which training never masked
    assert np.median(test.p_values(strange)) < 0.02 and test.p_value(strange) < 0.02
    unknown = np.where(fresh >= 7, 19, fresh)
    unknown[:, 1:-1] = np.where(np.arange(10) % 2, 1, 2)  # a row of starts and unknown words
    assert np.median(test.p_values(unknown)) < 0.02


@pytest.mark.slow
def test_masks_are_strange_to_a_test_fitted_without_them():
    model = trained(masked=False)
    rows = of_masking.examples(600, 10)[0]
    test = InDistributionTest(model, WORDS).fit(rows)
    fresh = of_masking.examples(300, 12)[0]
    assert (test.p_values(fresh) <= 0.05).mean() < 0.12
    everything = np.where(fresh >= 5, MASK, fresh)
    assert test.p_values(everything).max() < 0.02
    with_masks = InDistributionTest(model, WORDS, masks=HalfMaskCollator(WORDS, rows="all")).fit(rows)
    assert with_masks.p_values(everything).mean() > 5 * test.p_values(everything).mean()


def test_padding_and_batches_change_nothing():
    model = trained(masked=True, steps=1).eval()
    rows = [row[: 12 - i % 5].tolist() for i, row in enumerate(of_masking.examples(90, 4)[0])]
    test = InDistributionTest(model, WORDS).fit(rows)
    assert np.array_equal(test.p_values(rows[:7]), np.concatenate([test.p_values([row]) for row in rows[:7]]))


def test_maxima_tails_and_simes_equal_slow_ones():
    torch.manual_seed(0)
    states, mask = torch.randn(3, 2, 5, 4), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = token_maxima(states, mask)
    for b in range(3):
        for layer in range(2):
            for d in range(4):
                assert found[b, layer, d] == max(states[b, layer, t, d] for t in range(5) if mask[b, t])
    rng = np.random.default_rng(0)
    fitted, values = (
        np.sort(rng.integers(0, 6, (20, 2)), axis=0).astype(float),
        rng.integers(-1, 8, (9, 2)).astype(float),
    )
    p = two_sided(values, fitted)
    for i in range(9):
        for j in range(2):
            share = sum(1.0 if f < values[i, j] else 0.5 if f == values[i, j] else 0.0 for f in fitted[:, j])
            tail = (share + 0.5) / 21
            assert p[i, j] == pytest.approx(2 * min(tail, 1 - tail)) and 0 < p[i, j] <= 1
    for row, combined in zip(p, simes(p), strict=True):
        low, high = sorted(row)
        assert combined == pytest.approx(min(2 * low, high))


def test_p_values_of_rows_like_those_of_the_fit_are_uniform_whatever_the_model():
    """Many small fits: the share of p-values up to a level is the level."""

    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask, output_hidden_states):
            turns = torch.arange(1, 101, dtype=torch.float64).view(2, 1, 1, 50) ** 0.5
            return type("Out", (), {"hidden_states": tuple(torch.sin(input_ids[None, :, :, None] * turns))})

    rng = np.random.default_rng(1)
    found = []
    for seed in range(40):
        rows = rng.integers(5, 10_000_000, (60, 3))
        test = InDistributionTest(Noise(), WORDS, seed=seed).fit(rows[:45])
        found.append(test.p_values(rows[45:]))
    p = np.concatenate(found)
    for level in (0.125, 0.25, 0.5):
        assert abs((p <= level).mean() - level) < 0.08


def test_what_cannot_be_tested_is_refused():
    model = trained(masked=True, steps=0)
    test = InDistributionTest(model, WORDS)
    with pytest.raises(DataSelectionError, match="not fitted"):
        test.p_values([[2, 3]])
    with pytest.raises(DataSelectionError, match="7 rows to fit; give at least 30"):
        test.fit([[2, 5, 3]] * 7)
    with pytest.raises(DataSelectionError, match="no rows to test"):
        test.fit([[2, 5, 3]] * 30).p_values([])
    with pytest.raises(DataSelectionError, match="batch_size"):
        InDistributionTest(model, WORDS, batch_size=0)
