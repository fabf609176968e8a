"""Does credit fall on tokens that matter? Hide the credited tokens, hide as many random ones, and compare the damage.

A measure p(x) of how well the answer still comes out, with the share x of the tokens hidden that have the highest
scores; b(x), the same with random ones. The area between the curves, relative to what there is to lose (relative ACU):

    RACU = integral of b(x) - p(x)  /  integral of b(x) - b(1)

1 where the scores find at once all that matters, 0 where they do no better than chance, negative where worse. Masking
curves and RACU: A. Madsen et al., arXiv 2310.07819. Departures: the model was not trained with hidden tokens, which
its language-model head may take for damage of any kind, so only the comparison with random tokens means anything; and
scores are not computed anew after each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import torch

from .credit import choose
from .errors import RlError

Measure = Callable[[torch.Tensor], torch.Tensor]
"""hidden (B, T) bool -> (B,), higher where the answer survives: a verifier's reward, or `answer_log_likelihood`."""

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class MaskingAudit:
    """Curves over `fractions` of tokens hidden, means over the batch.

    credited: the measure with the highest-scored tokens hidden. random: with random ones, mean of the repeats.
    acu: area between the two. racu: the same relative to the area above the end of `random`; nan where hiding
    everything costs nothing, since then nothing can be told.
    """

    fractions: tuple[float, ...]
    credited: tuple[float, ...]
    random: tuple[float, ...]
    acu: float
    racu: float


@torch.no_grad()
def masking_audit(
    measure: Measure,
    scores: torch.Tensor,
    candidates: torch.Tensor,
    *,
    fractions: Sequence[float] = FRACTIONS,
    repeats: int = 4,
    seed: int = 0,
) -> MaskingAudit:
    """Audits scores (B, T), such as FAI or gamma, over the tokens that may be hidden, candidates (B, T).

    Candidates are usually the response without the answer itself. Of each row the share is rounded half up; ties go to
    the earlier token. `measure` is called 1 + (1 + repeats) times for each fraction between 0 and 1.

    Raises RlError for shapes that differ, fractions that do not rise from 0 to 1, or no repeats.
    """
    if scores.shape != candidates.shape or scores.dim() != 2:
        raise RlError(f"scores {tuple(scores.shape)} and candidates {tuple(candidates.shape)} must be (B, T) alike")
    if len(fractions) < 2 or list(fractions) != sorted(set(fractions)) or (fractions[0], fractions[-1]) != (0, 1):
        raise RlError(f"fractions must rise from 0 to 1, got {list(fractions)}")
    if repeats < 1:
        raise RlError(f"repeats must be 1 or more, got {repeats}")
    candidates = candidates.bool()
    generator = torch.Generator().manual_seed(seed)
    chance = [torch.rand(scores.shape, generator=generator).to(scores.device) for _ in range(repeats)]
    sizes = candidates.sum(1).tolist()

    def value(order: torch.Tensor, fraction: float) -> float:
        count = torch.tensor([floor(fraction * n + 0.5) for n in sizes], device=scores.device)
        return measure(choose(order, candidates, count)).double().mean().item()

    inner = fractions[1:-1]
    whole, none = value(scores, 0.0), value(scores, 1.0)  # the same for every order
    credited = (whole, *(value(scores, x) for x in inner), none)
    random = (whole, *(sum(value(order, x) for order in chance) / repeats for x in inner), none)
    return MaskingAudit(tuple(fractions), credited, random, *relative_acu(fractions, credited, random))


def relative_acu(fractions: Sequence[float], credited: Sequence[float], random: Sequence[float]) -> tuple[float, float]:
    """(ACU, RACU) of two curves by the trapezoid rule; RACU is nan where `random` never lies above its end."""
    x, p, b = (torch.tensor(values, dtype=torch.float64) for values in (fractions, credited, random))
    acu = torch.trapezoid(b - p, x).item()
    whole = torch.trapezoid(b - b[-1], x).item()
    return acu, acu / whole if whole > 0 else float("nan")


def answer_log_likelihood(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer_mask: torch.Tensor
) -> Measure:
    """A measure for `masking_audit`: mean log-probability, in nats, of the tokens in `answer_mask`, (B, T) each.

    Hidden tokens are taken out of the attention of all later ones and keep their place: positions are those of the
    whole text. An answer's first token must not be a row's first, and what predicts it is still its neighbour.
    """
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # (B, T)
    wanted = answer_mask.bool()[:, 1:]
    if wanted.sum(1).min() == 0:
        raise RlError("each row of answer_mask needs a token after the first")

    @torch.no_grad()
    def measure(hidden: torch.Tensor) -> torch.Tensor:
        seen = attention_mask * ~hidden.to(attention_mask.device)
        logits = model(input_ids=input_ids, attention_mask=seen, position_ids=positions, use_cache=False).logits
        log_probs = logits[:, :-1].float().log_softmax(-1)
        each = log_probs.gather(2, input_ids[:, 1:, None])[:, :, 0].where(wanted, 0)
        return each.sum(1) / wanted.sum(1)

    return measure


def verifier_reward(
    model: Any,
    tokenizer: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_start: Sequence[int],
    reward: Callable[[list[str]], Sequence[float]],
    *,
    response_start: int,
    max_new_tokens: int = 64,
) -> Measure:
    """A measure for `masking_audit`: the answer is written anew, greedily, without sight of the hidden tokens.

    Args:
        input_ids, attention_mask: (B, T), prompts on the left padded to one length, `response_start`.
        answer_start: for each row, where its answer begins; what stands before is kept, as text and for the eyes that
            it is not hidden from.
        reward: whole responses, kept part and new answer, to one number each.

    Each row is continued by itself: B short generations for each call.
    """

    @torch.no_grad()
    def measure(hidden: torch.Tensor) -> torch.Tensor:
        texts = []
        for row, start in enumerate(answer_start):
            ids, seen = input_ids[row : row + 1, :start], attention_mask[row : row + 1, :start]
            # What a row is padded with is cut off, so that positions count from its first token.
            first = int(seen[0].argmax())
            kept = (seen * ~hidden[row : row + 1, :start].to(seen.device))[:, first:]
            new = _continue(model, ids[:, first:], kept, max_new_tokens, tokenizer.eos_token_id)
            response = [*ids[0, response_start:].tolist(), *new]
            texts.append(tokenizer.decode(response, skip_special_tokens=True))
        return torch.tensor([float(x) for x in reward(texts)])

    return measure


def _continue(model: Any, ids: torch.Tensor, seen: torch.Tensor, max_new_tokens: int, end: int) -> list[int]:
    """Greedy tokens after ids (1, n), of which `seen` (1, n) are visible. Places are those of the whole text, which
    `generate` would count from the mask instead."""
    cache, new, step = None, [], ids
    for _ in range(max_new_tokens):
        at = ids.shape[1] + len(new)
        places = torch.arange(at - step.shape[1], at, device=ids.device)[None]
        output = model(input_ids=step, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
        if token == end:
            break
        new.append(token)
        step = torch.tensor([[token]], device=ids.device)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    return new
