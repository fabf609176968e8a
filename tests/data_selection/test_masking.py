import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from krontune.data_selection import DataSelectionError
from krontune.data_selection.masking import Faithfulness, HalfMaskCollator, faithfulness_curve

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KEYS = (5, 6)  # the token that tells the class


def tokenizer():
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *"abcdefghijklmno"])}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def examples(count, seed, length=10):
    """Rows of a start, ten words of which one is a key, and an end; and the class that the key tells."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(7, 20, size=(count, length))
    classes = rng.integers(0, 2, size=count)
    rows[np.arange(count), rng.integers(0, length, size=count)] = np.array(KEYS)[classes]
    ends = np.ones((count, 1), np.int64)
    return np.hstack([2 * ends, rows, 3 * ends]), classes


def test_the_second_half_is_masked_at_rates_of_all_sizes_and_special_tokens_never():
    words = tokenizer()
    rows, classes = examples(400, 0, length=50)
    features = [
        {"input_ids": r.tolist()[: 52 - i % 3], "label": int(c)}
        for i, (r, c) in enumerate(zip(rows, classes, strict=True))
    ]
    batch = HalfMaskCollator(words)(features)
    assert batch["labels"].tolist() == classes.tolist() and batch["input_ids"].shape == (400, 52)
    for i, feature in enumerate(features):
        own, length = batch["input_ids"][i], len(feature["input_ids"])
        assert batch["attention_mask"][i].sum() == length and (own[length:] == 0).all()
        same = own[:length] == torch.tensor(feature["input_ids"])
        assert (own[:length][~same] == words.mask_token_id).all() and same[0]
        assert i >= 200 or same.all()
    rates = (batch["input_ids"][200:, 1:50] == words.mask_token_id).float().mean(1).numpy()
    for low in (0.0, 0.25, 0.5, 0.75):  # uniform: fifty in each quarter, give or take
        assert 30 < ((rates >= low) & (rates < low + 0.25)).sum() < 75
    assert np.corrcoef(rates[:-1], rates[1:])[0, 1] < 0.2, "each row draws its own rate"


def test_other_choices_of_rows_and_rates():
    words, (rows, _) = tokenizer(), examples(300, 1, length=40)
    features = [{"input_ids": row} for row in rows]

    def hit(**options):
        batch = HalfMaskCollator(words, **options)(features)
        assert "labels" not in batch
        return (batch["input_ids"] == words.mask_token_id).float().mean(1).numpy()

    assert (hit(rows="all") > 0).mean() > 0.9 and 0.35 < (hit(rows="coin") > 0).mean() < 0.65
    assert hit(rows="all", most=0.2).max() < 0.45
    assert np.array_equal(hit(seed=3), hit(seed=3)) and not np.array_equal(hit(seed=3), hit(seed=4))
    assert (HalfMaskCollator(words)(features[:1])["input_ids"] == words.mask_token_id).sum() == 0
    with pytest.raises(DataSelectionError, match="rows='third'"):
        HalfMaskCollator(words, rows="third")
    with pytest.raises(DataSelectionError, match="most=0"):
        HalfMaskCollator(words, most=0)
    decoder = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, pad_token="[PAD]")
    with pytest.raises(DataSelectionError, match="no mask token"):
        HalfMaskCollator(decoder)


def is_key(rows):
    return [np.isin(row, KEYS).astype(float) for row in rows]


def curve_by_hand(rows, importance, performance, steps):
    """One row and one mask at a time."""
    now, found = [list(row) for row in rows], [performance([np.array(row) for row in rows])]
    for step in range(1, steps + 1):
        for r, row in enumerate(now):
            open_ = [i for i in range(len(row)) if rows[r][i] >= 5]
            while sum(row[i] == 4 for i in open_) < math.ceil(step * len(open_) / steps):
                scores = importance([np.array(row)])[0]
                best = max((i for i in open_ if row[i] != 4), key=lambda i: scores[i])
                row[best] = 4
        found.append(performance([np.array(row) for row in now]))
    return found


def test_the_curve_is_that_of_masks_one_by_one_and_its_areas_are_known():
    rows, classes = examples(200, 2)

    def performance(found):  # a perfect reader, who guesses class 0 where the key is masked
        said = [1 if KEYS[1] in row else 0 for row in found]
        return float(np.mean(np.array(said) == classes))

    words = tokenizer()
    truth = faithfulness_curve(rows, is_key, performance, words, steps=10)
    np.testing.assert_allclose(truth.masked, curve_by_hand(rows, is_key, performance, 10))
    guess = float((classes == 0).mean())
    np.testing.assert_allclose(truth.masked, [1.0] + [guess] * 10)
    np.testing.assert_allclose(truth.random, np.linspace(1.0, guess, 11), atol=0.06)
    # All is lost with the first tenth of the masks: 1, but for the corner of the trapezoid rule.
    assert truth.racu == pytest.approx(0.9, abs=0.1)
    worst = faithfulness_curve(rows, lambda found: [-one for one in is_key(found)], performance, words, steps=10)
    assert worst.racu == pytest.approx(-0.9, abs=0.1)
    noise = np.random.default_rng(0)
    blind = faithfulness_curve(rows, lambda found: [noise.random(len(r)) for r in found], performance, words)
    assert abs(blind.racu) < 0.2
    gaps = truth.random - truth.masked
    assert truth.acu == pytest.approx(sum((gaps[i] + gaps[i + 1]) / 20 for i in range(10)))
    assert math.isnan(Faithfulness(np.array([0, 1.0]), np.ones(2), np.ones(2)).racu)
    with pytest.raises(DataSelectionError, match="no rows"):
        faithfulness_curve([], is_key, performance, words)
    with pytest.raises(DataSelectionError, match="1 importances for a row of 12"):
        faithfulness_curve(rows, lambda found: [np.ones(1)] * 200, performance, words)


def test_after_masked_training_a_masked_row_is_still_read():
    """With all words masked but the key, a model that was trained on masks answers; so masking asks a fair question."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    rows, classes = examples(1024, 3)
    collator, optimizer = HalfMaskCollator(tokenizer()), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        part = [(step * 32 + i) % 1024 for i in range(32)]
        batch = collator([{"input_ids": rows[i], "label": int(classes[i])} for i in part])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    rows, classes = examples(200, 4)
    alone = np.where(np.isin(rows, KEYS) | (rows < 5), rows, 4)
    with torch.no_grad():
        for given in (rows, alone):
            said = model.eval()(input_ids=torch.tensor(given)).logits.argmax(-1).numpy()
            assert (said == classes).mean() > 0.95
