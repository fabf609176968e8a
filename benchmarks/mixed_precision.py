"""Perplexity of the embedded model against average bits, for each way to choose the layers that keep more of them.

Real int8 and nf4 modules of bitsandbytes are measured, not rounded copies: an int8 layer rounds its inputs too. Every
layer is quantised once to every level, and the plans only put the modules in place. Equal plans are measured once.
"""

import math
import random
import time

import torch
from measure import show
from rich.progress import track

from krontune.adapters import load_base
from krontune.adapters.mixed import linears, put_back, quantised, sample_windows, score_layers, token_nll
from krontune.adapters.precision import assign_bits, importance
from krontune.recipes.rows import source_rows
from krontune.recipes.schema_sources import Shipped

SCORE_TOKENS, HELD_OUT_TOKENS, HELD_OUT_FROM = 1024, 2048, 4000
POINTS = [((16, 8, 4), bits) for bits in (4.0, 5.0, 6.0, 8.0, 16.0)] + [((16, 4), bits) for bits in (5.0, 6.0, 8.0)]
SEEDS = 3


def main() -> None:
    model, tokenizer = load_base("smollm2-135m", None, device="cpu")
    layers = list(model.model.layers)
    prose = [row["text"] for row in source_rows(Shipped(shipped="prose"), "prose")]
    held_out = sample_windows(prose[HELD_OUT_FROM:], tokenizer, HELD_OUT_TOKENS)

    orders, rows = {}, []
    for scorer in ("lim", "zd", "nll"):
        start = time.process_time()
        scores = score_layers(model, scorer, sample_windows(prose, tokenizer, SCORE_TOKENS), 4)
        orders[scorer] = importance(scorer, scores)
        rows.append([scorer, f"{time.process_time() - start:.0f}", *(f"{s:.4f}" for s in (min(scores), max(scores)))])
    for row in rows:
        ranks = [rank(orders[row[0]]), rank(orders["nll"])]
        row += [f"{torch.corrcoef(torch.tensor(ranks))[0, 1]:+.2f}", most(orders[row[0]])]
    show("scores of 30 layers", ["score", "CPU s", "least", "most", "rank corr. with nll", "5 most important"], rows)
    for scorer in list(orders):
        orders[f"{scorer} reversed"] = [-value for value in orders[scorer]]
    for seed in range(SEEDS):
        orders[f"random {seed}"] = random.Random(seed).sample(range(len(layers)), len(layers))

    modules = [{b: _at(layer, b, model.dtype) for b in (16, 8, 4)} for layer in layers]
    sizes = [sum(module.weight.numel() for module in linears(layer).values()) for layer in layers]
    plans = {
        (levels, bits, name): tuple(assign_bits(order, sizes, levels, bits))
        for levels, bits in POINTS
        for name, order in orders.items()
    }
    measured: dict[tuple[int, ...], torch.Tensor] = {}
    start = time.process_time()
    for plan in track(list(dict.fromkeys(plans.values())), description="plans"):
        for layer, bits, kinds in zip(layers, plan, modules, strict=True):
            put_back(layer, kinds[bits])
        measured[plan] = token_nll(model, held_out).flatten()
    seconds = time.process_time() - start
    columns = ["levels", "bits", "lim", "zd", "nll", "random (3 seeds)", "lim rev.", "zd rev.", "nll rev."]
    of = {key: measured[plan] for key, plan in plans.items()}
    table = [_perplexities(levels, bits, of) for levels, bits in POINTS]
    show(
        f"perplexity, {held_out.numel()} held-out tokens, {len(measured)} plans in {seconds:.0f} CPU s", columns, table
    )
    table = [_against_random(levels, bits, of) for levels, bits in POINTS if bits not in levels or len(levels) == 2]
    columns = ["levels", "bits", "lim", "zd", "nll", "lim rev.", "zd rev.", "nll rev."]
    show("loss minus the mean of the random orders, nats a token, with 95 % over tokens", columns, table)


def _at(layer: torch.nn.Module, bits: int, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    return {name: quantised(module, bits, dtype, "cpu") for name, module in linears(layer).items()}


def _perplexities(levels: tuple[int, ...], bits: float, of: dict) -> list[str]:
    value = {
        name: math.exp(float(losses.mean())) for (lev, b, name), losses in of.items() if (lev, b) == (levels, bits)
    }
    drawn = [value[f"random {seed}"] for seed in range(SEEDS)]
    spread = f"{sum(drawn) / SEEDS:.2f} ({min(drawn):.2f} to {max(drawn):.2f})"
    names = ("lim", "zd", "nll", None, "lim reversed", "zd reversed", "nll reversed")
    return [f"{list(levels)}", f"{bits:g}", *(spread if name is None else f"{value[name]:.2f}" for name in names)]


def _against_random(levels: tuple[int, ...], bits: float, of: dict) -> list[str]:
    drawn = torch.stack([of[levels, bits, f"random {seed}"] for seed in range(SEEDS)]).mean(0)
    cells = []
    for name in ("lim", "zd", "nll", "lim reversed", "zd reversed", "nll reversed"):
        difference = of[levels, bits, name] - drawn
        half = 1.96 * float(difference.std()) / len(difference) ** 0.5
        cells.append(f"{float(difference.mean()):+.3f} ± {half:.3f}")
    return [f"{list(levels)}", f"{bits:g}", *cells]


def rank(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def most(values: list[float]) -> str:
    return " ".join(str(i) for i in sorted(range(len(values)), key=lambda i: -values[i])[:5])


main()
