"""DeepSpeed: ZeRO 0 to 3 average their gradients over the compressed wire.

    stage 0      engine.allreduce_bucket            all-reduce
    stage 1, 2   optimizer.average_tensor           each slice to its owner, or all-reduce if reduce_scatter is off
    stage 3      optimizer.__avg_scatter_grads      reduce-scatter, or all-reduce in the contiguous form

DeepSpeed has no hook for this. These entry points are wrapped on the instance: inside them a thread-local scope is
open, and only there the proxy in the place of `deepspeed.comm.comm.cdb`, the object that all DeepSpeed collectives go
through, compresses sums. All other traffic passes by, counted. Whatever the wrappers do not know is a WireError, never
silence. This is the only file that imports deepspeed. Written against DeepSpeed 0.19.
"""

import importlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import Kind, WireCounter
from runtime.collectives.exchange import (
    Lanes,
    Link,
    Tamper,
    all_reduce_lanes,
    flatten,
    reduce_to_owners,
    unflatten_into,
)
from runtime.collectives.ledger import (
    Load,
    Traffic,
    predict_all_gather,
    predict_all_reduce,
    predict_reduce_scatter,
    predict_reduce_to_owners,
)
from runtime.errors import WireError

Shapes = Sequence[Sequence[int]]


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], lr_scheduler: Any = None
) -> Any:
    """The engine of deepspeed.initialize, without its JIT build and its chatter.

    The shared-memory op that DeepSpeed compiles at every start (100 s, and no start at all without a compiler) serves
    inference only: switched off. With no CUDA the CPU accelerator is named. Its log shows warnings and up.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=r".*torch\.distributed.* is deprecated", category=FutureWarning)
    deepspeed = _import("deepspeed")
    for name in ("deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _import("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=parameters, lr_scheduler=lr_scheduler, config=config
    )
    return engine


def attach_deepspeed(engine: Any, spec: WireSpec | None, counter: WireCounter, tamper: Tamper | None = None) -> None:
    """Send `engine`'s gradients in `spec`, or as DeepSpeed does if None, and count the bytes either way.

    `counter` also gets the parameter gathers and all other traffic of this engine from here on. Attaching again
    replaces; `detach` restores. WireError if the engine reduces gradients in a way that bypasses the entry points.
    """
    detach(engine)
    _refuse_what_bypasses(engine)
    attachment = _Attachment(engine, spec, counter, tamper)
    try:
        attachment.install()
    except WireError:
        attachment.remove()
        raise
    _install_globals()
    _ATTACHED.append(attachment)


def detach(engine: Any) -> None:
    """Give `engine` its own methods back, and with the last one DeepSpeed its globals. Nothing if not attached."""
    for attachment in [attachment for attachment in _ATTACHED if attachment.engine is engine]:
        attachment.remove()
        _ATTACHED.remove(attachment)
    if not _ATTACHED:
        _remove_globals()


def detach_all() -> None:
    """Detach every engine, so that nothing here keeps its process groups alive into the end of the interpreter."""
    for attachment in list(_ATTACHED):
        detach(attachment.engine)


def assert_active(engine: Any) -> None:
    """WireError if no gradient of `engine` has been compressed, though it should: call it after the first step.

    A training run that silently sends full precision is the failure that this catches.
    """
    for attachment in _ATTACHED:
        if attachment.engine is engine:
            if attachment.spec and attachment.num_compressed == 0 and Link(attachment.spec).world > 1:
                raise WireError(
                    "no gradient went over the compressed wire",
                    where="deepspeed",
                    expected=f"gradients in {attachment.spec.format} in every step",
                    got=f"none of {attachment.spec.min_numel} elements and 2 dims, or none through the entry points",
                    hint="calling assert_active after a step, a larger model, or no wire section",
                )
            return
    raise WireError("this engine has no wire attached", hint="attach_deepspeed(engine, spec, counter)")


@dataclass(frozen=True)
class _Scope:
    """What a wrapped entry point tells the collectives it leads to."""

    attachment: "_Attachment"
    shapes: Shapes
    """Of the gradients in the bucket, in their order there."""
    bucket: Tensor | None = None
    """The flat bucket, if slices of it are to be found again."""


class _Attachment:
    """One engine's wrappers, and the way back."""

    def __init__(self, engine: Any, spec: WireSpec | None, counter: WireCounter, tamper: Tamper | None) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.spec, self.counter, self.tamper = spec, counter, tamper
        self.num_compressed = 0
        self._replaced: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        stage = self.engine.zero_optimization_stage()
        mangled = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_"
        if stage == 0:
            self._wrap(self.engine, "allreduce_bucket", self._allreduce_bucket)
        elif stage in (1, 2):
            self._wrap(self.optimizer, "average_tensor", self._average_tensor)
            self._wrap(self.optimizer, "allreduce_and_scatter", self._allreduce_and_scatter)
        else:
            self._wrap(self.optimizer, f"{mangled}grads", self._avg_scatter_grads)
            self._wrap(self.optimizer, f"{mangled}contiguous_grads", self._avg_scatter_contiguous_grads)
        for name in ("forward", "backward", "step"):
            self._wrap(self.engine, name, self._run)

    def remove(self) -> None:
        for owner, name, before in reversed(self._replaced):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._replaced.clear()
        if _PROCESS.running is self:
            _PROCESS.running = None

    def link(self, group: dist.ProcessGroup | None, spec: WireSpec) -> Link:
        return Link(spec, group, self.counter, self.tamper)

    def expect(self, traffic: Traffic) -> None:
        self.counter.expect("gradient_compressed", traffic.compressed)
        self.counter.expect("gradient_full", traffic.full)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name, None)
        if not callable(original):
            raise WireError(
                f"{type(owner).__name__} has no {name}",
                where="deepspeed",
                expected="the entry points of DeepSpeed 0.19",
                got=f"version {_import('deepspeed').__version__}",
            )
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wraps(original)(partial(wrapper, original)))

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Whatever is sent from here on outside a scope is this engine's."""
        _PROCESS.running = self
        return original(*args, **kwargs)

    def _allreduce_bucket(
        self, original: Callable[..., Any], bucket: Sequence[Tensor], dp_group: Any, *args: Any, **kwargs: Any
    ) -> Any:
        shapes = [gradient.shape for gradient in bucket]
        itemsize = self.engine.communication_data_type.itemsize
        self.expect(predict_all_reduce(shapes, itemsize, self.spec, dist.get_world_size(dp_group)))
        with _open(_Scope(self, shapes)):
            return original(bucket, dp_group, *args, **kwargs)

    def _average_tensor(
        self, original: Callable[..., Any], tensor: Tensor, communication_data_type: torch.dtype
    ) -> Any:
        optimizer = self.optimizer
        entries = optimizer.ipg_buckets[communication_data_type].params
        shapes = [optimizer.bit16_groups[group][index].shape for group, index, _ in entries]
        if self.spec is None or not optimizer.reduce_scatter:
            world = dist.get_world_size(optimizer.dp_process_group)
            self.expect(predict_all_reduce(shapes, communication_data_type.itemsize, self.spec, world))
        with _open(_Scope(self, shapes, tensor)):
            return original(tensor, communication_data_type)

    @torch.no_grad()
    def _allreduce_and_scatter(
        self,
        original: Callable[..., Any],
        bucket: Sequence[tuple[Any, ...]],
        communication_data_type: torch.dtype,
        *args: Any,
        divide: bool = True,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        """One all-to-all in which each owner gets its slices; DeepSpeed all-reduces everything and keeps a slice."""
        scope, group = _THREAD.scope, process_group or self.optimizer.dp_process_group
        if self.spec is None or dist.get_world_size(group) == 1:
            original(bucket, communication_data_type, *args, divide=divide, process_group=process_group, **kwargs)
            return
        if scope is None or scope.bucket is None or divide:
            raise WireError("DeepSpeed calls allreduce_and_scatter from an unknown place", where="deepspeed")
        link = self.link(group, self.spec)
        owned: list[_Views] = [_Views([], []) for _ in range(link.world)]
        summed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        mine = _Views([], [])
        for ranks, grad_slice, *output in bucket:
            owner = _only(ranks)
            cuts = _cuts(scope, grad_slice, self.spec)
            owned[owner].add(grad_slice, cuts)
            if owner == link.rank:
                total = torch.empty(grad_slice.shape, dtype=torch.float32, device=grad_slice.device)
                mine.add(total, cuts)
                summed.append((grad_slice, total, output[0] if output else None))
        loads = [
            Load(*(sum(view.numel() for view in views) for views in (part.compressed, part.full))) for part in owned
        ]
        self.expect(predict_reduce_to_owners(loads, communication_data_type.itemsize, self.spec, link.rank))
        lanes = [part.lanes(scope.bucket, communication_data_type) for part in owned]
        mine.fill(self.reduce(lanes, link))
        for grad_slice, total, output_slice in summed:
            self.optimizer._add_to_grad_partition_buffer(output_slice, total)
            grad_slice.copy_(total)

    def _avg_scatter_grads(
        self, original: Callable[..., Any], params: Sequence[Any], communication_data_type: torch.dtype
    ) -> Any:
        shapes = [param.ds_shape for param in params]
        group = self.optimizer._get_param_partition_group(params[0])
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        self.expect(predict_reduce_scatter(shapes, communication_data_type.itemsize, self.spec, world, rank))
        with _open(_Scope(self, shapes)):
            return original(params, communication_data_type)

    def _avg_scatter_contiguous_grads(
        self, original: Callable[..., Any], buffer: Tensor, communication_data_type: torch.dtype
    ) -> Any:
        bucket = self.optimizer.ipg_buckets[communication_data_type]
        shapes = [param.ds_shape for param in bucket.params]
        world = dist.get_world_size(bucket.process_group)
        self.expect(predict_all_reduce(shapes, communication_data_type.itemsize, self.spec, world))
        with _open(_Scope(self, shapes)):
            return original(buffer, communication_data_type)

    @torch.no_grad()
    def all_reduce(self, tensor: Tensor, shapes: Shapes, group: Any, spec: WireSpec) -> None:
        """Sum a flat bucket in place."""
        link, numel = self.link(group, spec), sum(torch.Size(shape).numel() for shape in shapes)
        if tensor.numel() != numel:
            raise WireError(
                "the bucket is not what the entry point said", expected=f"{numel} elements", got=str(tensor.numel())
            )
        if link.world > 1:
            views = _Views([], [])
            views.add(tensor, list(_segments(shapes, spec, 0, numel)))
            self.num_compressed += bool(views.compressed)
            views.fill(all_reduce_lanes(views.lanes(tensor, tensor.dtype), link))

    @torch.no_grad()
    def reduce_scatter(self, tensors: Sequence[Tensor], shapes: Shapes, group: Any, spec: WireSpec) -> list[Tensor]:
        """The mean over ranks of this rank's part of each tensor: ceil(n / W) elements, the last shorter or empty.

        Nothing is padded. DeepSpeed pads with uninitialized memory, and one 3e38 there sets the scale of a block.
        """
        link = self.link(group, spec)
        owned = [_Views([], []) for _ in range(link.world)]
        for tensor, shape in zip(tensors, shapes):
            parts = _parts(tensor.reshape(-1), link.world)
            for views, part in zip(owned, parts):
                (views.compressed if spec.compresses(shape) else views.full).append(part)
        outputs = [torch.empty_like(_parts(tensor.reshape(-1), link.world)[link.rank]) for tensor in tensors]
        total = self.reduce([views.lanes(tensors[0], tensors[0].dtype) for views in owned], link)
        mine = _Views([], [])
        for output, shape in zip(outputs, shapes):
            (mine.compressed if spec.compresses(shape) else mine.full).append(output)
        mine.fill(Lanes(*(lane.div_(link.world) for lane in total)))
        return outputs

    def reduce(self, owned: Sequence[Lanes], link: Link) -> Lanes:
        self.num_compressed += any(lanes.compressed.numel() for lanes in owned)
        return reduce_to_owners(owned, link)


@dataclass(frozen=True)
class _Views:
    """Views into gradients, by how they travel."""

    compressed: list[Tensor]
    full: list[Tensor]

    def add(self, flat: Tensor, cuts: Sequence[tuple[int, int, bool]]) -> None:
        for start, stop, is_compressed in cuts:
            (self.compressed if is_compressed else self.full).append(flat[start:stop])

    def lanes(self, like: Tensor, full_dtype: torch.dtype) -> Lanes:
        return Lanes(flatten(self.compressed, like), flatten(self.full, like).to(full_dtype))

    def fill(self, total: Lanes) -> None:
        unflatten_into(self.compressed, total.compressed)
        unflatten_into(self.full, total.full)


def _segments(shapes: Shapes, spec: WireSpec, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    """(from, to, compressed) of the gradients in [start, stop) of the flat bucket, counted from `start`."""
    low = 0
    for shape in shapes:
        high = low + torch.Size(shape).numel()
        if max(low, start) < min(high, stop):
            yield max(low, start) - start, min(high, stop) - start, spec.compresses(shape)
        low = high


def _cuts(scope: _Scope, grad_slice: Tensor, spec: WireSpec) -> list[tuple[int, int, bool]]:
    """`_segments` of a slice of the scope's bucket, found by its place in the memory they share."""
    bucket = scope.bucket
    assert bucket is not None
    start = int(grad_slice.storage_offset() - bucket.storage_offset())
    same_memory = grad_slice.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
    cuts = list(_segments(scope.shapes, spec, start, start + grad_slice.numel()))
    if not same_memory or sum(stop - begin for begin, stop, _ in cuts) != grad_slice.numel():
        raise WireError("a gradient slice is not in the bucket that is reduced", where="deepspeed")
    return cuts


def _parts(flat_N: Tensor, world: int) -> list[Tensor]:
    size = -(-flat_N.numel() // world)
    return [flat_N[rank * size : (rank + 1) * size] for rank in range(world)]


def _only(ranks: Any) -> int:
    owners = list(ranks) if isinstance(ranks, frozenset) else [ranks]
    if len(owners) != 1:
        raise WireError(
            "a gradient slice has several owners, as Muon's split matrices do", where="deepspeed", got=str(owners)
        )
    return int(owners[0])


class _Proxy:
    """In the place of `deepspeed.comm.comm.cdb`: compresses sums in a scope, counts the rest, passes all else on."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        scope = _THREAD.scope
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
            kind: Kind = "gradient_full" if _THREAD.scope else "other"
            counter.reduce_scatter(kind, input_tensor, dist.get_world_size(_group(2, args, kwargs)))
        return self.backend.reduce_scatter_tensor(output_tensor, input_tensor, *args, **kwargs)

    def reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._refuse_in_scope("reduce")
        if counter := _counter():
            counter.one_to_all("gradient_full" if _THREAD.scope else "other", tensor)
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
                counter.all_gather({"parameter_gather": shard}, world)

    def _refuse_in_scope(self, name: str) -> None:
        if _THREAD.scope and _THREAD.scope.attachment.spec:
            raise WireError(f"DeepSpeed sums gradients by {name}, which the wire does not know", where="deepspeed")


class _Thread(threading.local):
    """Which reduction this thread is inside, if any."""

    scope: _Scope | None = None


class _Process:
    """Which engine ran last: of the whole process, because autograd runs hooks in threads of its own."""

    running: _Attachment | None = None


_THREAD = _Thread()
_PROCESS = _Process()
_ATTACHED: list[_Attachment] = []


@contextmanager
def _open(scope: _Scope) -> Iterator[None]:
    outer, _THREAD.scope = _THREAD.scope, scope
    try:
        yield
    finally:
        _THREAD.scope = outer


def _counter() -> WireCounter | None:
    """Of the engine whose reduction this is, else of the engine that runs."""
    attachment = _THREAD.scope.attachment if _THREAD.scope else _PROCESS.running
    return attachment.counter if attachment else None


def _group(position: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[position] if len(args) > position else kwargs.get("group")


def _is_sum(op: Any) -> bool:
    return str(op).rpartition(".")[2] == "SUM"


def _refuse_what_bypasses(engine: Any) -> None:
    """WireError for every configuration whose gradients would not pass the entry points."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    rules = [
        (engine.is_deepcompile_enabled() or engine.is_deepcompile_active(), "compile.deepcompile", "leaving it off"),
        (engine.pipeline_parallelism, "pipeline parallelism", "plain data parallelism"),
        (
            hasattr(optimizer, "get_grads_for_reduction"),
            "BF16_Optimizer, whose buckets hide the shapes",
            "stage 2 or 3",
        ),
        (getattr(optimizer, "all2all_process_group", None) is not None, "zero_quantized_gradients", "leaving it off"),
    ]
    if stage in (1, 2):
        uses_all_reduce = optimizer.use_multi_rank_bucket_allreduce
        rules += [
            (not uses_all_reduce, "use_multi_rank_bucket_allreduce: false", "true, the default"),
            (not optimizer.contiguous_gradients, "contiguous_gradients: false", "true, the default"),
        ]
    for applies, what, hint in rules:
        if applies:
            raise WireError(f"gradients bypass the wire with {what}", where="deepspeed config", hint=hint)


_ORIGINALS: dict[str, Any] = {}


def _install_globals() -> None:
    comm, stage3 = _import("deepspeed.comm.comm"), _import("deepspeed.runtime.zero.stage3")
    if not isinstance(comm.cdb, _Proxy):
        comm.cdb = _Proxy(comm.cdb)
    if stage3.reduce_scatter_coalesced is not _reduce_scatter_coalesced:
        _ORIGINALS["reduce_scatter_coalesced"] = stage3.reduce_scatter_coalesced
        stage3.reduce_scatter_coalesced = _reduce_scatter_coalesced


def _remove_globals() -> None:
    if not _ORIGINALS:
        return
    comm, stage3 = _import("deepspeed.comm.comm"), _import("deepspeed.runtime.zero.stage3")
    if isinstance(comm.cdb, _Proxy):
        comm.cdb = comm.cdb.backend
    stage3.reduce_scatter_coalesced = _ORIGINALS.pop("reduce_scatter_coalesced")


def _reduce_scatter_coalesced(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """In the place of the function of that name in DeepSpeed's stage 3."""
    scope = _THREAD.scope
    if scope is None or scope.attachment.spec is None or dist.get_world_size(group) == 1:
        original: Callable[..., list[Tensor]] = _ORIGINALS["reduce_scatter_coalesced"]
        return original(tensors, group)
    return scope.attachment.reduce_scatter(tensors, scope.shapes, group, scope.attachment.spec)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WireError(
            "the DeepSpeed engine needs deepspeed", got=str(error), hint="pip install 'lpcompile[deepspeed]'"
        ) from error
