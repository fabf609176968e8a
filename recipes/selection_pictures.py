"""What Adapt-inf picked, as pictures: its clusters on a plane, the budget of each, and the scores of pool and picks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data_selection import Selection, Store
from ..data_selection.clusters import unit_rows
from ..data_selection.selection import top_k, uniform_noise
from ..rl.checks.svg import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, frame, text

PICTURES = "pictures.json"
POINTS = 1200  # that are drawn
COLUMNS = 40  # of a histogram
MOST_BARS = 16
GREY = "#c4c9d0"
DRAW_STREAM = 41  # of random numbers, apart from those of the selection


def picture_numbers(store: Store, picked: Selection) -> dict[str, Any]:
    """The numbers that the pictures are drawn from, plain values.

    `points`: x, y and selector ("" for a row that was not picked) of a random part of the rows, half of them picks
    where there are as many; `clusters`: as in the selection's details; `scores`: by name the ends of the histogram and
    its counts over the pool and over the picks. Values beyond the 1st and 99th percentile of the pool are in its ends.
    """
    usable = np.flatnonzero(np.all([np.isfinite(values) for values in store.scores.values()], axis=0))
    others = np.setdiff1d(usable, picked.indices)
    chosen = _some(picked.indices, max(POINTS // 2, POINTS - len(others)), picked.seed)
    rest = _some(others, POINTS - len(chosen), picked.seed)
    selectors = dict(zip(picked.indices.tolist(), (str(r["selector"]) for r in picked.reasons), strict=True))
    rows = np.concatenate([rest, chosen])
    flat = _plane(store.vectors, rows)
    points = [[*xy, selectors.get(row, "")] for xy, row in zip(flat.round(4).tolist(), rows.tolist(), strict=True)]
    scores = {name: _histogram(values[usable], values[picked.indices]) for name, values in store.scores.items()}
    return {"points": points, "clusters": picked.details["clusters"], "scores": scores}


def _some(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    return rows[top_k(uniform_noise(seed, len(rows), DRAW_STREAM), most)] if len(rows) > most else rows


def _plane(vectors: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 2) the first two principal components of some rows, as directions; of n rows alone, so that the length of the
    vectors does not matter."""
    units = unit_rows(vectors[np.sort(rows)])[np.argsort(np.argsort(rows))].astype(np.float64)
    units -= units.mean(axis=0)
    values, axes = np.linalg.eigh(units @ units.T)
    found = axes[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _histogram(pool: NDArray[np.float64], picked: NDArray[np.float64]) -> dict[str, Any]:
    low, high = np.percentile(pool, [1, 99]).tolist()
    edges = np.linspace(low, high if high > low else low + 1.0, COLUMNS + 1)
    counts = [np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0].tolist() for part in (pool, picked)]
    return {"low": float(edges[0]), "high": float(edges[-1]), "pool": counts[0], "picked": counts[1]}


def selection_pictures(folder: Path) -> list[str]:
    """The pictures as SVG; none where the folder of the select stage holds no numbers for them, or damaged ones."""
    try:
        numbers = json.loads((folder / PICTURES).read_text(encoding="utf-8"))
        clusters = numbers["clusters"]
        names = list(dict.fromkeys(str(one["selector"]) for one in clusters))
        colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
        return [
            scatter("gradients, by the selector of their cluster", numbers["points"], colours),
            budget_bars("picks and rows of each cluster", clusters, colours),
            *(histogram(f"score: {name}", one) for name, one in numbers["scores"].items()),
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []


def scatter(title: str, points: Sequence[Sequence[Any]], colours: Mapping[str, str]) -> str:
    """Points (x, y, name), in the colour of the name; one whose name has none is grey and lies below."""
    xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
    (left, right), (low, high) = ((min(v), max(v)) for v in (xs, ys))
    parts = []
    for x, y, (*_, name) in sorted(zip(xs, ys, points, strict=True), key=lambda one: one[2][2] in colours):
        across = LEFT + (x - left) / (right - left or 1) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM)
        # A square of a path: a page may hold thousands.
        parts.append(f'<path d="M{across:.1f} {down:.1f}h3v3h-3z" fill="{colours.get(name, GREY)}" opacity="0.7"/>')
    for number, (name, colour) in enumerate([*colours.items(), ("not picked", "#8a919b")]):
        parts.append(text(WIDTH - RIGHT + 8, TOP + 8 + 15 * number, name, colour))
    return frame(title, parts)


def budget_bars(title: str, clusters: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """A cluster a line: its rows as a light bar, its picks as a dark one, in the colour of its selector. Of many
    clusters the largest."""
    shown = sorted(clusters, key=lambda one: -int(one["rows"]))[:MOST_BARS]
    step = (HEIGHT - TOP - 10) / max(1, len(shown))
    scale = (WIDTH - RIGHT - 70) / max(1, *(int(one["rows"]) for one in shown))
    parts = []
    for number, one in enumerate(shown):
        y, colour = TOP + number * step, colours[str(one["selector"])]
        rows, share = int(one["rows"]), int(one["share"])
        parts.append(text(4, y + step * 0.65, f"cluster {int(one['cluster'])}", "#333333"))
        for length, opacity in ((rows, 0.25), (share, 1.0)):
            shape = f'x="70" y="{y + 1:.1f}" width="{length * scale:.1f}" height="{step * 0.75:.1f}"'
            parts.append(f'<rect {shape} fill="{colour}" opacity="{opacity}"/>')
        said = f"{share} of {rows}, {one['selector']}"
        parts.append(text(WIDTH - RIGHT + 8, y + step * 0.65, said, "#333333"))
    if len(clusters) > len(shown):
        parts.append(text(WIDTH - RIGHT + 8, 14, f"{len(shown)} of {len(clusters)}", "#555555"))
    return frame(title, parts)


def histogram(title: str, counts: Mapping[str, Any]) -> str:
    """Shares of the pool, filled, and of the picks, as a line, over the same columns."""
    low, high, base = float(counts["low"]), float(counts["high"]), HEIGHT - BOTTOM
    shares = {}
    for name in ("pool", "picked"):
        values = [int(count) for count in counts[name]]
        shares[name] = [value / max(1, sum(values)) for value in values]
    tallest = max(max(values) for values in shares.values()) or 1.0
    width = (WIDTH - LEFT - RIGHT) / len(shares["pool"])
    paths = {}
    for name, values in shares.items():
        heights = [base - value / tallest * (base - TOP) for value in values]
        paths[name] = f"M{LEFT} {base}" + "".join(f"V{height:.1f}h{width:.2f}" for height in heights) + f"V{base}"
    return frame(
        title,
        [
            f'<path d="{paths["pool"]}z" fill="{GREY}"/>',
            f'<path d="{paths["picked"]}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>',
            text(LEFT, base + 14, f"{low:.3g}", "#555555"),
            text(WIDTH - RIGHT - 30, base + 14, f"{high:.3g}", "#555555"),
            text(4, TOP + 8, f"{tallest:.2g}", "#555555"),
            text(WIDTH - RIGHT + 8, TOP + 8, "pool", "#8a919b"),
            text(WIDTH - RIGHT + 8, TOP + 23, "picks", COLOURS[0]),
        ],
    )
