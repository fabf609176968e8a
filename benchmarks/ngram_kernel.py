"""Hashed uni- and bigrams of the shipped text: krontune's kernel beside scikit-learn's HashingVectorizer."""

import gzip
import json
from importlib.resources import files

from measure import medians, show
from sklearn.feature_extraction.text import HashingVectorizer

from krontune.data_selection.ngrams import count_ngrams

COPIES, ROUNDS = 8, 5


def main() -> None:
    with (files("krontune.recipes.data") / "prose.jsonl.gz").open("rb") as file:
        texts = [json.loads(line)["text"] for line in gzip.open(file)] * COPIES
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    vectorizer = HashingVectorizer(
        n_features=2**17, ngram_range=(1, 2), alternate_sign=False, norm=None, token_pattern=r"\w+|[^\w\s]+"
    )
    contenders = {
        "scikit-learn HashingVectorizer": lambda: vectorizer.transform(texts).sum(axis=0),
        "krontune count_ngrams": lambda: count_ngrams(texts, 2, 2**17),
    }
    seconds = medians(contenders, ROUNDS)
    slowest = max(seconds.values())
    rows = [[name, f"{v:.2f}", f"{megabytes / v:.1f}", f"{slowest / v:.1f}"] for name, v in seconds.items()]
    show(f"counts of {megabytes:.0f} MB of text, median of {ROUNDS}", ["", "s", "MB/s", "speed-up"], rows)


main()
