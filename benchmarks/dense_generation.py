"""Greedy decoding of the embedded model in NF4 with a MoKA adapter: as it is, and on dense weights."""

from measure import medians, show
from peft import get_peft_model

from krontune.adapters import MokaConfig, load_base
from krontune.rl import get_task
from krontune.rl.generation import generate

PROMPTS, TOKENS, ROUNDS = 64, 32, 3


def main() -> None:
    task = get_task("lis")
    prompts = [task.prompt(instance) for instance in task.instances(PROMPTS, [3, 5], 0, "test")]
    rows = []
    for targets in (["q_proj", "v_proj"], "all-linear"):
        base, tokenizer = load_base("smollm2-135m", "nf4")
        model = get_peft_model(base, MokaConfig(target_modules=targets))

        def decode(dense: bool, model=model, tokenizer=tokenizer):
            return lambda: generate(model, tokenizer, prompts, max_new_tokens=TOKENS, dense=dense)

        seconds = medians({"as it is": decode(False), "dense_weights": decode(True)}, ROUNDS)
        for name, value in seconds.items():
            rate = f"{PROMPTS * TOKENS / value:.0f}"
            rows.append([f"{targets}", name, f"{value:.1f}", rate, f"{seconds['as it is'] / value:.2f}"])
    columns = ["adapted", "weights", "s", "tokens/s", "speed-up"]
    show(f"{PROMPTS} prompts, {TOKENS} new tokens, median of {ROUNDS}", columns, rows)


main()
