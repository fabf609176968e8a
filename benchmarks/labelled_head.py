"""What TRL's trainers cost on a CPU when the head scores labelled positions alone, and prompts are computed once.

SmolLM2-135M in NF4, MoKA r = 10 on q and v, worked subsequence puzzles. `sft`: a step's forward and backward through
SFTTrainer's loss, 8 rows of prompt and answer. `grpo`: forward and backward through GRPOTrainer's log-probabilities,
4 prompts with 8 completions each. TRL's own loss is the first line of each. CPU seconds, medians of interleaved runs.

    python benchmarks/labelled_head.py [--rounds 3]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from measure import show
from peft import get_peft_model
from trl import GRPOConfig, SFTConfig, SFTTrainer

from krontune.adapters import MokaConfig, load_base
from krontune.recipes.rows import tokenize
from krontune.rl import DenseRolloutGRPOTrainer, get_task, score_labelled_only
from krontune.rl.tasks.worked import worked_examples


def base() -> tuple[Any, Any]:
    model, tokenizer = load_base("smollm2-135m", "nf4", attn_implementation="eager")
    torch.manual_seed(0)
    return get_peft_model(
        model, MokaConfig(r=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ), tokenizer


def settings(folder: str) -> dict[str, Any]:
    return {"output_dir": folder, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}


def chat(one: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": one["prompt"]}],
        "completion": [{"role": "assistant", "content": one["completion"]}],
    }


def sft(folder: str) -> dict[str, Callable[[], float]]:
    def step(labelled: bool) -> Callable[[], float]:
        model, tokenizer = base()
        rows = [tokenize(chat(one), tokenizer) for one in worked_examples("lis", 8, 0, [3, 5], "train", {})]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(per_device_train_batch_size=8, **settings(folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        if labelled:
            score_labelled_only(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))

        def run() -> float:
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            return loss.item()

        return run

    return {"TRL": step(False), "labelled positions": step(True)}


def grpo(folder: str) -> dict[str, Callable[[], float]]:
    task = get_task("lis")

    def step(labelled: bool, share: bool) -> Callable[[], float]:
        model, tokenizer = base()
        head = DenseRolloutGRPOTrainer._get_per_token_logps_and_entropies
        trainer = DenseRolloutGRPOTrainer(
            model=model,
            args=GRPOConfig(per_device_train_batch_size=32, num_generations=8, **settings(folder)),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=task.dataset(8, [3, 5], 0, "train"),
            processing_class=tokenizer,
            share_prompts=share,
        )
        if not labelled:
            plain(trainer)
        ids, mask, width = completions(task, tokenizer)
        trainer.model.train()

        def run() -> float:
            trainer.model.zero_grad()
            log_probs = head(trainer, trainer.model, ids, mask, width, compute_entropy=True)[0]
            loss = -(log_probs * mask[:, -width:]).sum() / mask[:, -width:].sum()
            loss.backward()
            return loss.item()

        return run

    return {
        "TRL": step(False, False),
        "labelled positions": step(True, False),
        "prompts once": step(False, True),
        "both": step(True, True),
    }


def plain(trainer: Any) -> None:
    """TRL's head as it was before krontune's stood in front of it."""
    base_model = trainer.model.get_base_model()
    base_model.forward = base_model.forward.__wrapped__


def completions(task: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask (32, P + C) as the trainer pads them, and C: worked answers, and all but one of eight cut short."""
    prompts, answers = [], []
    for instance in task.instances(4, [3, 5], 0, "train"):
        chat_prompt = [{"role": "user", "content": task.prompt(instance)}]
        prompt = tokenizer.apply_chat_template(chat_prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(task.completion(instance), add_special_tokens=False)["input_ids"]
        for cut in range(8):
            prompts.append(prompt)
            answers.append([*answer[: len(answer) - cut], tokenizer.eos_token_id])
    before, width = max(map(len, prompts)), max(map(len, answers))
    ids, mask = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = before - len(prompt), width - len(answer)
        ids.append([0] * left + prompt + answer + [0] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for title, contenders in (("sft", sft(folder)), ("grpo", grpo(folder))):
            losses = {name: run() for name, run in contenders.items()}
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(rounds):
                for name, run in contenders.items():
                    start = time.process_time()
                    run()
                    seconds[name].append(time.process_time() - start)
            found = {name: statistics.median(values) for name, values in seconds.items()}
            rows = [
                [name, f"{found[name]:.2f}", f"{found['TRL'] / found[name]:.2f}", f"{losses[name]:.5f}"]
                for name in contenders
            ]
            show(f"{title}: forward and backward", ["head", "CPU s", "times as fast as TRL", "loss"], rows)


if __name__ == "__main__":
    main()
