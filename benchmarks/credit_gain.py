"""Does token credit help? One recipe, every rule and its controls, several seeds, the final checkpoint.

    python benchmarks/credit_gain.py --out benchmarks/results/credit_gain.jsonl     # goes on where it was stopped
    python benchmarks/credit_gain.py --out benchmarks/results/credit_gain.jsonl --table

Each finished run is one line of the file. A seed fixes the warm start, the problems and the sampler, so arms are
compared seed by seed. Nothing is chosen over time: the figures are those of the last step.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, show
from peft import PeftModel, get_peft_model
from scipy.stats import t as student
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, load_base
from krontune.rl import CertificateReward, TokenCredit, TokenCreditGRPOTrainer, get_task, score
from krontune.rl.generation import generate

ARMS = ("off", "random", "uniform", "entropy", "preplan", "anchor", "coupled")
MAX_TOKENS = 48
# Completions here are about 30 tokens: the paper's low end of 10 would leave a third of them without an FAI. At 5 its
# ablation lies 0.6 points lower.
HORIZON = (5, 100)
# Rows of an instance, from and to.
TASKS = {"lis": [3, 5], "countdown": [3, 3]}


def accuracy(name: str, model: Any, tokenizer: Any, size: int) -> float:
    """Share of held-out instances with a right certificate, greedily."""
    task = get_task(name)
    instances = task.instances(size, TASKS[name], 0, "test")
    prompts = [task.prompt(item) for item in instances]
    return score(task, instances, generate(model, tokenizer, prompts, max_new_tokens=MAX_TOKENS)).certificate.value


def warm_start(name: str, folder: Path, seed: int, steps: int) -> Path:
    """A supervised adapter that solves some problems, kept for all arms of a seed."""
    if (folder / "adapter_config.json").exists():
        return folder
    base, tokenizer = load_base("smollm2-135m", None)
    set_seed(seed)
    model = get_peft_model(base, MokaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    rows = get_task(name).dataset(steps * 8, TASKS[name], seed + 1000, "train")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            warmup_steps=5,
            gradient_checkpointing=False,
            **common(folder, seed),
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(str(folder))
    return folder


def run(name: str, arm: str, seed: int, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    base, tokenizer = load_base("smollm2-135m", None)
    set_seed(seed)
    model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    before = accuracy(name, model, tokenizer, options.held_out)
    task = get_task(name)
    trainer = TokenCreditGRPOTrainer(
        credit=TokenCredit(strategy=arm, horizon=HORIZON, seed=seed),
        model=model,
        args=GRPOConfig(
            max_steps=options.steps,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            num_generations=8,
            per_device_eval_batch_size=32,
            num_generations_eval=4,
            max_completion_length=MAX_TOKENS,
            learning_rate=options.learning_rate,
            loss_type="grpo",
            gradient_checkpointing=False,
            **common(adapter, seed),
        ),
        reward_funcs=[CertificateReward(task, "certificate")],
        train_dataset=task.dataset(options.steps * 8, TASKS[name], seed, "train"),
        eval_dataset=task.dataset(options.held_out, TASKS[name], 0, "test"),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    set_seed(seed)
    reward = trainer.evaluate()["eval_reward"]
    gamma = [line["credit/gamma_mean"] for line in trainer.state.log_history if "credit/gamma_mean" in line]
    return {
        "before": before,
        "reward": reward,
        "accuracy": accuracy(name, model, tokenizer, options.held_out),
        "gamma_mean": statistics.mean(gamma) if gamma else 1.0,
        "seconds": round(seconds, 1),
    }


def common(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def table(lines: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    for task in TASKS:
        runs = {(x["arm"], x["seed"]): x for x in lines if x["task"] == task and x["settings"] == settings}
        rows = []
        for arm in ARMS:
            seeds = sorted(seed for a, seed in runs if a == arm)
            if not seeds:
                continue
            mine = [runs[arm, seed] for seed in seeds]
            row = [arm, str(len(seeds)), interval([x["reward"] for x in mine]), interval([x["accuracy"] for x in mine])]
            for control in ("off", "random"):
                pairs = [runs[arm, s]["accuracy"] - runs[control, s]["accuracy"] for s in seeds if (control, s) in runs]
                row.append("" if arm == control or not pairs else interval(pairs))
            rows.append([*row, f"{statistics.mean(x['seconds'] for x in mine):.0f}"])
        if rows:
            start = interval(list({seed: x["before"] for (_, seed), x in runs.items()}.values()))
            title = f"{task}: {settings}\ncertificate accuracy before RL {start}"
            columns = ["arm", "seeds", "reward, sampled", "accuracy, greedy", "minus off", "minus random", "s"]
            show(title, columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs, one JSON line each")
    parser.add_argument("--work", type=Path, default=Path("credit_gain_work"), help="folder of warm starts")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--warm-steps", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--table", action="store_true", help="print the finished runs and stop")
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("warm_steps", "steps", "learning_rate", "held_out")}
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(x["task"], x["arm"], x["seed"]) for x in lines if x["settings"] == settings}
    # Seed by seed, so that a run that is stopped has compared all arms on the seeds it finished.
    todo = itertools.product(() if options.table else range(options.seeds), options.tasks, options.arms)
    for seed, task, arm in todo:
        if (task, arm, seed) in done:
            continue
        start = options.work / f"{task}-{seed}-{options.warm_steps}"
        result = run(task, arm, seed, warm_start(task, start, seed, options.warm_steps), options)
        line = {"task": task, "arm": arm, "seed": seed, "settings": settings, **result, "machine": machine()}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        lines.append(line)
    table(lines, settings)


if __name__ == "__main__":
    main()
