"""Held-out loss and accuracy against trained parameters: MoKA, its ablations, LoRA and LoKr on equal steps and tokens.

    python benchmarks/moka_quality.py --out benchmarks/results/moka_quality.jsonl     # goes on where it was stopped
    python benchmarks/moka_quality.py --out ... --table --markdown --picture docs/moka_quality.svg

The base is SmolLM2-135M in NF4, its packed layers replaced by the de-quantised weights in bfloat16: the same numbers,
faster on a CPU. Two tasks: `prose`, Newton's Opticks from the shipped text, by held-out loss; and `lis`, worked
longest-increasing-subsequence puzzles, by held-out loss of the answers and greedy certificate accuracy. The puzzle's
table alone is the prompt, which the instructions would make three times as long.

An arm is trained at learning rates a factor of about two apart until four are done and the best by held-out loss has
a worse one on either side, all on seed 0, and then on further seeds at its best rate. A seed fixes the adapter's start
and the order of the training rows, which is the same for all arms. Each finished run is one line of the file.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from measure import machine, show
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from scipy.stats import t as student
from torch import nn
from transformers import set_seed

from krontune.adapters import MokaConfig, load_base
from krontune.rl import get_task

RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MAX_NEW = 40
HELD_OUT = 96  # puzzles
PROSE_ROWS = 32  # of held-out prose


@dataclass(frozen=True)
class Arm:
    """A method with its options; `first` is the learning rate at which the search begins."""

    method: type[PeftConfig]
    options: dict[str, Any] = field(default_factory=dict)
    first: float = 1e-2

    def config(self) -> PeftConfig:
        return self.method(**{"target_modules": ["q_proj", "v_proj"], **self.options})


def lora(r: int, **options: Any) -> Arm:
    return Arm(LoraConfig, {"r": r, "lora_alpha": 2 * r, **options})


def moka(r: int, **options: Any) -> Arm:
    return Arm(MokaConfig, {"r": r, **options})


ARMS: dict[str, Arm] = {
    **{f"LoRA r={r}": lora(r) for r in (1, 4, 10, 32)},
    **{f"balanced r={r}": moka(r) for r in (1, 4, 10, 20)},
    **{f"ladder r={r}": moka(r, shapes="ladder") for r in (1, 4, 10, 20)},
    "ladder r=10, gate none": moka(10, shapes="ladder", gate="none"),
    "balanced r=10, gate none": moka(10, gate="none"),
    "MoKA_s r=5": moka(5, identity="A"),
    "LoKr": Arm(LoKrConfig, {"r": 64, "alpha": 64, "decompose_factor": -1}),
}


class Prose:
    """Paragraphs of one book, end to end, cut into rows of equal length; the first rows are held out."""

    name = "prose"

    def __init__(self, tokenizer: Any, rows: int, length: int) -> None:
        self.rows = rows
        text = gzip.decompress((files("krontune.recipes.data") / "prose.jsonl.gz").read_bytes()).decode()
        book = [line["text"] for line in map(json.loads, text.splitlines()) if line["source"] == "newton"]
        ids = [token for paragraph in book for token in [*tokenizer(paragraph).input_ids, tokenizer.eos_token_id]]
        cut = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        self.held_out, self.train = cut[:PROSE_ROWS], cut[PROSE_ROWS:]

    def batches(self, steps: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        order = random.Random(seed).sample(range(len(self.train)), steps * self.rows)
        return [(batch, batch) for batch in self.train[order].split(self.rows)]

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"loss": held_out_loss(model, [(part, part) for part in self.held_out.split(8)])}


class Puzzles:
    """Tables of 3 to 5 values with their longest increasing subsequence written out; only the answer is learned."""

    name = "lis"

    def __init__(self, tokenizer: Any, rows: int, length: int) -> None:
        self.rows, self.tokenizer, self.task = rows, tokenizer, get_task("lis")
        self.test = self.task.instances(HELD_OUT, [3, 5], 0, "test")
        answers = [self.task.completion(item) for item in self.test]
        self.held_out = [self._batch(*zip(*part, strict=True)) for part in self._parts(answers)]

    def _parts(self, answers: list[str]) -> list[list[tuple[Any, str]]]:
        pairs = list(zip(self.test, answers, strict=True))
        return [pairs[start : start + 16] for start in range(0, len(pairs), 16)]

    def _prompt(self, item: Any) -> str:
        table = "\n".join(line for line in self.task.prompt(item).splitlines() if "|" in line)
        return f"{table}\n"

    def _batch(self, items: Any, answers: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pad = self.tokenizer.eos_token_id
        prompts = [self.tokenizer(self._prompt(item)).input_ids for item in items]
        full = [p + [*self.tokenizer(answer).input_ids, pad] for p, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, full))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in full])
        labels = torch.full_like(ids, -100)
        for row, (prompt, whole) in enumerate(zip(prompts, full, strict=True)):
            labels[row, len(prompt) : len(whole)] = ids[row, len(prompt) : len(whole)]
        return ids, labels

    def batches(self, steps: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        items = self.task.instances(steps * self.rows, [3, 5], seed + 1000, "train")
        answers = [self.task.completion(item) for item in items]
        starts = range(0, len(items), self.rows)
        return [self._batch(items[start : start + self.rows], answers[start : start + self.rows]) for start in starts]

    def evaluate(self, model: Any) -> dict[str, float]:
        marks = zip(self.test, self._answers(model), strict=True)
        right = [self.task.mark(item, text) for item, text in marks]
        accuracy = statistics.mean(bool(mark.check and mark.check.optimal) for mark in right)
        return {"loss": held_out_loss(model, self.held_out), "accuracy": accuracy}

    @torch.no_grad()
    def _answers(self, model: Any) -> list[str]:
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer([self._prompt(item) for item in self.test], padding=True, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=MAX_NEW, do_sample=False, temperature=None, top_p=None)
        return self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


TASKS: dict[str, Any] = {"prose": Prose, "lis": Puzzles}


def plain_nf4_base() -> tuple[Any, Any]:
    base: Any
    base, tokenizer = load_base("smollm2-135m", "nf4", attn_implementation="eager")
    for name, packed in list(base.named_modules()):
        if isinstance(packed, Linear4bit):
            weight = dequantize_module_weight(packed).to(torch.bfloat16)
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer)
    del base.config.quantization_config
    base.is_loaded_in_4bit = base.is_quantized = False
    base.hf_quantizer = base.quantization_method = None
    return base, tokenizer


def answer_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed loss and number of labels. Logits are computed where there is a label, as they are half the memory."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    logits = causal.lm_head(hidden[wanted]).float()
    return nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum"), int(wanted.sum())


@torch.no_grad()
def held_out_loss(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    losses, counts = zip(*(answer_loss(model, *batch) for batch in batches), strict=True)
    return float(sum(losses)) / sum(counts)


def train(base: Any, task: Any, arm: Arm, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run. The base is as it was afterwards."""
    set_seed(seed)
    model: Any = get_peft_model(base, arm.config())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    begun, train_loss = time.perf_counter(), []
    for batch in task.batches(steps, seed):
        summed, count = answer_loss(model, *batch)
        loss = summed / count
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        train_loss.append(loss.item())
    seconds = time.perf_counter() - begun
    model.eval()
    result = task.evaluate(model) if len(train_loss) == steps else {"loss": math.inf, "accuracy": 0.0}
    model.unload()
    return {
        **result,
        "parameters": sum(p.numel() for p in weights),
        "train_loss": statistics.mean(train_loss[-5:]) if train_loss else math.inf,
        "seconds": round(seconds, 1),
    }


def next_rate(done: dict[float, float], first: float) -> float | None:
    """The next learning rate to try given the losses so far; None once the best of at least four lies inside."""
    tried = {place: done[rate] for place, rate in enumerate(RATES) if rate in done}
    begin = RATES.index(first)
    wanted = [begin, begin - 1, begin + 1]
    if all(place in tried for place in wanted):
        best = min(tried, key=lambda place: tried[place])
        wanted = [best - 1, best + 1]
        if len(tried) < 4:
            wanted += sorted((min(tried) - 1, max(tried) + 1), key=lambda place: abs(place - best))
    return next((RATES[place] for place in wanted if 0 <= place < len(RATES) and place not in tried), None)


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


class Results:
    """The file of finished runs, those of one set of settings."""

    def __init__(self, path: Path, settings: dict[str, int]) -> None:
        self.path, self.settings = path, settings
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.lines = [line for line in lines if line["settings"] == settings]

    def add(self, line: dict[str, Any]) -> None:
        line = {**line, "settings": self.settings, "machine": machine()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        self.lines.append(line)

    def of(self, task: str, arm: str, seed: int | None = None) -> list[dict[str, Any]]:
        return [x for x in self.lines if (x["task"], x["arm"]) == (task, arm) and seed in (None, x["seed"])]

    def losses(self, task: str, arm: str) -> dict[float, float]:
        return {line["rate"]: line["loss"] for line in self.of(task, arm, 0)}

    def best(self, task: str, arm: str) -> tuple[float, list[dict[str, Any]]] | None:
        """The best learning rate of seed 0 and the runs at it, of all seeds."""
        losses = self.losses(task, arm)
        if not losses:
            return None
        rate = min(losses, key=lambda rate: losses[rate])
        return rate, sorted((x for x in self.of(task, arm) if x["rate"] == rate), key=lambda x: x["seed"])


def gap(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> str:
    """Mean difference seed by seed, with its interval."""
    other = {x["seed"]: x[key] for x in theirs}
    pairs = [x[key] - other[x["seed"]] for x in mine if x["seed"] in other]
    return interval(pairs) if pairs else ""


def table(results: Results, task: str, reference: str) -> tuple[list[str], list[list[str]]]:
    puzzles = task == "lis"
    columns = ["arm", "trained", "rate", "seeds", "held-out loss", f"minus {reference}"]
    columns += ["accuracy, greedy"] * puzzles + ["other rates, seed 0", "s"]
    rows, against = [], results.best(task, reference)
    for name in ARMS:
        found = results.best(task, name)
        if found is None:
            continue
        rate, runs = found
        tried = sorted((r, loss) for r, loss in results.losses(task, name).items() if r != rate)
        row = [name, f"{runs[0]['parameters']:,}", f"{rate:g}", str(len(runs)), interval([x["loss"] for x in runs])]
        row.append(gap(runs, against[1], "loss") if against and name != reference else "")
        row += [interval([x["accuracy"] for x in runs])] if puzzles else []
        row.append(", ".join(f"{r:g}: {loss:.3f}" for r, loss in tried))
        rows.append([*row, f"{statistics.median(x['seconds'] for x in runs):.0f}"])
    return columns, rows


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


FAMILIES = {"LoRA": "#c2571a", "balanced": "#3b6fb6", "ladder": "#2e8b57", "other": "#777777"}


def picture(results: Results) -> str:
    """Held-out loss against trained parameters (log scale), a panel a task: the mean and every seed."""
    wide, high, left, top = 430, 300, 60, 40
    panels = [task for task in TASKS if any(results.best(task, name) for name in ARMS)]
    parts = []
    for number, task in enumerate(panels):
        found = {name: best[1] for name in ARMS if (best := results.best(task, name))}
        losses = [x["loss"] for runs in found.values() for x in runs]
        sizes = [math.log10(runs[0]["parameters"]) for runs in found.values()]
        low, span = min(losses), max(max(losses) - min(losses), 1e-3)
        small, reach = min(sizes), max(max(sizes) - min(sizes), 1e-3)
        x0 = left + number * (wide + left)

        def x_of(size: float, x0: float = x0, small: float = small, reach: float = reach) -> float:
            return x0 + 20 + (math.log10(size) - small) / reach * (wide - 100)

        def y_of(loss: float, low: float = low, span: float = span) -> float:
            return top + high - 20 - (loss - low) / span * (high - 40)

        parts.append(f'<rect x="{x0}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{x0}" y="{top - 12}" font-weight="bold">{task}: held-out loss</text>')
        for loss in (low, low + span / 2, low + span):
            parts.append(f'<text x="{x0 - 6}" y="{y_of(loss) + 4:.1f}" text-anchor="end">{loss:.3f}</text>')
        for size in (10**small, 10 ** (small + reach)):
            at = f'x="{x_of(size):.1f}" y="{top + high + 16}"'
            parts.append(f'<text {at} text-anchor="middle">{size:,.0f}</text>')
        parts.append(f'<text x="{x0 + wide / 2}" y="{top + high + 16}" text-anchor="middle">trained parameters</text>')
        for family, colour in FAMILIES.items():
            curve = [(name, runs) for name, runs in found.items() if family_of(name) == family]
            dots = sorted((x_of(runs[0]["parameters"]), y_of(mean_loss(runs)), name, runs) for name, runs in curve)
            if family != "other":
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in dots)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
            for x, y, name, runs in dots:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
                parts += [
                    f'<circle cx="{x:.1f}" cy="{y_of(run["loss"]):.1f}" r="2" fill="none" stroke="{colour}"/>'
                    for run in runs
                ]
                parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}" fill="{colour}">{name}</text>')
    size = f'width="{len(panels) * (wide + left) + 20}" height="{top + high + 30}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n{body}\n</svg>\n'


def family_of(name: str) -> str:
    """The curve that an arm stands on: "LoRA r=4" and "ladder r=4" do, ablations do not."""
    method, _, rest = name.partition(" r=")
    return method if rest.isdigit() and method in FAMILIES else "other"


def mean_loss(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(run["loss"] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of MoKA, LoRA and LoKr on equal steps and tokens.")
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs, one JSON line each")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--length", type=int, default=64, help="tokens a row of prose")
    parser.add_argument("--reference", default="LoRA r=10", choices=list(ARMS), metavar="ARM")
    parser.add_argument("--table", action="store_true", help="print the finished runs and stop")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--picture", type=Path, help="write the curves as an SVG file")
    options = parser.parse_args()
    results = Results(options.out, {name: getattr(options, name) for name in ("steps", "rows", "length")})
    if not options.table:
        measure(results, options)
    for task in options.tasks:
        columns, rows = table(results, task, options.reference)
        if not rows:
            continue
        if options.markdown:
            print(markdown(task, columns, rows))
        else:
            show(f"{task}: {results.settings}", columns, rows)
    if options.picture:
        options.picture.write_text(picture(results))


def measure(results: Results, options: argparse.Namespace) -> None:
    base, tokenizer = plain_nf4_base()
    tasks = {name: TASKS[name](tokenizer, options.rows, options.length) for name in options.tasks}

    def add(task: str, name: str, rate: float, seed: int) -> None:
        result = train(base, tasks[task], ARMS[name], rate, seed, options.steps)
        results.add({"task": task, "arm": name, "rate": rate, "seed": seed, **result})

    arms: list[str] = options.arms
    names: list[str] = options.tasks
    for task, name in itertools.product(names, arms):
        while (rate := next_rate(results.losses(task, name), ARMS[name].first)) is not None:
            add(task, name, rate, 0)
    for seed, task, name in itertools.product(range(1, options.seeds), names, arms):
        best = results.best(task, name)
        if best and seed not in {run["seed"] for run in best[1]}:
            add(task, name, best[0], seed)


if __name__ == "__main__":
    main()
