"""Score a pool with a model: batches of like length, through the model, into a store.

Which rows go in one batch is fixed by the pool and the settings alone, since padding and batch size change the last
digits: a run that goes on after a kill, or that is shared by processes, gives the same bytes as one that did not.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .encoding import Encoded, collate, encode, image_signature, image_tokens, without_images
from .gradients import Layers, Plan, plan_gradients, scoring_mode, take_gradients
from .identity import store_identity
from .projections import CountSketch, FactorProjection, Projection, projected_size, projection_key, projector
from .scores import MemberMeans, answer_logits, answer_places, sample_means, token_scores
from .selection import MAX_SEED, checked_int
from .store import NORM, Store
from .texts import DataSelectionError, TextSource, checked_source, file_paths, is_dataset, read_rows

SCORES = ("nll", "ppl", "el2n", "entropy", "grand", "log_ig", "epistemic")
# Rows that are tokenised and sorted by length together.
BLOCK = 2048


def score_samples(
    model: Any,
    tokenizer: Any,
    dataset: TextSource,
    scores: Sequence[str] = ("nll", "el2n", "entropy"),
    gradients: Layers | None = "last",
    projection: Projection = 1024,
    *,
    out_dir: str | os.PathLike[str],
    batch_size: int = 8,
    max_length: int | None = 2048,
    members: Sequence[str] | int | None = None,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> Store:
    """Score every row of a pool, into a folder where an interrupted run goes on.

    Args:
        model: a causal language model, bare or a `peft.PeftModel`; it is scored in evaluation mode and left as it was.
        tokenizer: its tokenizer, or for rows with images its processor.
        dataset: a `datasets.Dataset`, a list of rows or strings, or paths; see `encoding.encode` for the rows.
        scores: any of "nll" (mean over the answer tokens), "ppl" (its exponential), "el2n", "entropy", "grand" (norm of
            the gradient), "log_ig" (NLL without the images, their tokens removed, minus NLL with them; 0 for a row
            without), "epistemic" (mutual information between answer and member; its reverse comes along as
            "epistemic_reverse"). All in nats but "ppl", "el2n" and "grand".
        gradients: "last", "all" or numbers: the decoder layers whose adapter gradients are taken; None for none.
        projection: length of the stored vectors, by a seeded count-sketch; `projections.Factorised(side)` projects
            both factors of each parameter's gradient instead; None keeps gradients whole.
        out_dir: the folder of the store. One that was made with the same arguments is completed.
        batch_size: rows a batch.
        max_length: tokens of a row that are read, from the start; None for all.
        members: for "epistemic": names of loaded adapters, or how many dropout masks to draw.
        seed: of the projection and the dropout masks.
        part: (i, n) does the i-th of n parts of the rows; None takes this process's part of a launch (`RANK` and
            `WORLD_SIZE`), or everything. The store is complete when every part has been done.

    Returns:
        The store, which can be read once it is complete.

    Raises:
        DataSelectionError: a score or row is not as above, the folder belongs to other arguments, or as
            `gradients.plan_gradients`, `gradients.scoring_mode` and `gradients.take_gradients`.
    """
    names = _checked_scores(scores, gradients, members, model)
    checked_int(batch_size, "batch_size", 1, 2**20, "8 does on a CPU")
    checked_int(seed, "seed", 0, MAX_SEED, "any such number does")
    projected = projection_key(projection)
    if max_length is not None:
        checked_int(max_length, "max_length", 2, 2**40, "None reads all tokens")
    part_of_rows = part_of_launch(part)
    rows = pool_of(dataset)
    plan = None if gradients is None else plan_gradients(model, gradients)
    width = 0 if plan is None else projected_size(projection, plan.shapes)
    used = {*active_adapters(model), *(members if isinstance(members, (list, tuple)) else ())}
    key = {
        **store_identity(model, tokenizer, rows, sorted(used)),
        "layers": None if plan is None else list(plan.layers),
        "projection": None if plan is None else projected,
        "batch_size": batch_size,
        "max_length": max_length,
        "members": members,
        "seed": seed,
    }
    columns = [*names, *(["epistemic_reverse"] if "epistemic" in names else []), *([NORM] if plan else [])]
    store = Store.prepare(out_dir, key, len(rows), columns, width)
    if not store.complete:
        device = next(model.parameters()).device
        used_projector = None if plan is None else projector(projection, plan.shapes, seed, device)
        job = _Job(model, tokenizer, columns, plan, used_projector, members, seed, device)
        with scoring_mode(model):
            for places, batch in batches_to_do(rows, tokenizer, store, batch_size, max_length, part_of_rows):
                found, vectors = job.score(places, batch)
                store.write(places, np.stack([found[name] for name in columns], axis=1), vectors)
    if part is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    store.finish()
    return store


@dataclass(frozen=True, eq=False)
class _Job:
    """Everything that turns a batch into numbers."""

    model: Any
    tokenizer: Any
    columns: list[str]
    plan: Plan | None
    projector: CountSketch | FactorProjection | None
    members: Sequence[str] | int | None
    seed: int
    device: torch.device

    def score(
        self, places: Sequence[int], batch: Sequence[Encoded]
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[Any] | None]:
        """Columns (n,) and vectors (n, width) of a batch; `places` are its rows' numbers in the pool."""
        found = {name: np.full(len(batch), np.nan) for name in self.columns}
        if not any(row.answers for row in batch):
            width = 0 if self.plan is None else self.projector.size if self.projector else self.plan.size
            return found, np.zeros((len(batch), width), np.float32) if self.plan else None
        inputs, labels = self._tensors(batch)
        where, targets, owner = answer_places(labels)
        vectors = None
        if self.plan is None:
            with torch.no_grad():
                tokens = token_scores(answer_logits(self.model, inputs, where), targets)
        else:
            taken = take_gradients(self.model, self.plan, inputs, labels, self.projector)
            tokens, vectors = taken.tokens, self._stored(taken.vectors)
            norms = taken.norms.double().cpu().numpy()
            found[NORM] = np.where([row.answers > 0 for row in batch], norms, np.nan)
        with torch.no_grad():
            found |= {name: sample_means(values, owner, len(batch)) for name, values in tokens.items()}
            found["ppl"] = np.exp(found["nll"])
            found["grand"] = found.get(NORM, np.full(len(batch), np.nan))
            if "log_ig" in self.columns:
                found["log_ig"] = self._grounding(batch, tokens["nll"], targets, owner)
            if "epistemic" in self.columns:
                mutual, reverse = self._epistemic(places, inputs, where)
                found["epistemic"] = sample_means(mutual, owner, len(batch))
                found["epistemic_reverse"] = sample_means(reverse, owner, len(batch))
        return found, vectors

    def _tensors(self, batch: Sequence[Encoded]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        words = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        inputs, labels = collate(batch, words.pad_token_id or 0)
        return {name: value.to(self.device) for name, value in inputs.items()}, labels.to(self.device)

    def _stored(self, vectors: torch.Tensor) -> NDArray[Any]:
        if self.projector is None:
            return vectors.cpu().numpy()
        return nn.functional.normalize(vectors, dim=1, eps=1e-30).half().cpu().numpy()

    def _grounding(
        self, batch: Sequence[Encoded], nll: torch.Tensor, targets: torch.Tensor, owner: torch.Tensor
    ) -> NDArray[np.float64]:
        """(n,) the mean NLL without images minus that with them; nll, targets and owner (A,) of the batch with images.

        Both means are over the tokens that both rows predict: an answer that only an image stands before loses its
        first token with it, and of a caption the borders of its images are answer tokens of one row alone.
        """
        found = np.where([row.answers > 0 for row in batch], 0.0, np.nan)
        blind = [i for i, row in enumerate(batch) if row.images]
        if not blind:
            return found
        removed = image_tokens(self.model, self.tokenizer)
        rows = [without_images(batch[i], removed) for i in blind]
        inputs, labels = self._tensors(rows)
        where, targets_blind, owner_blind = answer_places(labels)
        tokens = token_scores(answer_logits(self.model, inputs, where), targets_blind)
        found[blind] = sample_means(tokens["nll"], owner_blind, len(blind))
        words = ~torch.isin(targets, torch.tensor(removed, device=targets.device))
        for i, row in zip(blind, rows, strict=True):
            own = nll[(owner == i) & words]
            found[i] -= own[len(own) - row.answers :].double().mean().item()
        return found

    def _epistemic(
        self, places: Sequence[int], inputs: dict[str, torch.Tensor], where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        means = MemberMeans()
        if isinstance(self.members, int):
            with _dropouts_on(self.model), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                for member in range(self.members):
                    # A mask depends on the batch and the member, so that it is the same when a run goes on.
                    torch.manual_seed(((self.seed * 1_000_003 + places[0]) * 1_009 + member) % 2**63)
                    means.add(answer_logits(self.model, inputs, where))
            return means.measures()
        active = self.model.active_adapters
        try:
            for name in self.members or ():
                self.model.set_adapter(name)
                means.add(answer_logits(self.model, inputs, where))
        finally:
            self.model.set_adapter(active if len(active) > 1 else active[0])
            self.model.requires_grad_(False)  # which set_adapter turns on
        return means.measures()


@contextmanager
def _dropouts_on(model: nn.Module) -> Iterator[None]:
    found = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for module in found:
        module.training = True
    try:
        yield
    finally:
        for module in found:
            module.training = False


def batches_to_do(
    rows: Any, tokenizer: Any, store: Store, batch_size: int, max_length: int | None, part: tuple[int, int]
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """The batches that are left to do of a part: row numbers and rows."""
    done = store.done
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        if done[start:stop].all():
            continue
        encoded = [encode(tokenizer, rows[i], f"row {i}", max_length) for i in range(start, stop)]
        shapes = [repr(image_signature(row)) for row in encoded]
        # Rows whose images fit in one tensor stand together, then rows of like length.
        order = sorted(range(len(encoded)), key=lambda i: (shapes[i], len(encoded[i]), i))
        batches = [list(batch) for batch in _cut(order, shapes, batch_size)]
        for number, batch in enumerate(batches):
            places = [start + i for i in batch]
            if number % part[1] == part[0] and not done[places].all():
                yield places, [encoded[i] for i in batch]


def _cut(order: list[int], shapes: list[str], size: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or shapes[i] != shapes[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pool_of(dataset: Any) -> Any:
    """The rows of a dataset, files read.

    Raises:
        DataSelectionError: it cannot be read twice, or has no rows.
    """
    paths = file_paths(dataset)
    if paths:
        return [row for path in paths for row, _ in read_rows(path, "dataset")]
    dataset = checked_source(dataset, "dataset")
    if not (is_dataset(dataset) or isinstance(dataset, (list, tuple))):
        raise DataSelectionError(
            f"dataset is a {type(dataset).__name__}, which cannot be read again when a run goes on; give files, a "
            "datasets.Dataset or a list"
        )
    if not len(dataset):
        raise DataSelectionError("dataset has no rows; give at least one")
    return dataset


def active_adapters(model: Any) -> list[str]:
    """Names of a model's active adapters; none for a bare model."""
    from peft import PeftModel

    return list(model.active_adapters) if isinstance(model, PeftModel) else []


def part_of_launch(part: tuple[int, int] | None) -> tuple[int, int]:
    """The part (i, n) asked for, or this process's of a launch.

    Raises:
        DataSelectionError: it is no such pair.
    """
    if part is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not (len(part) == 2 and 0 <= part[0] < part[1]):
        raise DataSelectionError(f"part={part!r}: must be (i, n) with 0 <= i < n")
    return part


def _checked_scores(
    scores: Sequence[str], gradients: Layers | None, members: Sequence[str] | int | None, model: Any
) -> list[str]:
    names = [scores] if isinstance(scores, str) else list(dict.fromkeys(scores))
    unknown = [name for name in names if name not in SCORES]
    if unknown or not names:
        raise DataSelectionError(f"scores={names}: must be some of {', '.join(SCORES)}; {unknown or 'none'} is not")
    if "grand" in names and gradients is None:
        raise DataSelectionError("the score 'grand' is the norm of a gradient; pass gradients='last' or leave it out")
    if "log_ig" in names and not image_tokens(model):
        raise DataSelectionError(
            f"the score 'log_ig' compares answers with and without images, and a {type(model).__name__} whose config "
            "has no image_token_id takes none; leave it out"
        )
    if "epistemic" in names:
        _check_members(members, model)
    return names


def _check_members(members: Sequence[str] | int | None, model: Any) -> None:
    loaded = list(getattr(model, "peft_config", {}))
    if isinstance(members, int) and not isinstance(members, bool) and members > 1:
        if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
            raise DataSelectionError("members are dropout masks, and the model has no dropout; name several adapters")
        return
    named = list(members) if isinstance(members, (list, tuple)) else []
    if len(named) < 2 or not set(named) <= set(loaded):
        raise DataSelectionError(
            f"members={members!r}: 'epistemic' needs the names of at least two loaded adapters (here: {loaded}), or "
            "how many dropout masks to draw"
        )
