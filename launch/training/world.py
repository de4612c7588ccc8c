"""The world of a worker: who it is among the ranks, on which device, and the process group that joins them."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from launch.training.config import ConfigError, RunConfig
from launch.training.last_words import told
from launch.training.watch import Watch
from runtime.collectives.attach.deepspeed import detach_all
from runtime.collectives.process_group import init_process_group_safely, set_group_timeouts
from runtime.errors import LpError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank's place. Invariant: `0 <= rank < size`."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    restart: int  # how often torchrun has restarted the workers
    watch: Watch

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every rank. An LpError is a value too: it is raised on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], LpError):
            box[0].is_of_all_ranks = True
            raise box[0]
        return box[0]

    def from_first_or_raise(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; its LpError is everybody's."""
        made: T | LpError | None = None
        if self.is_first:
            try:
                made = make()
            except LpError as error:
                made = error
        return self.from_first(made)  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, by rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self, folder: Path | str = "") -> Iterator[None]:
        """Work that may fail on one rank alone: if it does, every rank raises what that rank would have.

        Of errors that are no sentence yet, those of the disk of `folder` become one; others are raised where they are.
        """
        mine: LpError | None = None
        try:
            yield
        except LpError as error:
            mine = error
        except Exception as error:
            mine = told(error, folder)
            if mine is None:
                raise
        told_by = self.gathered(mine)
        for rank, failure in enumerate(told_by):
            if failure is not None:
                if len({str(each) for each in told_by}) > 1:  # not everybody's
                    failure.args = (f"rank {rank}: {failure}",)
                failure.is_of_all_ranks = True
                raise failure

    def largest(self, number: float) -> float:
        tensor = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.item()


@contextmanager
def join_world(config: RunConfig) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment; always leave it again.

    A process that ends without leaving can be aborted by its communication threads after its work is done, and torchrun
    then restarts a finished run.
    """
    size, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.nproc is not None and config.nproc != size:
        raise ConfigError(
            "this worker runs under torchrun, which has set the number of workers",
            where=f"--nproc {config.nproc}",
            expected=str(size),
            hint="leaving --nproc out",
        )
    device = _device(config, local_size)
    watch = Watch()
    watch.start()
    try:
        init_process_group_safely(config.timeout, "nccl" if device.type == "cuda" else "gloo")
        watch.join()
        yield World(
            watch=watch,
            rank=int(os.environ["RANK"]),
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            device=device,
            restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    finally:
        watch.stop()
        detach_all()
        gc.collect()  # engines hold groups in cycles, and a group that outlives this point can abort the process
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def lone_world(device: torch.device) -> Iterator[World]:
    """A world of this process alone, without torchrun, for many runs one after another (`--engine none`)."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield World(rank=0, size=1, local_rank=0, device=device, restart=0, watch=Watch(0, 1))
    finally:
        gc.collect()
        dist.destroy_process_group()


def bound_waiting(config: RunConfig) -> None:
    """Give every process group, also those an engine has made with defaults of its own, the run's timeout."""
    set_group_timeouts(config.timeout)


def _device(config: RunConfig, local_size: int) -> torch.device:
    available = torch.cuda.device_count()
    if config.device == "cuda" and available < local_size:
        raise ConfigError("there are too few GPUs", where="--device cuda", expected=f"{local_size}", got=f"{available}")
    if config.device == "cpu" or available < local_size:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
