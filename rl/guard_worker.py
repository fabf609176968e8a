"""The child side of `krontune.rl.guard`: a keeper that loads the reward once, and the children it forks.

Nothing here or in what it imports may import torch: the start of a worker is what this costs.
"""

import asyncio
import gc
import inspect
import io
import json
import math
import os
import pickle
import resource
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

_LENGTH = struct.Struct("!Q")
_MESSAGE_CHARS = 500
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux

loading_script = False
"""Whether this process is a worker that runs the trainer's script to find the reward in it."""


def write_message(channel: socket.socket, payload: bytes) -> None:
    """Sends one length-prefixed message."""
    channel.sendall(_LENGTH.pack(len(payload)) + payload)


def read_message(channel: socket.socket) -> bytes | None:
    """The next message, or None where the other side has closed."""
    head = _read(channel, _LENGTH.size)
    return None if head is None else _read(channel, _LENGTH.unpack(head)[0])


def _read(channel: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def keep(descriptor: int) -> None:
    """The keeper: loads the reward, then forks a child for every channel it is sent, killing the one before.

    It ends, and its child with it, when the trainer closes the control channel or is gone.
    """
    with suppress(OSError):  # the trainer is gone
        _keep(socket.socket(fileno=descriptor), os.getppid())


def _keep(control: socket.socket, trainer: int) -> None:
    sent = read_message(control)
    if sent is None:
        return
    pickled, script, memory_mb = pickle.loads(sent)
    try:
        reward = _Loader(io.BytesIO(pickled), script).load()
    except BaseException as error:
        write_message(control, f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS].encode())
        return
    gc.freeze()  # or the first collection of each child would copy all that was loaded
    write_message(control, b"ready")
    child = 0
    try:
        while os.getppid() == trainer:
            if not select.select([control], [], [], 1.0)[0]:
                continue
            told, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if child:
                child = _kill(child)
            if not told:
                return
            child = _fork(reward, control, descriptors[0], memory_mb)
    finally:
        if child:
            _kill(child)


def _fork(reward: Callable[..., Any], control: socket.socket, descriptor: int, memory_mb: int) -> int:
    keeper = os.getpid()
    child = os.fork()
    if child:
        os.close(descriptor)
        return child
    try:
        os.setsid()  # so that what the reward starts is killed with it
        _die_with(keeper)
        control.close()
        limit_memory(memory_mb)
        serve(reward, socket.socket(fileno=descriptor))
    finally:
        os._exit(0)


def _kill(child: int) -> int:
    apart = list(_started_by(child))  # what has made a session of its own is not in the group
    for kill in (os.killpg, os.kill):  # the group does not exist yet in a child that has only just been forked
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    for pid in apart:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0


def _started_by(pid: int) -> Iterator[int]:
    """What a process has started and what that has started (Linux; elsewhere nothing is found)."""
    with suppress(OSError):  # it has ended since
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                for child in map(int, children.read().split()):
                    yield child
                    yield from _started_by(child)


def _die_with(keeper: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(0)


def limit_memory(memory_mb: int) -> None:
    """Caps the address space at what is mapped now and `memory_mb` more (Linux; elsewhere nothing is capped)."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        limit = mapped + memory_mb * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(reward: Callable[..., Any], channel: socket.socket) -> None:
    """Scores chunk after chunk and answers item by item, until the channel closes."""
    me = os.getpid()
    while (message := read_message(channel)) is not None:
        items, shared, wants = pickle.loads(message)
        for item in items:
            reply = _score(reward, item, shared, wants)
            if os.getpid() != me:
                return  # the reward has forked and come back twice: a second answer would be taken for the next item's
            write_message(channel, json.dumps(reply).encode())


def _score(reward: Callable[..., Any], item: dict[str, Any], shared: Any, wants: dict[str, bool]) -> dict[str, Any]:
    metrics: list[tuple[str, float]] = []
    extra: dict[str, Any] = {}
    logs: dict[str, Any] = {}
    if wants["log_metric"]:
        logs["log_metric"] = lambda name, value: metrics.append((str(name), float(value)))
    if wants["log_extra"]:
        logs["log_extra"] = lambda name, column: extra.update({str(name): _plain(column[0])})
    try:
        rewards = reward(**{name: [value] for name, value in item.items()}, **shared, **logs)
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
        rewards = _listed(rewards)
        if len(rewards) != 1:
            raise ValueError(f"the reward gave {len(rewards)} values for 1 completion")
        value = None if rewards[0] is None else float(rewards[0])
        if value is not None and not math.isfinite(value):  # one NaN makes all advantages of its group NaN
            raise ValueError(f"the reward gave {value}, which is no finite number")
    except BaseException as error:  # math-verify's time out, for one, is no Exception
        message = f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
        return {"outcome": "exception", "error": message}
    return {"value": value, "outcome": "scored", "metrics": metrics, "extra": extra}


def _listed(rewards: Any) -> list[Any]:
    try:
        return list(rewards)
    except TypeError:
        raise TypeError(f"the reward gave {rewards!r:.80}, which is no list of one number a completion") from None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class _Loader(pickle.Unpickler):
    """Unpickles the reward; runs the trainer's script, as `__mp_main__`, only where the reward comes from it."""

    def __init__(self, file: io.BytesIO, script: str | None):
        super().__init__(file)
        self.script = script
        self.names: dict[str, Any] | None = None

    def find_class(self, module: str, name: str) -> Any:
        global loading_script
        if module not in ("__main__", "__mp_main__"):  # the second in a process that multiprocessing has spawned
            return super().find_class(module, name)
        if self.script is None:
            raise RuntimeError(f"{name} was defined in a notebook or on a prompt: put it into a module and import it")
        if self.names is None:
            loading_script = True
            self.names = runpy.run_path(self.script, run_name="__mp_main__")
            loading_script = False
        return self.names[name]
