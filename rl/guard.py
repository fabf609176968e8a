"""Any reward function in killable child processes: no completion can hang, crash or starve the trainer."""

import json
import os
import pickle
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import inf, isfinite
from types import SimpleNamespace
from typing import Any

from . import guard_worker
from .errors import RlError
from .guard_worker import read_message, write_message

CHUNK = 16  # items sent to a worker at once: one round trip for many, and few to send again after a death
START_TIMEOUT_S = 120.0  # the first start imports whatever the reward function imports
WORK_SHARE = 0.95  # of the batch's time: the rest is for killing what still runs, so that the call is back in time
FIRST_LOOK_S = 0.05  # the least that the first round gives an item
WARM_SHARE = 0.25  # of the batch's time: at most so much goes into finding out what a new child needs to get ready
SILENT = 8  # new children in a row that are late: then what they need may be more than was known
OUTCOMES = ("scored", "exception", "crash", "timeout", "batch_timeout", "too_long")

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from krontune.rl.guard_worker import keep; keep(int(sys.argv[2]))"
)


class Guarded:
    """A reward function of TRL that runs `reward` item by item in child processes.

    Each worker is a fresh interpreter that imports the reward once and forks a child to score; a child that
    takes too long is killed with all it started, and the next fork takes milliseconds, whatever the reward
    imports. (Threads cannot do this: a thread that computes a power tower holds the interpreter's lock.)
    Children end with the trainer, also when it is killed. It works from any thread; calls wait for each other.

    reward: a reward function as TRL calls them (sync or async), importable from the child: pickled by
        reference. One from the script itself makes each worker run that script once as `__mp_main__`, so keep
        the training under `if __name__ == "__main__":` or, better, the reward in a module. It is called with
        one completion at a time, so it must not compare completions with each other.
    item_timeout_s: seconds for one completion.
    batch_timeout_s: seconds for one call, starting when it gets the workers; what is left then is not scored.
        A first round gives every item its fair share of half that time, so that hostile completions cannot
        use up the time of the others; items that ran out of it are tried again with twice the time, and so on
        up to `item_timeout_s`. The first item of a new child gets besides what those of others were seen to take,
        since a reward may import or compile at its first call.
    workers: child processes.
    max_chars: longer completions are not scored.
    memory_mb: what scoring may allocate beyond the loaded reward (address space; Linux only).
    failed: the reward of an item without score: None (TRL leaves it out of the sum) or a finite number.

    A call returns a float or `failed` for each completion. An exception, a crash, a time out and an overlong
    text each count as failed; `counts` holds how many of each, `last_error` the last message. The reward's
    `log_metric` and `log_extra` reach the trainer, and `guard/failed` is logged beside them. Replies of the
    children are JSON, so a completion that made the reward execute it still cannot execute in the trainer;
    files and network are not shut off, so this is no sandbox. Needs fork (Linux, macOS).

    Raises RlError for bad options, a reward that is guarded already or that cannot be pickled or loaded, and columns
    that cannot be sent or are no column: of another length than the completions.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        item_timeout_s: float = 2.0,
        batch_timeout_s: float = 30.0,
        workers: int = 2,
        max_chars: int = 100_000,
        memory_mb: int = 1024,
        failed: float | None = None,
    ):
        if not callable(reward):
            raise RlError(f"reward must be a function or a callable object, got {reward!r}")
        if isinstance(reward, type):
            raise RlError(
                f"reward must be a function or an object; {reward.__name__!r} is a class: make an object of it"
            )
        if isinstance(reward, Guarded):
            raise RlError("the reward is guarded already: give one guard its options, and not another one around it")
        for name, value in (("item_timeout_s", item_timeout_s), ("batch_timeout_s", batch_timeout_s)):
            if not _is_number(value) or not 0 < value < inf:
                raise RlError(f"{name} must be a number of seconds, more than 0, got {value!r}")
        for name, value in (("workers", workers), ("max_chars", max_chars), ("memory_mb", memory_mb)):
            if type(value) is not int or value < 1:
                raise RlError(f"{name} must be a whole number, 1 or more, got {value!r}")
        if failed is not None and not (_is_number(failed) and isfinite(failed)):
            raise RlError(f"failed must be None or a finite number, got {failed!r}")
        if not hasattr(os, "fork"):
            raise RlError("Guarded needs a system with fork (Linux, macOS); score unguarded here")
        self.reward = reward
        self.item_timeout_s = item_timeout_s
        self.batch_timeout_s = batch_timeout_s
        self.workers = workers
        self.max_chars = max_chars
        self.memory_mb = memory_mb
        self.failed = failed
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)
        self._reset()

    def _reset(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last_error = ""
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _close, self._pool)

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: a copy starts its own workers."""
        return {name: value for name, value in vars(self).items() if name not in _RUNNING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion. Columns, one value a completion, are given item by item; a number, text, mapping
        or set is given whole to each."""
        if completions is None:
            raise RlError("a reward needs completions")
        if not _is_column(completions):
            raise RlError(f"completions must be a list of texts or of chats, got {completions!r}"[:200])
        size = len(completions)
        for name, column in (("prompts", prompts), ("completions", completions)):
            if column is not None:
                columns[name] = column
        split = {name: list(column) for name, column in columns.items() if _is_column(column)}
        for name, column in split.items():
            if len(column) != size:
                raise RlError(f"column {name!r} has {len(column)} values for {size} completions; one each is needed")
        shared = {name: column for name, column in columns.items() if name not in split}
        if trainer_state is not None:
            shared["trainer_state"] = _plain_state(trainer_state)
        wants = {"log_extra": log_extra is not None, "log_metric": log_metric is not None}
        items = [{name: column[i] for name, column in split.items()} for i in range(size)]
        with self._lock:
            if self._owner != os.getpid():  # forked since: the workers belong to the parent
                self._pool, self._owner = [], os.getpid()
                self._finalizer = weakref.finalize(self, _close, self._pool)
            replies = self._score(items, shared, wants)
        self._forward(replies, log_extra, log_metric)
        return [self.failed if reply.value is None else reply.value for reply in replies]

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a run that is continued."""
        return {"counts": dict(self.counts), "last_error": self.last_error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts, self.last_error = Counter(state["counts"]), state["last_error"]

    def close(self) -> None:
        """Ends the workers. The next call starts new ones."""
        with self._lock:
            _close(self._pool)

    def _score(self, items: list[dict[str, Any]], shared: Any, wants: dict[str, bool]) -> list["_Reply"]:
        replies = [_Reply() for _ in items]
        fit = []
        for i, item in enumerate(items):
            if _chars(item["completions"]) > self.max_chars:
                replies[i] = _Reply(outcome="too_long")
            else:
                fit.append(i)
        if fit:
            while len(self._pool) < self.workers:
                self._pool.append(_Worker(self.reward, self.memory_mb))
            deadline = time.monotonic() + WORK_SHARE * self.batch_timeout_s
            fair = max(FIRST_LOOK_S, self.batch_timeout_s * self.workers / len(fit) / 2)
            limit = min(fair, self.item_timeout_s)
            spare = WARM_SHARE * self.batch_timeout_s * self.workers
            rounds = _Rounds(self._pool, items, replies, shared, wants, self.item_timeout_s, spare)
            while fit:
                rounds.run(deque(fit), limit, deadline)
                late = [i for i in fit if replies[i].outcome == "timeout"]
                fit = late if limit < self.item_timeout_s and time.monotonic() < deadline else []
                limit = min(2 * limit, self.item_timeout_s)
        return replies

    def _forward(self, replies: list["_Reply"], log_extra: Any, log_metric: Any) -> None:
        for reply in replies:
            self.counts[reply.outcome] += 1
            self.last_error = reply.error or self.last_error
        if log_metric is not None:
            for reply in replies:
                for name, value in reply.metrics:
                    log_metric(name, value)
                log_metric("guard/failed", float(reply.value is None))
        if log_extra is not None:
            for name in dict.fromkeys(name for reply in replies for name in reply.extra):
                log_extra(name, [reply.extra.get(name) for reply in replies])
            log_extra("guard", [reply.outcome for reply in replies])


_RUNNING = ("counts", "last_error", "_lock", "_pool", "_owner", "_finalizer")


@dataclass
class _Reply:
    value: float | None = None
    outcome: str = "batch_timeout"
    error: str = ""
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class _Worker:
    """One keeper process, and the channel to the child that it has forked last."""

    def __init__(self, reward: Callable[..., Any], memory_mb: int):
        self.reward, self.memory_mb = reward, memory_mb
        if guard_worker.loading_script:
            raise RlError(
                "a worker that loads the reward from this script would train, too: put the training under "
                'if __name__ == "__main__": or the reward into a module'
            )
        self.first_s: float | None = None  # what the first item of a new child takes; None: nothing is known
        self.silent = 0  # new children in a row that were late with their first item
        try:
            pickled = pickle.dumps(reward)
        except Exception as error:
            raise RlError(f"the reward cannot be pickled ({error}): define it at the top level of a module") from error
        self.control, theirs = socket.socketpair()
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        path = [entry for entry in sys.path if isinstance(entry, str)]  # Python itself passes over all others
        command = [sys.executable, "-c", _BOOT, json.dumps(path), str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        theirs.close()
        script = getattr(sys.modules.get("__main__"), "__file__", None)
        try:
            self.control.settimeout(START_TIMEOUT_S)
            write_message(self.control, pickle.dumps((pickled, script and os.path.abspath(script), memory_mb)))
            said = (read_message(self.control) or b"the worker died while it loaded the reward").decode()
        except OSError as error:
            said = f"{type(error).__name__} {error}"
        if said != "ready":
            self.close()
            raise RlError(f"a worker could not load the reward: {said}")
        self.channel = self._fork()

    def _fork(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        socket.send_fds(self.control, [b"f"], [theirs.fileno()])
        theirs.close()
        self.fresh = True
        return ours

    def renew(self) -> None:
        """Kills the child with all it started, and forks another."""
        self.channel.close()
        self.channel = self._fork()

    def replacement(self) -> "_Worker":
        """Ends this keeper and starts another."""
        self.close()
        return _Worker(self.reward, self.memory_mb)

    def close(self) -> None:
        """Ends the keeper, which ends its child first."""
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _close(pool: list[_Worker]) -> None:
    while pool:
        worker = pool.pop()
        worker.channel.close()
        worker.close()


class _Rounds:
    """Passes over the items that are left: hands out chunks, reads replies, kills what is late.

    most: the item limit in seconds. spare: worker-seconds for finding out what a new child needs to get ready.
    """

    def __init__(
        self,
        pool: list[_Worker],
        items: Any,
        replies: list[_Reply],
        shared: Any,
        wants: dict[str, bool],
        most: float,
        spare: float,
    ):
        self.pool, self.items, self.replies, self.shared, self.wants = pool, items, replies, shared, wants
        self.most, self.spare = most, spare
        self.busy: dict[int, _Job] = {}  # by place in the pool

    def run(self, queue: deque[int], limit: float, deadline: float) -> None:
        self.selector = selectors.DefaultSelector()
        try:
            while (queue or self.busy) and time.monotonic() < deadline:
                for place in range(len(self.pool)):
                    if queue and place not in self.busy:
                        self._hand_out(place, queue, limit)
                if not self.busy:
                    continue
                until = min(deadline, *(job.late_at for job in self.busy.values()))
                for key, _ in self.selector.select(max(0.0, until - time.monotonic())):
                    self._read(key.data, queue, limit)
                now = time.monotonic()
                for place, job in list(self.busy.items()):
                    if job.late_at <= now < deadline:
                        self._not_ready(self.pool[place], limit)
                        self._fail(place, queue, "timeout", f"no reply within {job.late_at - job.since:.3g} s")
        finally:  # whatever still runs is late for the batch
            for place in list(self.busy):
                self._stop(place)
            self.selector.close()

    def _hand_out(self, place: int, queue: deque[int], limit: float) -> None:
        indices = deque(queue.popleft() for _ in range(min(CHUNK, len(queue))))
        try:
            payload = pickle.dumps(([self.items[i] for i in indices], self.shared, self.wants))
        except Exception as error:
            raise RlError(f"a column of the data set cannot be sent to the reward: {error}") from error
        worker = self.pool[place]
        worker.channel.settimeout(max(self.most, 1.0))
        now = time.monotonic()
        self.busy[place] = _Job(indices, now, now + self._first_limit(worker, limit))
        self.selector.register(worker.channel, selectors.EVENT_READ, place)
        try:
            write_message(worker.channel, payload)
        except OSError as error:
            self._fail(place, queue, "crash", f"the worker is gone: {error}")

    def _read(self, place: int, queue: deque[int], limit: float) -> None:
        try:
            message = read_message(self.pool[place].channel)
            if message is None:
                raise EOFError("the reward ended its process")
            reply = _Reply(**json.loads(message))
        except (OSError, EOFError, ValueError, TypeError) as error:
            self._fail(place, queue, "crash", str(error))
            return
        job, worker, now = self.busy[place], self.pool[place], time.monotonic()
        if worker.fresh:
            took = now - job.since
            worker.first_s = took if worker.first_s is None else (worker.first_s + took) / 2
            worker.fresh, worker.silent = False, 0
        self.replies[job.indices.popleft()] = reply
        job.since, job.late_at = now, now + limit
        if not job.indices:
            del self.busy[place]
            self.selector.unregister(self.pool[place].channel)

    def _first_limit(self, worker: _Worker, limit: float) -> float:
        """The limit of an item that may be the first of a new child."""
        if not worker.fresh:
            return limit
        if worker.first_s is None:
            return self.most if self.spare > 0 else limit
        return min(self.most, limit + worker.first_s)

    def _not_ready(self, worker: _Worker, limit: float) -> None:
        """A new child was late: its item hangs, or it needs longer to get ready than was known."""
        if not worker.fresh:
            return
        if worker.first_s is None:
            self.spare -= self._first_limit(worker, limit) - limit
        worker.silent += 1
        if worker.silent >= SILENT:
            worker.first_s, worker.silent = None, 0

    def _fail(self, place: int, queue: deque[int], outcome: str, error: str) -> None:
        """The item at hand failed; the rest of the chunk goes back in front."""
        job = self.busy[place]
        self.replies[job.indices.popleft()] = _Reply(outcome=outcome, error=error)
        queue.extendleft(reversed(job.indices))
        self._stop(place)

    def _stop(self, place: int) -> None:
        del self.busy[place]
        self.selector.unregister(self.pool[place].channel)
        try:
            self.pool[place].renew()
        except OSError:  # the keeper itself was killed, by the system for instance
            self.pool[place] = self.pool[place].replacement()


@dataclass
class _Job:
    indices: deque[int]
    since: float  # when the item at hand was begun
    late_at: float


def _is_column(column: Any) -> bool:
    """Whether it holds values in order: a list, an array, a column of a data set."""
    return isinstance(column, Collection) and not isinstance(column, (str, bytes, Mapping, Set))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _chars(completion: Any) -> int:
    if isinstance(completion, str):
        return len(completion)
    if isinstance(completion, dict):
        return sum(map(_chars, completion.values()))
    return sum(map(_chars, completion)) if isinstance(completion, (list, tuple)) else 0


def _plain_state(state: Any) -> SimpleNamespace:
    """The numbers and names of a trainer state (global_step, epoch, ...), without its growing history."""
    plain = (int, float, str, bool, type(None))
    return SimpleNamespace(**{name: value for name, value in vars(state).items() if isinstance(value, plain)})
