import importlib.util
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from krontune.rl import CertificateReward, RlError, get_task
from krontune.rl.guard import Guarded

HERE = Path(__file__).parent


def _rewards():
    """The module under a plain name, so that a child process can import it too."""
    sys.path.insert(0, str(HERE))
    import hostile_rewards

    return hostile_rewards


hostile = _rewards()


@pytest.fixture
def guard():
    made = []

    def make(reward=hostile.obey, **options):
        made.append(Guarded(reward, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_it_pays_what_the_reward_pays(guard):
    task = get_task("lis")
    items = task.instances(60, (4, 9))
    texts = [task.completion(item) if i % 3 else "no idea" for i, item in enumerate(items)]
    columns = {"completions": texts, "instance": [task.to_json(item) for item in items]}
    reward = CertificateReward(task)
    assert guard(reward)(**columns) == reward(**columns) and sum(reward(**columns)) == 40


def test_512_hostile_completions_end_inside_the_batch_deadline_and_take_nothing_from_the_honest(guard):
    quick = ["exit", "raise", "kill", "recurse", "braces", "memory"]
    kinds = [*quick, "loop", "good", *quick, "tower", "good", *quick, "fork", "good", *quick, "raise", "good"]
    texts = kinds * 16
    one = guard(item_timeout_s=1.0, batch_timeout_s=10.0)
    one(completions=["good"])  # the limit is counted from when it has its workers
    one.counts.clear()
    start = time.monotonic()
    rewards = one(completions=texts)
    assert len(texts) == 512 and time.monotonic() - start < 10.0 + 0.5
    assert [reward for reward, text in zip(rewards, texts, strict=True) if text == "good"] == [1.0] * 64
    assert all(reward is None for reward, text in zip(rewards, texts, strict=True) if text != "good")
    assert sum(one.counts.values()) == 512 and one.counts["scored"] == 64
    assert one.counts["crash"] == 16 * 8 and one.counts["exception"] + one.counts["timeout"] == 16 * 17 + 48
    assert one.counts["exception"] >= 16 * 13 and one.counts["timeout"] >= 48  # deep braces take long on a busy machine


@pytest.mark.parametrize(
    ("said", "outcome"),
    [("exit", "crash"), ("kill", "crash"), ("raise", "exception"), ("leave", "exception"), ("loop", "timeout"),
     ("memory", "exception"), ("recurse", "exception"), ("many", "exception"), ("nothing", "scored"),
     ("nan", "exception"), ("inf", "exception")],
)  # fmt: skip
def test_each_failure_is_none_and_is_counted_by_its_name(guard, said, outcome):
    one = guard(item_timeout_s=0.4, workers=1)
    assert one(completions=["good", said, "good"]) == [1.0, None, 1.0]
    assert one.counts == {"scored": 2, outcome: 1} or (outcome == "scored" and one.counts == {"scored": 3})
    assert (one.last_error == "") == (outcome == "scored")


def test_failed_and_overlong_items_get_the_number_asked_for(guard):
    one = guard(max_chars=10, failed=-1.0, workers=1)
    chat = [{"role": "assistant", "content": "x" * 11}]
    assert one(completions=["good", "x" * 11, "raise", chat]) == [1.0, -1.0, -1.0, -1.0]
    assert one.counts == {"scored": 1, "too_long": 2, "exception": 1}


def test_a_slow_item_gets_its_second_chance(guard):
    one = guard(item_timeout_s=2.0, batch_timeout_s=6.0, workers=2)
    texts = ["nap", *["good"] * 60]  # the fair share is 0.1 s, the nap takes 0.3 s: the third round has 0.4 s
    assert one(completions=texts) == [1.0] * 61


def test_a_reward_that_is_slow_at_its_first_call_is_paid_in_a_large_batch(guard):
    texts = ["good"] * 60 + ["loop"] + ["good"] * 60  # the fair share of each is 0.05 s
    one = guard(hostile.slow_at_first, item_timeout_s=0.8, batch_timeout_s=5.0)
    assert one(completions=texts) == [1.0] * 60 + [None] + [1.0] * 60


def test_new_children_that_never_answer_do_not_use_up_the_batch(guard):
    one = guard(item_timeout_s=1.0, batch_timeout_s=3.0)
    assert one(completions=["loop"] * 20 + ["good"]) == [None] * 20 + [1.0]
    start = time.monotonic()
    assert one(completions=["loop"] * 20 + ["good"]) == [None] * 20 + [1.0]
    assert time.monotonic() - start < 3.0 + 0.5


def test_a_reward_that_forks_and_comes_back_twice_shifts_no_rewards(guard):
    texts = ["1", "fork", *map(str, range(2, 40))]
    assert guard(hostile.twice, workers=1)(completions=texts) == [
        0.0 if text == "fork" else float(text) for text in texts
    ]


def test_columns_are_arrays_too_and_one_of_another_length_is_refused(guard):
    one = guard(hostile.same, workers=1)
    texts = ["3", "4", "5"]
    for answer in ([3, 4, 6], (3, 4, 6), np.array([3, 4, 6]), Dataset.from_dict({"a": [3, 4, 6]})["a"]):
        assert one(completions=np.array(texts, dtype=object), answer=answer) == [1.0, 1.0, 0.0]
    with pytest.raises(RlError, match="'answer' has 2 values for 3 completions"):
        one(completions=texts, answer=[3, 4])
    with pytest.raises(RlError, match="'prompts' has 1 values for 3"):
        one(prompts=["?"], completions=texts, answer=[3, 4, 5])
    for wrong in ("345", (text for text in texts)):
        with pytest.raises(RlError, match="list of texts or of chats"):
            one(completions=wrong, answer=[3, 4, 5])


def test_a_generator_is_a_list_of_rewards_and_none_is_not(guard):
    assert guard(hostile.yields, workers=1)(completions=["x", "y"]) == [1.0, 1.0]
    one = guard(hostile.silent, workers=1)
    assert one(completions=["x"]) == [None] and "gave None, which is no list" in one.last_error


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_what_has_made_a_session_of_its_own_is_killed_too(guard, tmp_path):
    one = guard(hostile.apart, item_timeout_s=1.0, workers=1)
    assert one(completions=[str(tmp_path / "pid")]) == [None]
    assert _gone([int((tmp_path / "pid").read_text())])


def test_entries_of_the_path_that_are_no_text_do_no_harm(guard, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    assert guard(workers=1)(completions=["good"]) == [1.0]


def test_a_new_child_comes_in_less_than_half_a_second_and_has_no_torch(guard):
    one = guard(hostile.has_torch, workers=1)
    assert one(completions=["x"]) == [0.0]
    start = time.monotonic()
    one._pool[0].renew()
    assert one(completions=["x"]) == [0.0]
    assert time.monotonic() - start < 0.5


def test_a_killed_keeper_is_replaced(guard):
    one = guard(workers=1)
    assert one(completions=["good"]) == [1.0]
    os.kill(one._pool[0].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    one(completions=["good"])
    assert one(completions=["good"]) == [1.0]


def test_it_works_from_any_thread_and_several_at_once(guard):
    one = guard(item_timeout_s=0.3, batch_timeout_s=5.0)
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: one(completions=["good", "tower"])})) for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [1.0, None] for i in range(3)}


def test_columns_logs_and_state_pass_through(guard):
    class State:
        global_step, log_history = 7, [{}] * 3

        def __init__(self):
            self.global_step, self.log_history = 7, [{}]

    extra, metrics = {}, []
    rewards = guard(hostile.told, workers=1)(
        prompts=["a", "b"],
        completions=["x", "y"],
        optimum=[3, 4],
        options={"base": 10},
        trainer_state=State(),
        log_extra=lambda name, column: extra.update({name: column}),
        log_metric=lambda name, value: metrics.append((name, value)),
    )
    assert rewards == [13.0, 14.0]
    assert extra == {"seen": ["a/3/10", "b/4/10"], "guard": ["scored", "scored"]}
    assert metrics == [("step", 7.0), ("guard/failed", 0.0)] * 2


def test_asynchronous_rewards_are_awaited(guard):
    assert guard(hostile.patient, workers=1)(completions=["x"]) == [2.5]


def test_it_pickles_with_its_options_and_starts_its_own_workers(guard):
    one = guard(item_timeout_s=0.7, workers=1)
    one(completions=["good"])
    copy = pickle.loads(pickle.dumps(one))
    assert (copy.__name__, copy.item_timeout_s, copy._pool) == ("obey", 0.7, [])
    assert copy(completions=["good"]) == [1.0]
    copy.close()


def test_what_cannot_be_guarded_is_refused_with_the_reason(guard):
    with pytest.raises(RlError, match="top level of a module"):
        guard(lambda completions: [1.0])(completions=["x"])
    with pytest.raises(RlError, match="item_timeout_s"):
        guard(item_timeout_s=0)
    for seconds in ("2", None, math.nan, math.inf, True):
        with pytest.raises(RlError, match="batch_timeout_s must be a number of seconds"):
            guard(batch_timeout_s=seconds)
    for number in ("0", math.nan, True):
        with pytest.raises(RlError, match="failed must be None or a finite number"):
            guard(failed=number)
    with pytest.raises(RlError, match="workers"):
        guard(workers=1.5)
    with pytest.raises(RlError, match="'CertificateReward' is a class"):
        guard(CertificateReward)
    with pytest.raises(RlError, match="guarded already"):
        guard(guard())
    with pytest.raises(RlError, match="function"):
        guard("lis")
    with pytest.raises(RlError, match="needs completions"):
        guard()()


SCRIPT = """
import sys
from krontune.rl.guard import Guarded

def mine(completions, **columns):
    return [float(len(text)) for text in completions]

if __name__ == "__main__":
    guard = Guarded(mine, workers=2)
    print(guard(completions=["ab", "abc"]), [worker.process.pid for worker in guard._pool], flush=True)
    if len(sys.argv) > 1:
        import os, time
        sys.path.insert(0, sys.argv[1])
        import hostile_rewards
        hostile = Guarded(hostile_rewards.obey, item_timeout_s=60, batch_timeout_s=120)
        hostile(completions=["good"])
        bystander = os.fork()  # as a loader of data would be: it inherits every channel and outlives the trainer
        if not bystander:
            time.sleep(60)
            os._exit(0)
        print(bystander, flush=True)
        hostile(completions=["fork"])
"""


def _alive(group_or_pid: int) -> bool:
    try:
        os.kill(group_or_pid, 0)
    except ProcessLookupError:
        return False
    return True


def _descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(entry.name), *_descendants(int(entry.name))]
    return found


def _gone(pids: list[int], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(_alive, pids))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_nothing_is_left_when_the_trainer(tmp_path, how):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    extra = [] if how == "ends" else [str(HERE)]
    trainer = subprocess.Popen([sys.executable, str(script), *extra], stdout=subprocess.PIPE, text=True)
    line = trainer.stdout.readline()
    assert line.startswith("[2.0, 3.0]")  # a reward from the script itself
    keepers = [int(pid) for pid in line.partition("] [")[2].strip("]\n ").split(",")]
    if how == "ends":
        trainer.wait(10)
        assert _gone(keepers)
        return
    bystander = int(trainer.stdout.readline())
    time.sleep(1.0)  # the reward has forked by now
    family = [pid for pid in _descendants(trainer.pid) if pid != bystander]
    assert len(family) >= 7  # four keepers, their children, and what the reward forked
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    gone = _gone(family)
    os.kill(bystander, signal.SIGKILL)
    assert gone


UNGUARDED = """
import multiprocessing
from krontune.rl.guard import Guarded

def mine(completions, **columns):
    return [float(len(text)) for text in completions]

def train():
    guard = Guarded(mine, workers=1)
    print(guard(completions=["ab", "abc"]), flush=True)
    guard.close()

"""


def test_a_script_that_trains_while_it_is_imported_is_told_what_to_do(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED + "train()")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    said = found.stderr.splitlines()[-1]
    assert 'if __name__ == "__main__"' in said and said.count("could not load the reward") == 1


def test_a_process_that_multiprocessing_spawned_guards_a_reward_of_the_script(tmp_path):
    script = tmp_path / "train.py"
    spawns = 'multiprocessing.get_context("spawn").Process(target=train).start()'
    script.write_text(f"{UNGUARDED}if __name__ == '__main__':\n    {spawns}\n")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert found.stdout == "[2.0, 3.0]\n", found.stderr


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_math_verify_cannot_freeze_it(guard):
    pytest.importorskip("latex2sympy2_extended")
    from trl.rewards import accuracy_reward

    one = guard(accuracy_reward, item_timeout_s=1.0, workers=1)
    chats = [[{"role": "assistant", "content": text}] for text in (r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}")]
    start = time.monotonic()
    rewards = one(completions=chats, solution=["$3$", "$3$"])
    assert rewards[1] == 1.0 and rewards[0] in (None, 0.0)
    assert math.isfinite(time.monotonic() - start)
