"""The processes of one run, as `accelerate launch` starts them: the first decides, writes and speaks."""

import os
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, TypeVar

T = TypeVar("T")

POLL_S = 0.1
LAST_WORD_S = 10.0  # that the others leave to the process that says why the run ends


class AnotherProcessFailed(RuntimeError):
    """The run has ended in another of its processes, which says why."""


class Processes:
    """This process among those of its run: `rank` of `count`, 0 of 1 without a launcher.

    They talk through the key-value store of the launch and not by collectives: a process that waits for hours while
    the first selects or verifies looks there a few times a second. It keeps no device busy, has no timeout, can be
    interrupted, and sees at once where another has failed. The collectives, of the trainers alone, keep theirs.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._turn = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that writes the run folder and the terminal."""
        return self.rank == 0

    def join(self, timeout_s: float) -> None:
        """Make the group of the trainers' collectives, and take this process's device. All processes call it.

        timeout_s: of a collective, see `ddp_timeout` of transformers.
        """
        if self.count == 1:
            return
        import torch
        from accelerate import PartialState

        if self.first and not torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            print("no accelerator: on a CPU nothing is sharded, the processes train as with ddp", file=sys.stderr)
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(seconds=timeout_s))

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called. All processes call it in one order.

        Raises:
            AnotherProcessFailed: there is nothing to wait for any more.
        """
        if self.count == 1:
            return make()
        self._turn += 1
        key = f"agreed/{self._turn}"
        if self.first:
            made = make()
            self._store.set(key, pickle.dumps(made))
            return made
        return pickle.loads(self._wait(key))

    def collect(self, value: T) -> list[T]:
        """The values of all processes by rank, in the first; nothing in the others, which do not wait."""
        if self.count == 1:
            return [value]
        self._turn += 1
        if not self.first:
            self._store.set(f"collected/{self._turn}/{self.rank}", pickle.dumps(value))
            return []
        others = range(1, self.count)
        return [value, *(pickle.loads(self._wait(f"collected/{self._turn}/{rank}")) for rank in others)]

    def fail(self, code: int) -> tuple[bool, int]:
        """Say that this process has failed, with this exit code: whether it is the first that did, and so the one to
        tell why, and the code of that one."""
        if self.count == 1:
            return True, code
        try:
            rank, code_of_first = self._store.compare_set("failed", "", f"{self.rank} {code}").split()
        except Exception:  # the launcher, which keeps the store, is gone, or was never there
            return True, code
        return int(rank) == self.rank, int(code_of_first)

    def told(self) -> None:
        """Let the others go, now that it is said why the run ends: the launcher kills all when the first is gone."""
        if self.count > 1:
            try:
                self._store.set("told", "")
            except Exception:
                pass

    def wait_until_told(self) -> None:
        end = time.monotonic() + LAST_WORD_S
        try:
            while time.monotonic() < end and not self._store.check(["told"]):
                time.sleep(POLL_S)
        except Exception:
            pass

    def leave(self) -> None:
        """The orderly end, after which there are no collectives."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def _wait(self, key: str) -> Any:
        while not self._store.check([key]):
            if self._store.check(["failed"]):
                raise AnotherProcessFailed("another process of the run has failed")
            time.sleep(POLL_S)
        return self._store.get(key)

    @cached_property
    def _store(self) -> Any:
        from torch.distributed import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        from .run_folder import RunError

        try:
            store, _, _ = next(rendezvous("env://"))
        except ValueError as error:
            raise RunError(
                f"WORLD_SIZE is {self.count}, so this is one of {self.count} processes, but no launcher has told it "
                f"how to reach the others ({error}). Start it with accelerate launch, or unset WORLD_SIZE."
            ) from error
        return PrefixStore("krontune", store)


@cache
def processes() -> Processes:
    """Of this run."""
    return Processes()
