"""Multiprocess: run a function in N real processes joined by gloo, and bring back what each returned.

    results = run_ranks(work, 2, "e4m3")      # work(rank, world, "e4m3") in 2 new Python processes; a list of 2 results

The function is named by its module, so it stands at the top level of a test file; arguments and results are pickled.
"""

import itertools
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore


def run_ranks(work: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 120) -> list[Any]:
    """The results, by rank, of `work(rank, world, *arguments)` in `world` processes.

    AssertionError tells what a rank raised, or that it was not done in `timeout_s` seconds. Where gloo cannot connect
    the processes (a busy machine refuses a connection now and then), new ones are tried once.
    """
    try:
        return _run_once(work, world, arguments, timeout_s)
    except _NotConnected:
        return _run_once(work, world, arguments, timeout_s)


class _NotConnected(AssertionError):
    """A rank did not get as far as its work."""


def _run_once(work: Callable[..., Any], world: int, arguments: tuple[Any, ...], timeout_s: float) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = []
        threads, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
        try:
            for rank, (_, sender) in enumerate(pipes):
                process = context.Process(target=_child, args=(sender, folder, work, rank, world, arguments, timeout_s))
                process.start()
                sender.close()
                processes.append(process)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        try:
            return _collect([receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()


def free_port() -> int:
    """A port that nothing listens at, below those that the kernel hands out, and of this test process alone."""
    first = 20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in _NEXT_PORT:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + port % 1000))
            except OSError:
                continue
            return first + port % 1000
    raise AssertionError("unreachable")


_NEXT_PORT = itertools.count(os.getpid() % 1000)


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    deadline = monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    ranks = {receiver: rank for rank, receiver in enumerate(receivers)}
    waiting = list(receivers)
    while waiting and not failures:
        ready = wait(waiting, max(0.0, deadline - monotonic()))
        if not ready:
            failures[-1] = f"ranks {sorted(ranks[receiver] for receiver in waiting)} not done after {timeout_s} s"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            waiting.remove(receiver)
            try:
                succeeded, value = receiver.recv()
            except EOFError:
                succeeded, value = False, "the process ended without a word"
            outcome: dict[int, Any] = results if succeeded else failures
            outcome[ranks[receiver]] = value
    if failures:
        text = "\n".join(f"rank {rank}: {text}" for rank, text in failures.items())
        raise _NotConnected(text) if "connectFullMesh failed" in text else AssertionError(text)
    return [results[rank] for rank in range(len(receivers))]


def _child(
    sender: Connection,
    folder: str,
    work: Callable[..., Any],
    rank: int,
    world: int,
    arguments: tuple[Any, ...],
    timeout_s: float,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        store = FileStore(str(Path(folder) / "store"), world)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        sender.send((True, work(rank, world, *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
