"""What guarding a reward costs, and what 512 hostile completions do to it.

python benchmarks/guard.py
"""

import os
import signal
import time

from measure import medians, show

from krontune.rl import CertificateReward, get_task
from krontune.rl.guard import Guarded

HOSTILE = ("loop", "exit", "tower", "raise", "memory", "kill", "good")


def obey(completions, **columns):
    said = completions[0]
    if said == "loop":
        while True:
            pass
    if said == "exit":
        os._exit(3)
    if said == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if said == "tower":
        return [float(9**9**9**9)]
    if said == "raise":
        raise ValueError(said)
    if said == "memory":
        return [float(len(bytearray(8 << 30)))]
    return [1.0]


def main() -> None:
    task = get_task("lis")
    instances = task.instances(512, (5, 16))
    columns = {
        "completions": ["step " * 600 + task.completion(one) for one in instances],
        "instance": [task.to_json(one) for one in instances],
    }
    plain = CertificateReward(task)
    start = time.perf_counter()
    guarded = Guarded(plain)
    guarded(**columns)
    first = time.perf_counter() - start
    costs = medians({"plain": lambda: plain(**columns), "guarded": lambda: guarded(**columns)}, 7)
    guarded.close()
    renewed = []
    hostile = Guarded(obey, item_timeout_s=2.0, batch_timeout_s=10.0)
    hostile(completions=["good"] * 2)
    for _ in range(20):
        start = time.perf_counter()
        hostile._pool[0].renew()
        hostile(completions=["good"] * 2)
        renewed.append(time.perf_counter() - start)
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(512)]
    hostile.counts.clear()
    start = time.perf_counter()
    rewards = hostile(completions=texts)
    seconds = time.perf_counter() - start
    good = sum(reward == 1.0 for reward, text in zip(rewards, texts, strict=True) if text == "good")
    hostile.close()
    rows = [
        ["512 completions of 3,000 characters, plain", f"{1000 * costs['plain']:.1f} ms"],
        ["the same, guarded, 2 workers", f"{1000 * costs['guarded']:.1f} ms"],
        ["the first guarded call, with the start of the workers", f"{first:.2f} s"],
        ["a new child after a kill, and one call", f"{1000 * sorted(renewed)[10]:.1f} ms"],
        ["512 completions, 6 of 7 hostile, batch limit 10 s", f"{seconds:.2f} s"],
        ["honest ones among them that were scored", f"{good} of {texts.count('good')}"],
        ["outcomes", ", ".join(f"{name} {count}" for name, count in sorted(hostile.counts.items()))],
    ]
    show("guarded rewards", ["what", "measured"], rows)


if __name__ == "__main__":
    main()
