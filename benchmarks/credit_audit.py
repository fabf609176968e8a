"""Do the tokens that credit takes carry the rest of the text? The embedded model's own answers, audited by masking."""

import statistics

import torch
from measure import show
from scipy.stats import t as student

from krontune.adapters import load_base
from krontune.rl.audit import MaskingAudit, answer_log_likelihood, masking_audit
from krontune.rl.credit import chunk_steps
from krontune.rl.heads import pool, split_heads
from krontune.rl.probe import read_rhythm

QUESTIONS = [
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Explain what a prime number is.",
    "A train goes 60 km in 45 minutes. How fast is it?",
    "Why do cats purr?",
    "What is inflation?",
    "How does a bicycle stay upright?",
    "Tom has 3 boxes of 12 eggs and drops 5. How many are left?",
]
TOKENS, ANSWER = 128, 24  # of a completion, and of its end, whose likelihood is measured


def main() -> None:
    model, tokenizer = load_base("smollm2-135m", None)
    audits: dict[str, list[MaskingAudit]] = {}
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(prompt)
        ids = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)  # (1, T)
        response, answer = torch.zeros_like(ids), torch.zeros_like(ids)
        response[:, prompt.shape[1] :], answer[:, -ANSWER:] = 1, 1
        rhythms = read_rhythm(model, ids, torch.ones_like(ids), response)
        spans = {layer: rhythm.span[0] for layer, rhythm in rhythms.items() if rhythm.span is not None}
        waad, fai = pool(rhythms, split_heads(spans))
        steps = chunk_steps(waad, response).nan_to_num(0)
        measure = answer_log_likelihood(model, ids, torch.ones_like(ids), answer)
        for name, scores in {"FAI": fai, "steps of WAAD": steps, "FAI, lowest first": -fai}.items():
            audits.setdefault(name, []).append(masking_audit(measure, scores, response - answer, repeats=2))
    rows = []
    for name, found in audits.items():
        values = [audit.racu for audit in found]
        half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        rows.append(
            [name, f"{statistics.mean(values):+.2f} ± {half:.2f}", f"{min(values):+.2f}", f"{max(values):+.2f}"]
        )
    columns = ["hidden in the order of", "relative ACU", "least", "most"]
    show(f"{len(QUESTIONS)} completions of {TOKENS} tokens, likelihood of the last {ANSWER}", columns, rows)


main()
