"""The proxy in the place of `deepspeed.comm.comm.cdb`, the object that all DeepSpeed collectives go through.

An entry point (deepspeed_entry_points.py) opens a scope, local to its thread; only inside one the proxy compresses
sums. All other traffic passes by, counted.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from runtime.collectives.attach.deepspeed_library import load
from runtime.collectives.attach.deepspeed_slices import Shapes
from runtime.collectives.counter import Kind, WireCounter
from runtime.collectives.ledger import predict_all_gather
from runtime.errors import WireError

if TYPE_CHECKING:
    from runtime.collectives.attach.deepspeed_entry_points import Attachment


@dataclass(frozen=True)
class Scope:
    """What a wrapped entry point tells the collectives it leads to."""

    attachment: "Attachment"
    shapes: Shapes
    """Of the gradients in the bucket, in their order there."""
    bucket: Tensor | None = None
    """The flat bucket, if slices of it are to be found again."""


class _Proxy:
    """In the place of `deepspeed.comm.comm.cdb`: compresses sums in a scope, counts the rest, passes all else on."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        scope = THREAD.scope
        if scope and scope.attachment.spec and _is_sum(op) and tensor.is_floating_point():
            if async_op:
                raise WireError("DeepSpeed asks for an asynchronous gradient sum", where="deepspeed")
            return scope.attachment.all_reduce(tensor, scope.shapes, group, scope.attachment.spec)
        if counter := _counter():
            kind: Kind = "gradient_full" if scope and _is_sum(op) else "other"
            counter.all_reduce(kind, tensor, dist.get_world_size(group))
        return self.backend.all_reduce(tensor, op, group, async_op)

    def reduce_scatter_tensor(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._refuse_in_scope("reduce_scatter_tensor")
        if counter := _counter():
            kind: Kind = "gradient_full" if THREAD.scope else "other"
            counter.reduce_scatter(kind, input_tensor, dist.get_world_size(_group(2, args, kwargs)))
        return self.backend.reduce_scatter_tensor(output_tensor, input_tensor, *args, **kwargs)

    def reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._refuse_in_scope("reduce")
        if counter := _counter():
            counter.one_to_all("gradient_full" if THREAD.scope else "other", tensor)
        return self.backend.reduce(tensor, *args, **kwargs)

    def broadcast(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if counter := _counter():
            counter.one_to_all("other", tensor)
        return self.backend.broadcast(tensor, *args, **kwargs)

    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count_gather([output_tensor], [input_tensor], _group(0, args, kwargs))
        return self.backend.all_gather_into_tensor(output_tensor, input_tensor, *args, **kwargs)

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count_gather(tensor_list, [tensor], _group(0, args, kwargs))
        return self.backend.all_gather(tensor_list, tensor, *args, **kwargs)

    def all_gather_coalesced(
        self, output_tensors: list[Tensor], input_tensors: list[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        self._count_gather(output_tensors, input_tensors, _group(0, args, kwargs))
        return self.backend.all_gather_coalesced(output_tensors, input_tensors, *args, **kwargs)

    def _count_gather(self, outputs: Sequence[Tensor], shards: Sequence[Tensor], group: Any) -> None:
        """Predicted from the shapes of what is gathered, counted from the shards that are handed over."""
        if counter := _counter():
            world = dist.get_world_size(group)
            gathered = sum(output.numel() * output.itemsize for output in outputs)
            counter.expect("parameter_gather", predict_all_gather(gathered // world, world))
            for shard in shards:
                counter.all_gather([("parameter_gather", shard)], world)

    def _refuse_in_scope(self, name: str) -> None:
        if THREAD.scope and THREAD.scope.attachment.spec:
            raise WireError(f"DeepSpeed sums gradients by {name}, which the wire does not know", where="deepspeed")


class _Thread(threading.local):
    """Which reduction this thread is inside, if any."""

    scope: Scope | None = None


class _Process:
    """Which engine ran last: of the whole process, because autograd runs hooks in threads of its own."""

    running: "Attachment | None" = None


THREAD = _Thread()
PROCESS = _Process()


@contextmanager
def opened(scope: Scope) -> Iterator[None]:
    outer, THREAD.scope = THREAD.scope, scope
    try:
        yield
    finally:
        THREAD.scope = outer


def _counter() -> WireCounter | None:
    """Of the engine whose reduction this is, else of the engine that runs."""
    attachment = THREAD.scope.attachment if THREAD.scope else PROCESS.running
    return attachment.counter if attachment else None


def _group(position: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[position] if len(args) > position else kwargs.get("group")


def _is_sum(op: Any) -> bool:
    return str(op).rpartition(".")[2] == "SUM"


_ORIGINALS: dict[str, Any] = {}


def install_globals() -> None:
    comm, stage3 = load("deepspeed.comm.comm"), load("deepspeed.runtime.zero.stage3")
    if not isinstance(comm.cdb, _Proxy):
        comm.cdb = _Proxy(comm.cdb)
    if stage3.reduce_scatter_coalesced is not _reduce_scatter_coalesced:
        _ORIGINALS["reduce_scatter_coalesced"] = stage3.reduce_scatter_coalesced
        stage3.reduce_scatter_coalesced = _reduce_scatter_coalesced


def remove_globals() -> None:
    if not _ORIGINALS:
        return
    comm, stage3 = load("deepspeed.comm.comm"), load("deepspeed.runtime.zero.stage3")
    if isinstance(comm.cdb, _Proxy):
        comm.cdb = comm.cdb.backend
    stage3.reduce_scatter_coalesced = _ORIGINALS.pop("reduce_scatter_coalesced")


def _reduce_scatter_coalesced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """In the place of the function of that name in DeepSpeed's stage 3."""
    scope = THREAD.scope
    if scope is None or scope.attachment.spec is None or dist.get_world_size(group) == 1:
        original: Callable[..., list[Tensor]] = _ORIGINALS["reduce_scatter_coalesced"]
        return original(tensors, group)
    return scope.attachment.reduce_scatter(tensors, scope.shapes, group, scope.attachment.spec)
