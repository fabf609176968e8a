"""Pictures of check results as inline SVG, without a plotting library."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .result import CheckResult

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 520, 260, 46, 34, 28, 130
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e5ea2", "#d98300", "#5d6d7e", "#16a3a3", "#a0522d", "#777777")
Points = Sequence[tuple[float, float]]


def pictures(
    results: Sequence[CheckResult], logs: Sequence[Mapping[str, Any]] = (), task: str | None = None
) -> dict[str, str]:
    """SVG by name: attribution, size_ladder, pass_at_k for the checks among `results`, and reward, gap from `logs`.

    logs: entries of the trainer's log. task: the name that its metrics start with, for the gap.
    """
    found = {}
    for result in results:
        if result.verdict != "not run" and result.name in _DRAWN:
            name, draw = _DRAWN[result.name]
            found[name] = draw(result)
    for name, key in (("reward", "reward"), ("gap", f"{task}/gap")):
        points = [(float(log.get("step", i)), float(log[key])) for i, log in enumerate(logs) if key in log]
        if len(points) > 1:
            found[name] = lines(name, {key: points}, "step")
    return found


def lines(title: str, series: Mapping[str, Points], x_name: str, bands: Mapping[str, Any] | None = None) -> str:
    """Curves over x. bands: name -> [(x, low, high)], drawn as a light area in the curve's colour."""
    bands = bands or {}
    every = [point for points in series.values() for point in points]
    tall = [y for _, y in every] + [y for band in bands.values() for _, *ends in band for y in ends]
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low, y_high = min(0.0, *tall), max(1e-9, *tall)
    y_high = 1.0 if 0.5 < y_high <= 1.0 else y_high

    def at(x: float, y: float) -> str:
        across = (x - x_low) / (x_high - x_low or 1) * (WIDTH - LEFT - RIGHT)
        up = (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + across:.1f},{HEIGHT - BOTTOM - up:.1f}"

    parts = [_axes(x_name, (x_low, x_high), (y_low, y_high))]
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        if name in bands:
            edge = [at(x, low) for x, low, _ in bands[name]] + [at(x, high) for x, _, high in reversed(bands[name])]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(text(WIDTH - RIGHT + 8, TOP + 8 + 15 * number, name, colour))
    return frame(title, parts)


def bars(title: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """Horizontal bars from 0 to 1: name -> (value, low, high), the interval as a thin line."""
    parts = []
    step = (HEIGHT - TOP - 10) / max(1, len(values))
    scale = WIDTH - RIGHT - 80
    for number, (name, (value, low, high)) in enumerate(values.items()):
        y = TOP + number * step
        width = max(0.0, value) * scale
        parts.append(text(4, y + step * 0.65, name, "#333333"))
        fill = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{RIGHT}" y="{y + 2:.1f}" width="{width:.1f}" height="{step * 0.7:.1f}" fill="{fill}"/>')
        middle = y + 2 + step * 0.35
        ends = f'x1="{RIGHT + low * scale:.1f}" x2="{RIGHT + high * scale:.1f}"'
        parts.append(f'<line {ends} y1="{middle:.1f}" y2="{middle:.1f}" stroke="#222222"/>')
        parts.append(text(RIGHT + max(width, high * scale) + 6, y + step * 0.65, f"{value:.2f}", "#333333"))
    return frame(title, parts)


def _attribution(result: CheckResult) -> str:
    weights, ends = result.details["weights"], result.details["intervals"]
    return bars("whose answers: shares by source", {name: (weights[name], *ends[name]) for name in ends})


def _ladder(result: CheckResult) -> str:
    sizes, own = result.details["sizes"], result.details["accuracy"]
    series = {"model": [(size, point["value"]) for size, point in zip(sizes, own, strict=True)]}
    for name, curve in result.details["heuristics"].items():
        series[name] = list(zip(sizes, curve, strict=True))
    band = [(size, *point["ci"]) for size, point in zip(sizes, own, strict=True)]
    return lines("certificate accuracy by size", series, "n", {"model": band})


def _pass(result: CheckResult) -> str:
    ks = result.details["k"]
    series, bands = {}, {}
    for name in ("base", "tuned"):
        curve = result.details[name]
        series[name] = list(zip(ks, curve["value"], strict=True))
        bands[name] = list(zip(ks, curve["low"], curve["high"], strict=True))
    return lines("pass@k", series, "k", bands)


_DRAWN = {
    "attribution": ("attribution", _attribution),
    "size_ladder": ("size_ladder", _ladder),
    "base_vs_tuned": ("pass_at_k", _pass),
}


def frame(title: str, parts: Sequence[str]) -> str:
    """A picture of WIDTH by HEIGHT with its title."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}" font-family="sans-serif" font-size="11">'
    )
    return "".join((head, text(LEFT, 14, title, "#111111"), *parts, "</svg>"))


def _axes(x_name: str, x_ends: tuple[float, float], y_ends: tuple[float, float]) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    return "".join(
        (
            f'<path d="M{LEFT} {TOP}V{base}H{right}" fill="none" stroke="#888888"/>',
            text(LEFT, base + 14, f"{x_ends[0]:g}", "#555555"),
            text(right - 20, base + 14, f"{x_ends[1]:g}", "#555555"),
            text((LEFT + right) / 2, base + 28, x_name, "#555555"),
            text(4, base, f"{y_ends[0]:.2g}", "#555555"),
            text(4, TOP + 8, f"{y_ends[1]:.2g}", "#555555"),
        )
    )


def text(x: float, y: float, words: str, colour: str) -> str:
    """Words that begin at a point, escaped."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{escape(words)}</text>'
