"""Batches in which some of the images are left out, so that a model learns what an answer is worth without them.

Image grounding compares an answer's probability with and without the image. A model that never saw a missing image
says anything in the second case; one for whose training half of each batch went without images says p(answer | text),
and the mean of the log ratio is then the information that the image gives. The rule of half a batch is that of arXiv
2310.07819 for tokens; that it makes image grounding identifiable is measured in the tests, on a toy of known grounding.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .encoding import collate, encode, image_tokens, without_images
from .texts import DataSelectionError


class ImageDropCollator:
    """Turns rows into a batch, and leaves out the images of the last ones; a `data_collator` of a trainer.

    What is left out are the tokens that stand for the image and its pixels, as `log_ig` does it when it scores.

    Args:
        model: what is trained; its config says which tokens stand for an image.
        processor: of the model.
        drop: the share of rows that lose their images: of each batch, what does not come out even being carried to the
            next, so that batches of one row work too. Batches are to be shuffled. 0 leaves all images in.
        max_length: tokens of a row that are read, for rows without images; None for all.

    Calling it with rows (see `encoding.encode`) gives the model's inputs and `labels` (B, T).

    Raises:
        DataSelectionError: `drop` is no share, the model takes no images, or a row cannot be read.
    """

    def __init__(self, model: Any, processor: Any, drop: float = 0.5, max_length: int | None = None) -> None:
        if not 0.0 <= drop <= 1.0:
            raise DataSelectionError(f"drop={drop!r}: must be from 0 to 1; a half is what identifies image grounding")
        self.tokens = image_tokens(model, processor)
        if not self.tokens:
            raise DataSelectionError(f"a {type(model).__name__} whose config has no image_token_id takes no images")
        self.processor, self.drop, self.max_length = processor, drop, max_length
        self.due = 0.0  # rows that are still to lose their images

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        encoded = [encode(self.processor, row, f"row {i}", self.max_length) for i, row in enumerate(rows)]
        self.due += self.drop * len(encoded)
        count = int(self.due + 1e-9)
        self.due -= count
        kept = len(encoded) - count
        encoded[kept:] = [without_images(row, self.tokens) if row.images else row for row in encoded[kept:]]
        words = getattr(self.processor, "tokenizer", self.processor)
        inputs, labels = collate(encoded, words.pad_token_id or 0)
        return {**inputs, "labels": labels}
