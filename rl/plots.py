"""Pictures of one completion: WAAD and FAI under its tokens, and which of them token credit takes."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .errors import RlError

if TYPE_CHECKING:
    from torch import Tensor

    from .credit import TokenCredit

_CHAR, _PAD, _LINE, _BAR, _TOP = 7.3, 5.0, 74.0, 16.0, 46.0  # pixels; a line is a row of tokens with two rows of bars
_WAAD, _FAI, _ANCHOR, _PREPLAN = "#3b6fb6", "#c2571a", "#fbe3cf", "#3b6fb6"


def rhythm_svg(
    tokens: Sequence[str],
    waad: "Sequence[float] | Tensor",
    fai: "Sequence[float] | Tensor",
    *,
    anchors: "Sequence[bool] | Tensor | None" = None,
    preplan: "Sequence[bool] | Tensor | None" = None,
    gamma: "Sequence[float] | Tensor | None" = None,
    width: int = 960,
    title: str = "",
) -> str:
    """An SVG picture of T tokens in rows: under each token a bar of its WAAD and one of its FAI.

    Args:
        tokens: T texts, as the tokenizer decodes them; escaped here, line breaks and tabs shown as signs.
        waad, fai: T numbers. A full bar is the largest of the T.
        anchors: which to shade. preplan: which to underline. None marks none.
        gamma: shown, with the numbers, where the mouse rests on a token.
        width: pixels; longer completions take more rows.

    Returns:
        The text of a complete `<svg>` element, without scripts or outside references, to be saved or put in HTML.

    Raises:
        RlError: sequences of different lengths, or none; a width in which nothing fits.
    """
    columns = {"waad": waad, "fai": fai, "anchors": anchors, "preplan": preplan, "gamma": gamma}
    values = {name: [float(x) for x in column] for name, column in columns.items() if column is not None}
    for name, column in values.items():
        if len(column) != len(tokens):
            raise RlError(f"{name} has {len(column)} values for {len(tokens)} tokens")
    if not tokens or width < 200:
        raise RlError(f"a picture needs a token and a width of 200 pixels or more, got {len(tokens)} and {width}")
    highest = {name: max(*values[name], 1e-12) for name in ("waad", "fai")}
    parts, x, y = [], _PAD, _TOP
    for at, token in enumerate(tokens):
        text = _shown(token)
        wide = max(len(text), 1) * _CHAR + _PAD
        if x + wide > width and x > _PAD:
            x, y = _PAD, y + _LINE
        numbers = {name: column[at] for name, column in values.items()}
        parts.append(_token(text, numbers, highest, x, y, wide))
        x += wide
    height = y + _LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" font-family="monospace" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{_legend(title, highest)}{"".join(parts)}</svg>'
    )


def draw_completion(
    model: Any,
    tokenizer: Any,
    prompt: str,
    completion: str,
    credit: "TokenCredit | None" = None,
    *,
    width: int = 960,
    title: str = "",
) -> str:
    """`rhythm_svg` of what the model's attention says about a completion, with one forward.

    Heads are split by this one completion (`TokenCredit.head_split` of a run averages over many). The prompt is text
    as the model gets it, chat template included; no special tokens are added. Gamma is what a response with a credited
    advantage would get; with the strategy "entropy" it is not shown.

    Raises:
        RlError: a completion without tokens; attention that cannot be read, see `probe`.
    """
    import torch

    from .credit import TokenCredit, anchor_tokens, preplan_tokens, token_credit
    from .heads import pool, split_heads
    from .probe import read_rhythm

    credit = credit or TokenCredit()
    device = next(model.parameters()).device
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    if not after:
        raise RlError("the completion has no token to draw")
    ids = torch.tensor([before + after], device=device)
    response = torch.zeros_like(ids)
    response[:, len(before) :] = 1
    options = {"window": credit.window, "horizon": credit.horizon, "backend": credit.backend}
    rhythms = read_rhythm(model, ids, torch.ones_like(ids), response, credit.layers, **options)
    spans = {layer: rhythm.span[0] for layer, rhythm in rhythms.items() if rhythm.span is not None}
    waad, fai = pool(rhythms, split_heads(spans, credit.head_quantile))
    excluded = torch.isin(ids, torch.tensor(credit.exclude_ids, device=device))
    marks = {
        "anchors": anchor_tokens(fai, response, credit.horizon, credit.top_q, excluded),
        "preplan": preplan_tokens(waad, response, credit.top_q, excluded),
    }
    if credit.strategy != "entropy":
        marks["gamma"] = token_credit(waad, fai, response, credit, excluded=excluded)
    shown = {name: mark[0, len(before) :] for name, mark in marks.items()}
    texts = [tokenizer.decode([token]) for token in after]
    return rhythm_svg(texts, waad[0, len(before) :], fai[0, len(before) :], width=width, title=title, **shown)


def _token(text: str, numbers: dict[str, float], highest: dict[str, float], x: float, y: float, wide: float) -> str:
    """One token at (x, y), its marks and its two bars."""
    told = ", ".join(f"{name} {numbers[name]:.3g}" for name in ("waad", "fai", "gamma") if name in numbers)
    shapes = []
    if numbers.get("anchors"):
        shapes.append(
            f'<rect class="anchor" x="{x:.1f}" y="{y - 12:.1f}" width="{wide:.1f}" height="16" fill="{_ANCHOR}"/>'
        )
    if numbers.get("preplan"):
        shapes.append(
            f'<line class="preplan" x1="{x:.1f}" x2="{x + wide - _PAD:.1f}" y1="{y + 4:.1f}" y2="{y + 4:.1f}" '
            f'stroke="{_PREPLAN}" stroke-width="2"/>'
        )
    for row, (name, colour) in enumerate((("waad", _WAAD), ("fai", _FAI))):
        size = _BAR * max(numbers[name], 0.0) / highest[name]
        bottom = y + 8 + (row + 1) * (_BAR + 3)
        shapes.append(
            f'<rect x="{x:.1f}" y="{bottom - size:.1f}" width="{wide - 2:.1f}" height="{size:.1f}" fill="{colour}"/>'
        )
    label = f'<text x="{x:.1f}" y="{y:.1f}" xml:space="preserve">{escape(text)}</text>'
    return f"<g><title>{escape(f'{text}: {told}')}</title>{''.join(shapes)}{label}</g>"


def _legend(title: str, highest: dict[str, float]) -> str:
    return (
        f'<text x="{_PAD}" y="16" font-weight="bold">{escape(title)}</text><g font-size="11">'
        f'<text x="{_PAD}" y="30"><tspan fill="{_WAAD}">bars: WAAD to {highest["waad"]:.3g}</tspan>, '
        f'<tspan fill="{_FAI}">FAI to {highest["fai"]:.3g}</tspan>; shaded: anchor; underlined: preplan</text></g>'
    )


def _shown(token: str) -> str:
    """The token's text on one line, and without what XML forbids."""
    visible = token.replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "\ufffd" for c in visible)
