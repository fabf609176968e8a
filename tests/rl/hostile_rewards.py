"""Reward functions for the tests of the guard: a child process imports them from here."""

import os
import signal
import subprocess
import sys
import time

CALLS = []
READY = []


def obey(completions, **columns):
    """Does what the completion says."""
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
        raise ValueError("no such number")
    if said == "leave":
        raise SystemExit(0)
    if said == "memory":
        return [float(len(bytearray(8 << 30)))]
    if said == "recurse":
        return obey_deeply(said)
    if said == "braces":
        return [float(len(str(_nested(200_000))))]
    if said == "nap":
        time.sleep(0.3)
    if said == "nothing":
        return [None]
    if said in ("nan", "inf"):
        return [float(said)]
    if said == "many":
        return [1.0, 2.0]
    if said == "fork":
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        while True:
            pass
    return [1.0]


def obey_deeply(said):
    return obey_deeply(said)


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def pid(completions, **columns):
    return [float(os.getpid())]


def has_torch(completions, **columns):
    return [float("torch" in sys.modules)]


def told(completions, prompts, optimum, options, trainer_state, log_extra, log_metric, **columns):
    log_extra("seen", [f"{prompts[0]}/{optimum[0]}/{options['base']}"])
    log_metric("step", trainer_state.global_step)
    return [optimum[0] + options["base"]]


async def patient(completions, **columns):
    return [2.5]


def stingy(completions, **columns):
    return [0.0] * len(completions)


def fragile(completions, **columns):
    said = completions[0][0]["content"]
    if "\x00" in said:
        raise ValueError("a NUL")
    while "9^{9" in said:
        pass
    return [0.0]


def moody(completions, **columns):
    CALLS.append(1)
    return [float(len(CALLS) % 3 == 0)] * len(completions)


def slow_at_first(completions, **columns):
    """Needs 0.4 s in each new process, as one does that imports or compiles at its first call."""
    if not READY:
        time.sleep(0.4)
        READY.append(1)
    return obey(completions)


def twice(completions, **columns):
    """Comes back in two processes where it is told to, else pays the number that stands there."""
    if completions[0] == "fork":
        os.fork()
        return [0.0]
    return [float(completions[0])]


def same(completions, answer, **columns):
    return [float(text == str(gold)) for text, gold in zip(completions, answer, strict=True)]


def apart(completions, **columns):
    """Starts a process with a session of its own, writes its number where it is told to, and hangs."""
    started = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with open(completions[0], "w") as file:
        file.write(str(started.pid))
    time.sleep(60)


def yields(completions, **columns):
    return (1.0 for _ in completions)


def silent(completions, **columns):
    return None
