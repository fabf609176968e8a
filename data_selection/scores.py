"""Scores of samples from a language model's answers: pure functions, and one forward pass that feeds them.

Every score of a sample is the mean over its answer tokens of a score of the token, but perplexity (the exponential of
the mean NLL) and GraNd (the norm of a gradient, see `gradients`). Logits are computed at answer positions alone.

Sources: EL2N and GraNd, arXiv 2107.07075; perplexity, entropy and image grounding as selectors, arXiv 2410.10636, whose
published code departs from its text in two of them (docs/adapt_inf.md); the epistemic measures, arXiv 2410.10786.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .encoding import IGNORED
from .texts import DataSelectionError

# Numbers of logits that a softmax is taken of at a time. On a CPU what is made of them stays in the cache, which is
# four to seven times as fast as from memory; elsewhere the number only bounds the memory.
CPU_NUMBERS, NUMBERS = 2**19, 2**27


def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of answer tokens, in nats.

    Args:
        logits: (A, V), any floating dtype; computed in float32.
        targets: (A,) int64, the tokens that came.

    Returns:
        (A,) float32 each: `nll`, -log p(y); `el2n`, the Euclidean norm of p minus the one-hot y; `entropy`, that of p.
    """
    size = _rows_at_once(logits)
    parts = [_token_scores(*part)[0] for part in zip(logits.split(size), targets.split(size), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def token_scores_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`token_scores`, and the gradient of sum_a weight_a nll_a, in one pass over the vocabulary.

    With respect to the logits of a token it is weight (p - e_y), whose norm EL2N asks for.

    Args:
        logits: (A, V), as given to `token_scores`.
        targets: (A,) int64.
        weights: (A,).

    Returns:
        The scores, and the gradient (A, V) in the dtype of the logits.
    """
    size, grad, parts = _rows_at_once(logits), torch.empty_like(logits), []
    for part, target, weight, into in zip(*(t.split(size) for t in (logits, targets, weights, grad)), strict=True):
        scores, error = _token_scores(part, target)
        into.copy_(error.mul_(weight[:, None]))
        parts.append(scores)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, grad


def _rows_at_once(logits: torch.Tensor) -> int:
    return max(1, (CPU_NUMBERS if logits.device.type == "cpu" else NUMBERS) // logits.shape[1])


def _token_scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The scores of some tokens, and p minus the one-hot (A, V) in float32."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    # A token that cannot come has p = 0 and log p = -inf, and adds 0.
    entropy = -log_p.clamp_(min=torch.finfo(log_p.dtype).min).mul_(p).sum(-1)
    p.scatter_add_(1, targets[:, None], torch.full_like(p[:, :1], -1.0))  # p minus the one-hot, without a one-hot
    return {"nll": nll, "el2n": p.norm(dim=-1), "entropy": entropy}, p


def sample_means(values: torch.Tensor, owner: torch.Tensor, samples: int) -> NDArray[np.float64]:
    """The mean of `values` (A,) over the tokens of each sample, (samples,); NaN for a sample without tokens.

    Args:
        values: (A,).
        owner: (A,) int64, the sample of each token.
        samples: how many there are.
    """
    rows = owner.cpu().numpy()
    sums = np.bincount(rows, values.detach().double().cpu().numpy(), samples)
    counts = np.bincount(rows, minlength=samples)
    return np.divide(sums, counts, out=np.full(samples, np.nan), where=counts > 0)


class MemberMeans:
    """Predictions of the members of an ensemble in three running means: memory does not grow with the members.

    Of member predictions p_w with mean P: the mean of p_w, of log p_w and of H(p_w) give

        mutual information   H(P) - E H(p_w)            = E KL(p_w || P)
        its reverse          -sum P E log p_w - H(P)    = E KL(P || p_w)

    (arXiv 2410.10786, the measures C2 and B3 of its table; their sum is the expected pairwise divergence.)
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.members = 0
        self.dtype = dtype
        self.means: tuple[torch.Tensor, ...] = ()

    def add(self, logits: torch.Tensor) -> None:
        """Take in one member's logits (A, V)."""
        log_p = torch.log_softmax(logits.to(self.dtype), dim=-1)
        p = log_p.exp()
        new = (p, log_p, torch.special.entr(p).sum(-1))
        self.members += 1
        if self.members == 1:
            self.means = new
        else:
            self.means = tuple(mean.lerp(n, 1 / self.members) for mean, n in zip(self.means, new, strict=True))

    def measures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mutual information and its reverse, (A,) each, in nats, never below 0."""
        p, log_p, entropy = self.means
        total = torch.special.entr(p).sum(-1)
        cross = -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
        return (total - entropy).clamp(min=0), (cross - total).clamp(min=0)


def answer_places(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where answers are predicted.

    Args:
        labels: (B, T), -100 outside the answers.

    Returns:
        places (B, T) bool: the positions whose next token is an answer token; targets (A,), those tokens; owner (A,),
        the row of each. The first token of a row is predicted from nothing and never counts.
    """
    places = torch.zeros_like(labels, dtype=torch.bool)
    places[:, :-1] = labels[:, 1:] != IGNORED
    return places, labels[:, 1:][places[:, :-1]], places.nonzero()[:, 0]


def output_layer(model: Any) -> Any:
    """The layer from hidden states to logits.

    Raises:
        DataSelectionError: the model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise DataSelectionError(f"a {type(model).__name__} has no output layer; give a causal language model")
    return head


@contextmanager
def head_at(model: Any, places: torch.Tensor) -> Iterator[None]:
    """Within the block the output layer sees only the hidden states at `places` (B, T): logits are (1, A, V).

    Whatever the model does with logits afterwards (scaling, capping) is left as it is.

    Raises:
        DataSelectionError: the model has no output layer, or hands it hidden states of another shape.
    """
    head = output_layer(model)

    def select(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if args[0].shape[:2] != places.shape:
            raise DataSelectionError(
                f"the output layer was given hidden states {tuple(args[0].shape)} for tokens {tuple(places.shape)}; "
                "this model changes the number of tokens and cannot be scored"
            )
        return (args[0][places][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def answer_logits(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The logits (A, V) of one forward pass at `places` (B, T), with a graph where gradients are on."""
    with head_at(model, places):
        return model(**inputs, use_cache=False).logits[0]
