"""The memory estimate of `krontune plan` beside what a training run takes, on a CPU.

    python benchmarks/memory_estimate.py [--only TEXT]

Each setting runs in a process of its own: load the embedded model in NF4 with its adapter, take one gradient over 8
tokens, so that libraries and kernels are loaded, note the resident memory, set the kernel's mark of its peak back, take
two optimizer steps, and read the mark. So what is compared is all that training adds to a loaded model: gradients,
optimizer, activations, logits, generation. glibc gives blocks back when they are freed (MALLOC_ environment below). All
rows are as long as the setting says. Linux only.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
ADAPTER = "adapter: {target_modules: [q_proj, v_proj]}"
SFT = [
    {"name": f"sft {rows} x {length}, {'checkpointing' if again else 'no checkpointing'}", "attention": "sdpa",
     "rows": rows, "length": length, "checkpointing": again, "targets": "[q_proj, v_proj]"}
    for again in (False, True) for rows in (1, 4) for length in (256, 512)
]  # fmt: skip
OTHERS = [
    {"name": "sft 4 x 256, all-linear", "rows": 4, "length": 256, "checkpointing": False, "targets": "all-linear",
     "attention": "sdpa"},
    {"name": "sft 4 x 256, eager attention", "rows": 4, "length": 256, "checkpointing": False,
     "targets": "[q_proj, v_proj]", "attention": "eager"},
]  # fmt: skip
RL = [
    {"name": "rl 8 x 128 at once, group of 8", "batch": 8, "accumulate": 1, "completion": 128, "share": False},
    {"name": "rl 16 x 64 in two batches, shared prompts", "batch": 8, "accumulate": 2, "completion": 64, "share": True},
]


def recipe_of(setting: dict):
    from krontune.recipes.schema import Recipe

    attention = setting.get("attention", "eager")
    base = {"model": "smollm2-135m", "attn_implementation": attention, "dense_generation": "batch" in setting}
    adapter = {"target_modules": ["q_proj", "v_proj"] if setting.get("targets") != "all-linear" else "all-linear"}
    trainer = {"max_steps": 2, "gradient_checkpointing": setting.get("checkpointing", False)}
    if "rows" in setting:
        trainer |= {"per_device_train_batch_size": setting["rows"], "max_length": setting["length"]}
        stage = {"stage": "sft", "data": "none.txt", "adapter": adapter, "trainer": trainer}
    else:
        trainer |= {
            "per_device_train_batch_size": setting["batch"],
            "gradient_accumulation_steps": setting["accumulate"],
            "steps_per_generation": 1 if setting["share"] else setting["accumulate"],
            "num_generations": 8,
            "max_completion_length": setting["completion"],
        }
        task = {"name": "lis", "n": [5, 5]}
        stage = {"stage": "rl", "task": task, "adapter": adapter, "share_prompts": setting["share"], "trainer": trainer}
    return Recipe.model_validate({"name": "memory", "base": base, "stages": [stage]})


def estimate(recipe) -> dict[str, int]:
    from krontune.recipes.memory import rl_memory, sft_memory
    from krontune.recipes.rendered import load_tokenizer, longest_prompt
    from krontune.recipes.rl import training_rows
    from krontune.recipes.targets import meta_model, targets_of

    [stage] = recipe.stages
    model, targets = meta_model(recipe.base), targets_of(recipe.base, stage.adapter)
    if stage.stage == "sft":
        return sft_memory(model, recipe.base, stage, targets, stage.trainer.max_length, triton=False).parts()
    few = stage.model_copy(update={"instances": 8})
    prompt = longest_prompt((dict(row) for row in training_rows(few, 0)), load_tokenizer(recipe.base))
    return rl_memory(model, recipe.base, stage, targets, prompt, triton=False).parts()


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(setting: dict, folder: Path) -> int:
    """Bytes that two steps add to a loaded model at their peak."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, SFTConfig, SFTTrainer

    from krontune.recipes.rl import training_rows
    from krontune.recipes.training import exact_parameters, new_adapter, trainer_arguments
    from krontune.rl import TokenCreditGRPOTrainer

    recipe = recipe_of(setting)
    [stage] = recipe.stages
    model, tokenizer = new_adapter(recipe, stage.adapter, folder)
    ids = torch.arange(100, 108)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)
    arguments = trainer_arguments(recipe, stage.trainer, folder)
    if stage.stage == "sft":
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(100, 40_000, (16, setting["length"]), generator=generator).tolist()
        data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
        make = lambda: SFTTrainer(  # noqa: E731
            model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer
        )
    else:
        data = training_rows(stage.model_copy(update={"instances": 8}), 0)
        arguments["generation_kwargs"] = {"min_new_tokens": setting["completion"]}  # all as long as they may be
        make = lambda: TokenCreditGRPOTrainer(  # noqa: E731
            model=model,
            args=GRPOConfig(**arguments),
            reward_funcs=[lambda completions, **_: [float(n % 2) for n in range(len(completions))]],
            train_dataset=data,
            processing_class=tokenizer,
            dense_rollouts=True,
            share_prompts=setting["share"],
        )
    with exact_parameters(model):
        trainer = make()
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        import tempfile

        setting = json.loads(arguments.one)
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(setting, Path(folder))
        print(json.dumps({"measured": measured, "estimate": estimate(recipe_of(setting))}))
        return
    from measure import show

    table = []
    for setting in [*SFT, *OTHERS, *RL]:
        if arguments.only not in setting["name"]:
            continue
        command = [sys.executable, __file__, "--one", json.dumps(setting)]
        done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        parts, measured = found["estimate"], found["measured"]
        added = parts["peak"] - parts["weights"] - parts["adapter"]
        figures = [parts["activations"], parts["logits"], parts["rollouts"], added, measured]
        table.append([setting["name"], *(f"{n / 1e6:.0f}" for n in figures), f"{added / measured - 1:+.0%}"])
        print(table[-1], file=sys.stderr, flush=True)
    columns = ["MB", "activations", "logits", "rollouts", "estimate", "measured", "error"]
    show("Memory that training adds to the loaded model", columns, table)


if __name__ == "__main__":
    main()
