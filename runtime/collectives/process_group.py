"""Process groups that survive a restart and notice a hung rank."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import distributed_c10d

from runtime.errors import WireError


def init_process_group_safely(timeout_s: float = 1800.0, backend: str | None = None) -> None:
    """torch.distributed.init_process_group under torchrun, safe in a restart; nothing if it is initialized already.

    After a restart the store still holds the addresses that the dead processes left, and gloo connects to them: 11 of
    16 restarts failed so. Here each restart has its own prefix in the store. `backend` None: nccl with CUDA, else gloo.
    """
    if dist.is_initialized():
        return
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise WireError("no process group to join", got=f"no {', '.join(missing)} in the environment", hint="torchrun")
    rank, world, host, port = (os.environ[name] for name in needed)
    is_server = rank == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    try:
        server = TCPStore(host, int(port), int(world), is_server, timeout, multi_tenant=True)
        store = PrefixStore(f"lpcompile/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(world), timeout=timeout)
    except dist.DistError as error:
        raise WireError(
            "the ranks did not all join",
            where=f"rank {rank}, at {host}:{port}",
            expected=f"{world} ranks within {timeout_s:g} s",
            got=str(error).partition("\n")[0][:200],
            hint="what the other ranks said before they ended",
        ) from None


def set_group_timeouts(timeout_s: float) -> None:
    """Give every process group this timeout, in seconds; call it after `initialize`.

    DeepSpeed hands its timeout to the world group only. Its data-parallel groups keep torch's 30 minutes, and a hung
    rank stays unnoticed for as long.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
