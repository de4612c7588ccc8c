"""Watch: a thread of every worker that says it is alive, and ends the worker when whoever started it is gone.

    every second: alive/RANK in the store += 1, once the ranks have joined
                  the parent is another process than at the start: end

A rank whose count stands still while others wait for it is frozen: its whole process is (stopped, swapping, debugged).
One whose count goes on is busy or waits itself.
"""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from torch.distributed import distributed_c10d

from launch import PARENT

_BEAT_S = 1.0


class Watch:
    """The heart of this worker, and its view of the others'. For the time in which it joins them and is joined."""

    def __init__(self, rank: int | None = None, size: int | None = None) -> None:
        """None: what torchrun says."""
        self._heart: Any = None
        self._rank = int(os.environ["RANK"]) if rank is None else rank
        self._size = int(os.environ["WORLD_SIZE"]) if size is None else size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def start(self) -> None:
        """Call it before the process group is there: to wait for others may take long."""
        self._thread.start()

    def join(self) -> None:
        """Call it when the process group is there: its store is what the beats go through."""
        self._store().set(f"who/{self._rank}", f"{socket.gethostname()} {os.getpid()}")
        self._heart = self._store()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def find_frozen(self) -> list[int]:
        """The ranks that are not heard of for three beats."""
        before = self._beats()
        time.sleep(3 * _BEAT_S)
        after = self._beats()
        return [rank for rank in range(self._size) if rank != self._rank and before[rank] == after[rank]]

    def end_frozen(self, rank: int) -> None:
        """Kill a frozen rank if it is a process of this machine: nothing else reaches a stopped one, and whoever
        started the workers would wait for it.
        """
        host, _, pid = self._store().get(f"who/{rank}").decode().partition(" ")
        if host == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def _beats(self) -> list[int]:
        store = self._store()
        return [store.add(f"alive/{rank}", 0) for rank in range(self._size)]

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_S):
            if os.getppid() != PARENT:
                os._exit(1)
            with suppress(RuntimeError):  # the store's owner ends: so will this worker
                if self._heart:
                    self._heart.add(f"alive/{self._rank}", 1)

    @staticmethod
    def _store() -> Any:
        """A connection of its own: the group's may be held by whatever waits."""
        store: Any = distributed_c10d._get_default_store()
        return store.clone()
