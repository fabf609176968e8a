"""One real run: SmolLM2-135M in 4 bits, SFT then GRPO paid by the answer or by the certificate, with all checks.

    python benchmarks/rlvr_real.py --out rlvr_real     # goes on where it was stopped
    python benchmarks/rlvr_real.py --out rlvr_real --table

Both rewards begin with the same SFT adapter, see the same prompts and have the same seed. One seed: the intervals
cover the choice of the test instances, not that of the training run.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from measure import machine, show
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, load_base
from krontune.rl import CertificateReward, DenseRolloutGRPOTrainer, checks, get_task, score
from krontune.rl.checks.sampling import con_at_k, pass_curve
from krontune.rl.generation import generate

TASKS = ("lis", "activity_weighted")
REWARDS = ("answer", "certificate")
MODELS = ("base", "sft", *(f"rl-{reward}" for reward in REWARDS))
N = [3, 5]
TOKENS = {"lis": 44, "activity_weighted": 72}
SIZES = (5, 8)
SEED = 0


def load() -> tuple[Any, Any]:
    return load_base("smollm2-135m", "nf4", attn_implementation="eager")


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "seed": SEED,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }


def finish(trainer: Any, folder: Path) -> None:
    """Train and save; the log is written last, and marks the training as done."""
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    trainer.model.save_pretrained(str(folder))
    log = {"seconds": time.perf_counter() - start, "log": trainer.state.log_history}
    save(folder / "log.json", log)


def save(path: Path, data: Any) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(data))
    os.replace(beside, path)


def sft(name: str, folder: Path, options: argparse.Namespace) -> None:
    model, tokenizer = load()
    set_seed(SEED)
    model = get_peft_model(model, MokaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    rows = get_task(name).dataset(options.sft_steps * 8, N, SEED + 1, "train")
    args = SFTConfig(
        max_steps=options.sft_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        warmup_steps=5,
        **common(folder),
    )
    rows = rows.select_columns(["prompt", "completion"])
    finish(SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer), folder)


def rl(name: str, reward: str, start: Path, folder: Path, options: argparse.Namespace) -> None:
    base, tokenizer = load()
    set_seed(SEED)
    task = get_task(name)
    args = GRPOConfig(
        max_steps=options.rl_steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=TOKENS[name],
        learning_rate=2e-4,
        **common(folder),
    )
    trainer = DenseRolloutGRPOTrainer(
        model=PeftModel.from_pretrained(base, str(start), is_trainable=True),
        args=args,
        reward_funcs=[CertificateReward(task, reward)],
        train_dataset=task.dataset(options.rl_steps * 4, N, SEED + 2, "train"),
        processing_class=tokenizer,
        dense_rollouts=True,
    )
    finish(trainer, folder)


class Asked:
    """A model's answers, each question asked once and kept in a file."""

    def __init__(self, name: str, model: str, folder: Path) -> None:
        self.task, self.name, self.model, self.folder = get_task(name), name, model, folder
        self.loaded: Any = None

    def __call__(self, label: str, instances: Sequence[Any], temperature: float = 0.0) -> list[str]:
        file = self.folder / f"answers-{self.model}-{label}.json"
        if file.exists():
            return json.loads(file.read_text())
        if self.loaded is None:
            base, tokenizer = load()
            path = self.folder / self.model
            self.loaded = base if self.model == "base" else PeftModel.from_pretrained(base, str(path)), tokenizer
        texts = generate(
            *self.loaded,
            [self.task.prompt(one) for one in instances],
            max_new_tokens=TOKENS[self.name] + (40 if label == "ladder" else 0),
            dense=True,
            temperature=temperature,
            seed=SEED,
        )
        save(file, texts)
        return texts


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    task = get_task(name)
    asked = {model: Asked(name, model, folder) for model in MODELS}
    instances = task.instances(options.instances, N, SEED, "test")
    few = instances[: options.sampled]
    repeated = [one for one in few for _ in range(options.samples)]
    out: dict[str, Any] = {"models": {}, "checks": {}, "samples": {}, "before": {}}
    before: dict[str, Callable[[], checks.CheckResult]] = {
        "soundness": lambda: checks.soundness(task, N),
        "shortcut_ceiling": lambda: checks.shortcut_ceiling(task, N),
    }
    for reward in REWARDS:
        paid = CertificateReward(task, reward)
        before[f"verifier, {reward} reward"] = lambda paid=paid: checks.verifier(paid, task, N)
        before[f"heuristics, {reward} reward"] = lambda paid=paid: checks.heuristics(task, paid, N)
    out["before"] = {label: check() for label, check in before.items()}
    tables: dict[str, list[list[int]]] = {}
    for model in MODELS:
        answers = asked[model]("greedy", instances)
        out["models"][model] = score(task, instances, answers)
        texts = asked[model]("samples", repeated, 1.0)
        marks = [task.mark(one, text) for one, text in zip(repeated, texts, strict=True)]
        k = options.samples
        tables[model] = [[int(m.certificate_right) for m in marks[i : i + k]] for i in range(0, len(marks), k)]
        votes = [[m.parsed.answer for m in marks[i : i + k]] for i in range(0, len(marks), k)]
        right = [task.solution(one).value for one in few]
        con = fmean(con_at_k(own, value, k) for own, value in zip(votes, right, strict=True))
        curve = pass_curve(tables[model])
        out["samples"][model] = {"pass": dict(zip(curve["k"], curve["value"], strict=True)), "con answer": con}
        if model == "base":
            continue
        found = [
            checks.triplet(task, instances, answers),
            checks.attribution(task, instances, answers),
            checks.heuristic_agreement(task, instances, answers),
            checks.feature_probe(task, instances, answers),
            checks.process_claims(task, instances, answers),
            checks.symmetry(task, few[: options.mirrored], lambda some, m=model: asked[m]("symmetry", some)),
            checks.size_ladder(task, lambda some, m=model: asked[m]("ladder", some), SIZES, options.mirrored),
        ]
        if model != "sft":
            found.append(checks.base_vs_tuned(tables["base"], tables[model]))
            against = checks.base_vs_tuned(tables["sft"], tables[model])
            found.append(checks.CheckResult(**{**vars(against), "name": "sft_vs_tuned"}))
        out["checks"][model] = {one.name: one for one in found}
    out["before"]["headroom (of the sft model)"] = checks.headroom(tables["sft"], options.samples)
    return out


def number(value: float | None, ci: Any) -> str:
    return "" if value is None else f"{value:.2f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")


def table(name: str, folder: Path, options: argparse.Namespace) -> None:
    found = measure(name, folder, options)
    rows = [[label, number(r.value, r.ci), str(r.n), r.verdict] for label, r in found["before"].items()]
    show(f"{name}: before training", ["check", "value", "N", "verdict"], rows)
    rows = []
    for model, one in found["models"].items():
        cells = [number(r.value, (r.low, r.high)) for r in (one.answer, one.certificate, one.gap)]
        passes = found["samples"][model]["pass"]
        rows.append([model, *cells, *(f"{value:.2f}" for value in passes.values())])
    columns = ["model", "answer", "certificate", "gap", *(f"pass@{k}" for k in passes)]
    show(f"{name}: {options.instances} instances greedily, {options.sampled} with samples", columns, rows)
    names = list(dict.fromkeys(label for one in found["checks"].values() for label in one))
    rows = []
    for label in names:
        cells = [one.get(label) for one in found["checks"].values()]
        rows.append([label, *(f"{r.verdict} {number(r.value, r.ci)}" if r else "" for r in cells)])
    show(f"{name}: after training", ["check", *found["checks"]], rows)
    rows = []
    for model in MODELS[2:]:
        log = json.loads((folder / model / "log.json").read_text())
        paid = [line for line in log["log"] if "reward" in line]
        for key in ("reward", f"{name}/certificate_accuracy", f"{name}/gap", "frac_reward_zero_std"):
            values = [line[key] for line in paid if key in line]
            rows.append([f"{model} {key}", *(f"{value:.2f}" for value in values)])
    show(f"{name}: the samples of each step", ["", *map(str, range(1, options.rl_steps + 1))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of adapters and answers")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--sft-steps", type=int, default=40)
    parser.add_argument("--rl-steps", type=int, default=8)
    parser.add_argument("--instances", type=int, default=96)
    parser.add_argument("--sampled", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--mirrored", type=int, default=24, help="instances of symmetry and of each size")
    parser.add_argument("--table", action="store_true", help="print the finished tasks and stop")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for name in options.tasks:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        if not options.table:
            start = time.perf_counter()
            if not (folder / "sft" / "log.json").exists():
                sft(name, folder / "sft", options)
            for reward in REWARDS:
                if not (folder / f"rl-{reward}" / "log.json").exists():
                    rl(name, reward, folder / "sft", folder / f"rl-{reward}", options)
            print(f"{name}: trained, {time.perf_counter() - start:.0f} s", flush=True)
        if (folder / f"rl-{REWARDS[-1]}" / "log.json").exists():
            table(name, folder, options)
    print(machine())


if __name__ == "__main__":
    main()
