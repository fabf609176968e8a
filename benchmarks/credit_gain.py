"""Does token credit help? One recipe, every rule and its controls, several seeds, the final checkpoint.

    python benchmarks/credit_gain.py --out benchmarks/results/credit_gain.jsonl     # goes on where it was stopped
    python benchmarks/credit_gain.py --out benchmarks/results/credit_gain.jsonl --table

Made to fit one CPU thread: SmolLM2-135M in bfloat16, MoKA r = 10 on q and v, prompts of nothing but the rows of an
instance, one supervised start for all runs. A seed fixes the problems and the sampler, so that the arms of a seed
sample the same first batch, and are compared seed by seed. Nothing is chosen over time: the figures are those of the
last step. Each finished run is one line of the file.

    reward     probability that sampling writes the reference answer, in the mean over held-out instances: the expected
               reward without the noise of sampling, except for answers that say the same in other words
    accuracy   share of the same instances that greedy decoding answers with the reference. Each has one optimum, and
               the supervised start teaches one form, so this is the certificate accuracy but for other spellings.
               (Countdown has several optima: there both figures are lower bounds.)
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import machine, show
from peft import PeftModel, get_peft_model
from scipy.stats import t as student
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, load_base
from krontune.rl import CertificateReward, TokenCredit, TokenCreditGRPOTrainer, get_task

ARMS = ("off", "random", "uniform", "entropy", "preplan", "anchor", "coupled")
GROUP, ROWS, MAX_TOKENS = 8, 64, 40
# Completions are about 27 tokens. The paper's low end of 10 would leave a third of them without an FAI; at 5 its
# ablation lies 0.6 points lower.
HORIZON = (5, 100)
# Rows of an instance, from and to.
TASKS = {"lis": [3, 5], "countdown": [3, 3]}
SETTINGS = ("warm_steps", "warm_rate", "steps", "learning_rate", "held_out")


def prompt(instance: Any) -> str:
    """Rows alone; the form of the answer is what the supervised start teaches."""
    rows = [" ".join(map(str, row)) for row in instance.rows]
    return "\n".join([*map(str, instance.params), *(f"{at} {row}" for at, row in enumerate(rows, 1)), ""])


def problems(name: str, count: int, seed: int, split: str) -> Dataset:
    """Columns prompt, completion (the reference answer) and instance (for the reward)."""
    rows = get_task(name).dataset(count, TASKS[name], seed, split)
    task = get_task(name)
    return Dataset.from_dict(
        {
            "prompt": [prompt(task.instance_from_json(text)) for text in rows["instance"]],
            "completion": [messages[-1]["content"] for messages in rows["completion"]],
            "instance": rows["instance"],
        }
    )


@torch.no_grad()
def final(name: str, model: Any, tokenizer: Any, count: int) -> dict[str, float]:
    """Reward and accuracy on the held-out instances, the same for every run, from one forward for each batch."""
    model.eval()
    rows, pad = problems(name, count, 0, "test"), tokenizer.pad_token_id
    sure, right = [], []
    for at in range(0, count, 32):
        part = rows[at : at + 32]
        asked = [tokenizer(text)["input_ids"] for text in part["prompt"]]
        wanted = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in part["completion"]]
        before, after = max(map(len, asked)), max(map(len, wanted))
        ids, seen = [], []
        for prompt_ids, answer_ids in zip(asked, wanted, strict=True):
            left, both, end = before - len(prompt_ids), prompt_ids + answer_ids, after - len(answer_ids)
            ids.append([pad] * left + both + [pad] * end)
            seen.append([0] * left + [1] * len(both) + [0] * end)
        ids, seen = torch.tensor(ids), torch.tensor(seen)
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=after + 1).logits[:, :-1]
        answer, own = ids[:, before:], seen[:, before:].bool()
        chosen = logits.float().log_softmax(-1).gather(2, answer[:, :, None])[:, :, 0]
        sure += chosen.where(own, 0).sum(1).exp().tolist()
        right += ((logits.argmax(-1) == answer) | ~own).all(1).float().tolist()
    return {"reward": statistics.mean(sure), "accuracy": statistics.mean(right)}


def warm_start(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One supervised adapter that solves some problems, kept in the folder for all runs; its figures."""
    figures = folder / f"final-{options.held_out}.json"
    if figures.exists():
        return json.loads(figures.read_text())
    base, tokenizer = load_base("smollm2-135m", None)
    set_seed(0)
    if (folder / "adapter_model.safetensors").exists():
        model: Any = PeftModel.from_pretrained(base, str(folder))
    else:
        config = MokaConfig(r=10, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base, config)
        rows = problems(name, options.warm_steps * 16, 1000, "train")
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                max_steps=options.warm_steps,
                per_device_train_batch_size=16,
                learning_rate=options.warm_rate,
                warmup_steps=5,
                **common(folder, 0),
            ),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
        )
        trainer.train()
        model.save_pretrained(str(folder))
    found = final(name, model, tokenizer, options.held_out)
    print("start", found, flush=True)
    figures.write_text(json.dumps(found))
    return found


def run(name: str, arm: str, seed: int, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    base, tokenizer = load_base("smollm2-135m", None)
    set_seed(seed)
    model: Any = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    trainer = TokenCreditGRPOTrainer(
        credit=TokenCredit(strategy=arm, horizon=HORIZON, seed=seed),
        model=model,
        args=GRPOConfig(
            max_steps=options.steps,
            per_device_train_batch_size=ROWS // 2,
            gradient_accumulation_steps=2,
            num_generations=GROUP,
            max_completion_length=MAX_TOKENS,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            loss_type="grpo",
            **common(adapter, seed),
        ),
        reward_funcs=[CertificateReward(name, "certificate")],
        train_dataset=problems(name, options.steps * ROWS // GROUP, seed, "train"),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    gamma = [line["credit/gamma_mean"] for line in trainer.state.log_history if "credit/gamma_mean" in line]
    return {
        **final(name, model, tokenizer, options.held_out),
        "sampled": [round(line["reward"], 4) for line in trainer.state.log_history if "reward" in line],
        "gamma_mean": statistics.mean(gamma) if gamma else 1.0,
        "seconds": round(seconds, 1),
    }


def common(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}"


def table(lines: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    for task in TASKS:
        runs = {(x["arm"], x["seed"]): x for x in lines if x["task"] == task and x["settings"] == settings}
        for figure in ("reward", "accuracy") if runs else ():
            rows = []
            for arm in ARMS:
                seeds = sorted(seed for a, seed in runs if a == arm)
                if not seeds:
                    continue
                row = [arm, str(len(seeds)), interval([runs[arm, s][figure] for s in seeds])]
                row.append(interval([runs[arm, s][figure] - runs[arm, s]["start"][figure] for s in seeds]))
                for control in ("off", "random"):
                    pairs = [runs[arm, s][figure] - runs[control, s][figure] for s in seeds if (control, s) in runs]
                    row.append("" if arm == control or not pairs else interval(pairs))
                rows.append([*row, f"{statistics.mean(runs[arm, s]['gamma_mean'] for s in seeds):.2f}"])
            columns = ["arm", "seeds", figure, "minus start", "minus off", "minus random", "mean gamma"]
            show(f"{task}, {figure}: {settings}", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="file of finished runs, one JSON line each")
    parser.add_argument("--work", type=Path, default=Path("credit_gain_work"), help="folder of warm starts")
    parser.add_argument("--tasks", nargs="+", default=["lis"], choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--warm-steps", type=int, default=40)
    parser.add_argument("--warm-rate", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--table", action="store_true", help="print the finished runs and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in SETTINGS}
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(x["task"], x["arm"], x["seed"]) for x in lines if x["settings"] == settings}
    # Seed by seed, so that a run that is stopped has compared all arms on the seeds it finished.
    seeds: list[int] = [] if options.table else list(range(options.seeds))
    for seed, (task, arm) in itertools.product(seeds, list(itertools.product(options.tasks, options.arms))):
        if (task, arm, seed) in done:
            continue
        folder = options.work / f"{task}-{options.warm_steps}-{options.warm_rate}"
        start = warm_start(task, folder, options)
        result = run(task, arm, seed, folder, options)
        line = {
            "task": task,
            "arm": arm,
            "seed": seed,
            "settings": settings,
            "start": start,
            **result,
            "machine": machine(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        lines.append(line)
    table(lines, settings)


if __name__ == "__main__":
    main()
