"""How far a cache of fewer bits puts the sampler from the policy that learns, on the embedded model.

Of each sampled token: the log-probability that the sampler gave it, over its cache, and that of one forward pass over
the whole text. The usual cache shows what rounding alone makes of it.
"""

import sys

import torch
from measure import show
from transformers import GenerationConfig

from krontune.adapters import load_base
from krontune.rl import get_task
from krontune.rl.rollout_cache import cache_settings, recorded

PROMPTS, TOKENS = 8, 64


def main(quantization: str) -> None:
    """quantization: of the base, or none."""
    model, tokenizer = load_base("smollm2-135m", None if quantization == "none" else quantization)
    task = get_task("lis")
    chats = [[{"role": "user", "content": task.prompt(task.generate(seed, 4))}] for seed in range(PROMPTS)]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    length, rows = batch["input_ids"].shape[1], []
    for cache in (None, "fp8", "int4", "int2"):
        settings = {} if cache is None else cache_settings(cache, model.config, model.device)
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": TOKENS}
        config = GenerationConfig(
            **drawn, **settings, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )
        torch.manual_seed(0)
        with torch.no_grad(), recorded(model, 1.0) as sampler:
            ids = model.generate(**batch, generation_config=config)
        new = ids[:, length:]
        attended = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attended).logits[:, length - 1 : -1]
        learner = logits.float().log_softmax(-1).gather(2, new[:, :, None])[:, :, 0]
        ends = (new == tokenizer.eos_token_id).int()
        apart = (learner - sampler[0]).abs()[ends.cumsum(1) - ends == 0]  # up to the first end
        rows.append([cache or "usual", f"{apart.mean():.4f}", f"{apart.max():.3f}", str(len(apart))])
    columns = ["cache", "mean", "max", "tokens"]
    show(f"base {quantization}: nats a token, {PROMPTS} prompts, up to {TOKENS} tokens each", columns, rows)


main(sys.argv[1] if len(sys.argv) > 1 else "none")
