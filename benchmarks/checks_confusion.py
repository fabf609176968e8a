"""Which check tells which policy: scripted policies of known nature through every check of a trained model.

python benchmarks/checks_confusion.py [task]      task: lis (default), activity_weighted, ...
"""

import sys
import time

from measure import show

from krontune.rl import CertificateReward, checks, get_task
from krontune.rl.checks.policies import mixture_policy
from krontune.rl.guard import Guarded

SAMPLES, COUNT = 16, 256


def main(name: str) -> None:
    task = get_task(name)
    instances = task.instances(COUNT, (8, 16), split="test")
    column = [task.to_json(one) for one in instances]
    rewards = {kind: Guarded(CertificateReward(task, kind)) for kind in ("answer", "certificate")}
    rows = []
    policies = checks.scripted_policies(task)
    rule = {"lis": "beam2", "activity_weighted": "densest"}.get(name, next(iter(task.heuristics)))
    policies[f"30 % perfect, 70 % {rule}"] = mixture_policy(task, {"perfect": 0.3, rule: 0.7})
    for policy_name, policy in policies.items():
        texts = policy(instances)
        paid = {kind: sum(reward(completions=texts, instance=column)) / COUNT for kind, reward in rewards.items()}
        results = after(task, instances, policy, texts)
        cells = [
            f"{result.verdict} {'' if result.value is None else format(result.value, '.2f')}" for result in results
        ]
        rows.append([policy_name, f"{paid['answer']:.2f}", f"{paid['certificate']:.2f}", *cells])
    columns = ["policy", "r answer", "r cert.", "triplet", "attribution", "heur. agr.", "symmetry", "ladder", "probe"]
    show(f"{name}: verdict and value of each check, {COUNT} instances, n 8 to 16", columns, rows)
    show("seconds, without sampling", ["what", "s"], timings(task, instances))


def after(task, instances, policy, texts):
    return [
        checks.triplet(task, instances, texts),
        checks.attribution(task, instances, texts),
        checks.heuristic_agreement(task, instances, texts),
        checks.symmetry(task, instances, policy),
        checks.size_ladder(task, policy, per_size=64),
        checks.feature_probe(task, instances, texts),
    ]


def timings(task, instances):
    """Each check on 256 instances x 16 samples, its sampling measured apart and taken off."""
    policy = checks.scripted_policies(task)["noisy"]
    asked = [one for one in instances for _ in range(SAMPLES)]
    texts = policy(asked)
    spent = [0.0]

    def clocked(some):
        start = time.perf_counter()
        answers = policy(some)
        spent[0] += time.perf_counter() - start
        return answers

    def table():
        right = [task.mark(one, text).certificate_right for one, text in zip(asked, texts, strict=True)]
        return [right[i : i + SAMPLES] for i in range(0, len(right), SAMPLES)]

    def consensus():
        stated = [task.parse(text).answer for text in texts]
        for place, one in enumerate(instances):
            own = stated[SAMPLES * place : SAMPLES * (place + 1)]
            for k in (1, 2, 4, 8, 16):
                checks.con_at_k(own, task.solution(one).value, k)

    work = {
        "triplet": lambda: checks.triplet(task, asked, texts),
        "attribution": lambda: checks.attribution(task, asked, texts),
        "heuristic_agreement": lambda: checks.heuristic_agreement(task, asked, texts),
        "base_vs_tuned": lambda: checks.base_vs_tuned(table(), table()),
        "con@k": consensus,
        "process_claims": lambda: checks.process_claims(task, asked, texts),
        "symmetry": lambda: checks.symmetry(task, instances, clocked),
        "size_ladder": lambda: checks.size_ladder(task, clocked),
        "feature_probe": lambda: checks.feature_probe(task, asked, texts),
        "shortcut_ceiling": lambda: checks.shortcut_ceiling(task),
    }
    rows, total = [], 0.0
    for name, run in work.items():
        spent[0] = 0.0
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start - spent[0]
        total += seconds
        rows.append([name, f"{seconds:.2f}"])
    return [*rows, ["all", f"{total:.2f}"]]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "lis")
