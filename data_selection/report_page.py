"""The page of `report.write_report`: one file of HTML with its pictures inside, for screens small and large and for
paper. Whatever comes from the data goes through `html.escape`."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Of a picture, in units of a letter's 13: the labels can be read where it is as wide as a phone.
WIDTH = 480
STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d5dbe3; --pool: #9aa7b8; --picked: #1767b5; --paper: #fff }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 58rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
       background: var(--paper) }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p, figcaption { color: var(--soft); margin: .3rem 0 } figure { margin: .5rem 0; break-inside: avoid }
svg { width: 100%; max-width: 42rem; height: auto; display: block }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: right; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
details { border-bottom: 1px solid var(--line); padding: .3rem 0 } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.4 ui-monospace, monospace; margin: .3rem 0 }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2rem }
@media print { body { max-width: none; font-size: 10pt; padding: 0 } h2 { break-after: avoid } }
"""


def page(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    title = f"{report['picked']:,} of {report['pool']:,} texts"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_made(report))}</p>",
        *(part for target in report["targets"] for part in _target(target, report["picked"])),
        "<h2>Lengths, in tokens</h2>",
        _length_picture(report["lengths"]),
        _length_table(report["lengths"]),
        *_source_part(report["sources"]),
        "<h2>Against other ways to pick as many</h2>",
        _table(["", "shared"], [[f"{o['of']} and {o['with']}", f"{o['share']:.1%}"] for o in report["overlap"]]),
        "<h2>Chosen texts</h2><p>The highest weights, then the lowest that were still chosen.</p>",
        *map(_text, report["chosen"]),
        "<h2>Refused texts</h2><p>The highest weights that were not chosen, then random ones.</p>",
        *map(_text, report["refused"]),
        "</body></html>",
    ]
    return "\n".join(parts)


def _made(report: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value is not None)
    details = ", ".join(f"{name} {value}" for name, value in report["details"].items())
    return f"Picked by {report['method']}, seed {report['seed']}; {settings}" + (f"; {details}" if details else "")


def _target(target: Mapping[str, Any], picked: int) -> list[str]:
    found = target["kl_reduction"]
    bars = [("random", found["random"]), ("this selection", found["picked"])]
    if found["oracle"] is not None:
        bars.append(("known right rows", found["oracle"]))
    bars.append(("no pick is higher", found["bound"]))
    parts = [
        f"<h2>Target: {escape(target['name'])}</h2>",
        f"<p>{target['picked']:,} of the {picked:,} picks.</p>" if target["picked"] != picked else "",
        "<figure>",
        _bars(bars, "{:.3f}"),
        "<figcaption>KL reduction, nats: how much nearer to the target than the pool. Five random picks lie between "
        f"{found['random_lowest']:.3f} and {found['random_highest']:.3f}.</figcaption></figure>",
    ]
    if target["histogram"] is not None:
        caption = "Share of the pool (grey) and of the picks (blue) by log weight."
        if target["without_ngrams"]:
            caption += f" {target['without_ngrams']:,} texts without a word are left out."
        parts += ["<figure>", _histogram(target["histogram"]), f"<figcaption>{caption}</figcaption></figure>"]
    if target["effective_size"] is not None:
        sizes = [[f"temperature {t}", f"{value:,.1f}"] for t, value in target["effective_size"].items()]
        parts += ["<h3>Effective sample size of the pool's weights</h3>", _table(["", "texts"], sizes)]
    parts += ['<div class="columns">']
    for side, title in (("for", "Weighed most for the picks"), ("against", "Weighed most against random texts")):
        rows = [
            [
                ngram["ngram"] + (f" (+{ngram['others_in_bucket']})" if ngram["others_in_bucket"] else ""),
                f"{ngram['log_ratio']:+.2f}",
                f"{1e3 * ngram['share_picked']:.2f}",
                f"{1e3 * ngram['share_random']:.2f}",
            ]
            for ngram in target["ngrams"][side]
        ]
        table = _table(["n-gram", "log ratio", "picks, per 1,000", "random, per 1,000"], rows)
        parts += [f"<div><h3>{title}</h3>", table, "</div>"]
    return [*parts, "</div>"]


def _source_part(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    if not sources:
        return []
    height = 34 * len(sources) + 10
    widest = max(max(s["share_pool"], s["share_picked"]) for s in sources) or 1.0
    body = []
    for number, source in enumerate(sources):
        top = 34 * number + 5
        body.append(f'<text x="0" y="{top + 17}">{escape(_short(source["source"], 17))}</text>')
        for offset, name in ((0, "pool"), (13, "picked")):
            share = source[f"share_{name}"]
            width = 290 * share / widest
            body.append(_box(130, top + offset, width, 11, name))
            label = f'<text x="{135 + width:.1f}" y="{top + offset + 10}" style="font-size:11px">{share:.1%}</text>'
            body.append(label)
    return [
        "<h2>Where the texts come from</h2><figure>",
        _svg(WIDTH, height, body, "Shares of each source in the pool and in the picks"),
        "<figcaption>Share of each source in the pool (grey) and in the picks (blue).</figcaption></figure>",
    ]


def _length_picture(lengths: Mapping[str, Mapping[str, float]]) -> str:
    longest = max(spread["p95"] for spread in lengths.values()) or 1.0
    body = []
    for number, (name, spread) in enumerate(lengths.items()):
        at = {key: 65 + 410 * value / longest for key, value in spread.items()}
        middle = 34 * number + 18
        color = "picked" if name == "picked" else "pool"
        body += [
            f'<text x="0" y="{middle + 4}">{escape(name)}</text>',
            f'<line x1="{at["p5"]:.1f}" x2="{at["p95"]:.1f}" y1="{middle}" y2="{middle}" stroke="var(--{color})"/>',
            _box(at["p25"], middle - 9, max(at["p75"] - at["p25"], 1), 18, color),
            f'<line x1="{at["p50"]:.1f}" x2="{at["p50"]:.1f}" y1="{middle - 9}" y2="{middle + 9}" '
            'stroke="var(--ink)" stroke-width="2"/>',
        ]
    picture = _svg(WIDTH, 34 * len(lengths) + 4, body, "Lengths of texts")
    caption = "Box: the middle half, with the median; line: all but the shortest and longest twentieth."
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _length_table(lengths: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(next(iter(lengths.values())))
    rows = [[name, *(f"{spread[column]:,.0f}" for column in columns)] for name, spread in lengths.items()]
    return _table(["", *columns], rows)


def _histogram(histogram: Mapping[str, Sequence[float]]) -> str:
    edges, highest = histogram["edges"], max(*histogram["pool"], *histogram["picked"], 1e-9)
    width = (WIDTH - 10) / len(histogram["pool"])
    body = []
    for number, (pool, picked) in enumerate(zip(histogram["pool"], histogram["picked"], strict=True)):
        for value, name, left, wide in ((pool, "pool", 0.0, 0.96), (picked, "picked", 0.24, 0.48)):
            height = 150 * value / highest
            body.append(_box(5 + width * (number + left), 155 - height, wide * width, height, name))
    for number in (0, len(edges) // 2, len(edges) - 1):
        anchor = ("start", "middle", "end")[(number > 0) + (number == len(edges) - 1)]
        x = 5 + width * number
        body.append(f'<text x="{x:.1f}" y="173" text-anchor="{anchor}">{edges[number]:.3g}</text>')
    body.append(f'<line x1="5" x2="{WIDTH - 5}" y1="155.5" y2="155.5" stroke="var(--ink)"/>')
    return _svg(WIDTH, 180, body, "Histogram of log weights")


def _bars(bars: Sequence[tuple[str, float]], form: str) -> str:
    """Horizontal bars from a common zero; values may be negative."""
    low, high = min(0.0, *(v for _, v in bars)), max(0.0, *(v for _, v in bars))
    scale = 295 / ((high - low) or 1.0)
    zero = 135 - low * scale
    body = []
    for number, (name, value) in enumerate(bars):
        top = 26 * number + 4
        body += [
            f'<text x="0" y="{top + 14}">{escape(name)}</text>',
            _box(
                min(zero, zero + value * scale),
                top,
                abs(value) * scale,
                18,
                "picked" if name == "this selection" else "pool",
            ),
            f'<text x="{max(zero, zero + value * scale) + 6:.1f}" y="{top + 14}">{form.format(value)}</text>',
        ]
    body.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{26 * len(bars) + 4}" stroke="var(--ink)"/>')
    return _svg(WIDTH, 26 * len(bars) + 6, body, "KL reduction")


def _box(left: float, top: float, width: float, height: float, name: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="var(--{name})"/>'


def _svg(width: int, height: int, body: Sequence[str], label: str) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return opening + "".join(body) + "</svg>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="scroll"><table>{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _text(example: Mapping[str, Any]) -> str:
    weight = "no word" if example["log_weight"] is None else f"log weight {example['log_weight']:.3g}"
    source = f", {example['source']}" if example["source"] else ""
    head = f"row {example['row']:,}, {weight}, {example['tokens']:,} tokens{source}"
    text = example["text"] + (" ..." if example["cut"] else "")
    return f"<details open><summary>{escape(head)}</summary><pre>{escape(text)}</pre></details>"


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else "..." + name[-(length - 3) :]
