"""Compute the prompt that the completions of a group share once, in sampling and in scoring.

A prompt of P tokens with G completions of C tokens takes P + G C positions instead of G (P + C). Nothing is
approximated: the results are those of the plain way up to rounding, gradients too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .errors import RlError

ATTENTION = ("eager", "sdpa")  # what takes a mask of its own for each pair of positions


@dataclass(frozen=True)
class Packed:
    """U different prompts, each on a line with its completions side by side.

    A line holds a prompt less its last token, then K places of C positions: the last token of the prompt and a
    completion less its last token, which are the C positions that predict a completion. L = P - 1 + K C.

    input_ids, position_ids, labels: (U, L); a label is the next token, -100 where nothing is predicted.
    mask: (U, 1, L, L), 0 where a position attends and the least number of its dtype elsewhere.
    line, places: (B,) the line of each row, and (B, C) the positions on it that predict its completion.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    line: torch.Tensor
    places: torch.Tensor


def pack(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """Put the rows with equal prompts on one line.

    prompt_ids, prompt_mask: (B, P), padded on the left. completion_ids, completion_mask: (B, C), padded on the right.
    dtype: of the mask, which is the model's. Rows may come in any order and prompts have different numbers of
    completions; the places that a line does not need predict nothing.
    """
    width, length, device = prompt_ids.shape[1], completion_ids.shape[1], prompt_ids.device
    prompts, line = distinct_rows(prompt_ids, prompt_mask)
    place = (line[:, None] == line).tril(-1).sum(1)  # (B,) how many rows above have the same prompt
    lines, places = len(prompts), int(place.max()) + 1
    shown = prompt_ids.new_zeros(lines, places, length)
    shown[line, place] = torch.cat([prompt_ids[:, -1:], completion_ids[:, :-1]], 1)
    labels = prompt_ids.new_full((lines, places, length), -100)
    labels[line, place] = completion_ids.masked_fill(completion_mask == 0, -100)
    stem = width - 1

    owner = torch.cat([torch.full((stem,), -1), torch.arange(places).repeat_interleave(length)]).to(device)  # (L,)
    order = torch.arange(len(owner), device=device)
    seen = (order <= order[:, None]) & ((owner == -1) | (owner == owner[:, None]))  # (L, L)
    key = torch.cat([prompt_mask[prompts, :-1].bool(), shown.new_ones(lines, places * length, dtype=torch.bool)], 1)
    seen = (seen & key[:, None]) | torch.eye(len(owner), dtype=torch.bool, device=device)  # (U, L, L)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)

    after = stem + torch.arange(length, device=device)
    return Packed(
        torch.cat([prompt_ids[prompts, :-1], shown.flatten(1)], 1),
        torch.cat([order[:stem], after.repeat(places)]).expand(lines, -1),
        torch.cat([prompt_ids.new_full((lines, stem), -100), labels.flatten(1)], 1),
        mask[:, None],
        line,
        after + place[:, None] * length,
    )


def distinct_rows(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (B, P) ids and their mask: the first row of each kind, (U,), and each row's kind, (B,)."""
    firsts: dict[tuple[int, ...], int] = {}
    kinds, first = [], []
    for number, row in enumerate(torch.cat([ids, mask.to(ids)], 1).tolist()):
        kind = firsts.setdefault(tuple(row), len(firsts))
        if kind == len(first):
            first.append(number)
        kinds.append(kind)
    return torch.tensor(first, device=ids.device), torch.tensor(kinds, device=ids.device)


@contextmanager
def shared_prefill(model: Any) -> Iterator[None]:
    """Inside the block `model.generate` reads each different prompt once and lets its copies begin from there.

    For calls with `input_ids` and `attention_mask` by name, padded on the left, and without a cache of their own.
    """
    own, held = model.generate, vars(model).get("generate")

    def generate(**inputs: Any) -> Any:
        ids, attended = inputs["input_ids"], inputs["attention_mask"]
        first, kind = distinct_rows(ids, attended)
        if len(first) == len(ids) or ids.shape[1] == 1:
            return own(**inputs)
        mask = attended[first, :-1]
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
        with torch.no_grad():
            cache = model(
                input_ids=ids[first, :-1], attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
            ).past_key_values
        cache.reorder_cache(kind)
        return own(**inputs, past_key_values=cache)

    vars(model)["generate"] = generate
    try:
        yield
    finally:
        del vars(model)["generate"]
        if held is not None:
            vars(model)["generate"] = held


@torch.no_grad()
def refuse_leaks(model: Any) -> None:
    """Look whether completions on one line are blind to each other in this model.

    Raises:
        RlError: the attention takes no mask of its own, some layers are no full attention or have a window, or a
            completion's result changed with its neighbour's tokens.
    """
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    if chosen not in ATTENTION:
        raise RlError(f"share_prompts needs attn_implementation eager or sdpa, and the model has {chosen!r}")
    others = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if others:
        raise RlError(f"share_prompts needs full attention in every layer, and the model has {', '.join(others)}")
    window = getattr(config, "sliding_window", None)
    if window is not None and not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True):
        # A mask of one's own takes the place of the window, and the check below is too short to see it.
        raise RlError(
            f"share_prompts needs full attention in every layer, and the model has sliding_window {window}; set "
            "share_prompts to false"
        )
    device = next(model.parameters()).device
    prompt, ones = torch.tensor([[1, 2], [1, 2]], device=device), torch.ones(2, 2, dtype=torch.long, device=device)
    seen = []
    for token in (3, 4):
        completions = torch.tensor([[token, token], [5, 6]], device=device)
        packed = pack(prompt, ones, completions, ones, model.dtype)
        logits = model(
            input_ids=packed.input_ids,
            attention_mask=packed.mask,
            position_ids=packed.position_ids,
            use_cache=False,
        ).logits
        seen.append(logits[packed.line[1], packed.places[1]])
    if not torch.equal(*seen):
        raise RlError("share_prompts: this model lets completions on one line see each other; set it to false")
