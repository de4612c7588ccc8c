"""Entry points: where DeepSpeed sums gradients, wrapped on one engine's objects.

    stage 0      engine.allreduce_bucket            all-reduce
    stage 1, 2   optimizer.average_tensor           each slice to its owner, or all-reduce if reduce_scatter is off
    stage 3      optimizer.__avg_scatter_grads      reduce-scatter, or all-reduce in the contiguous form

DeepSpeed has no hook for this. Inside a wrapper a scope is open (deepspeed_proxy.py). Whatever the wrappers do not know
is a WireError, never silence. Written against DeepSpeed 0.19.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.collectives.attach.deepspeed_library import load
from runtime.collectives.attach.deepspeed_proxy import PROCESS, THREAD, Scope, opened
from runtime.collectives.attach.deepspeed_slices import Shapes, cuts_of, only_owner, parts_of, segments
from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import (
    Bundle,
    Lane,
    Link,
    Tamper,
    all_reduce_lanes,
    open_link,
    reduce_to_owners,
)
from runtime.collectives.ledger import (
    Traffic,
    predict_all_reduce,
    predict_reduce_scatter,
    predict_reduce_to_owners,
)
from runtime.errors import WireError


class Attachment:
    """One engine's wrappers, and the way back."""

    def __init__(
        self, engine: Any, spec: WireSpec | None, counter: WireCounter, tamper: Tamper | None, check: bool
    ) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.spec, self.counter, self.tamper, self.check = spec, counter, tamper, check
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
        if PROCESS.running is self:
            PROCESS.running = None

    def link(self, group: dist.ProcessGroup | None) -> Link:
        return open_link(group, self.counter, self.check, self.tamper)

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
                got=f"version {load('deepspeed').__version__}",
            )
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, wraps(original)(partial(wrapper, original)))

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Whatever is sent from here on outside a scope is this engine's."""
        PROCESS.running = self
        return original(*args, **kwargs)

    def _allreduce_bucket(
        self, original: Callable[..., Any], bucket: Sequence[Tensor], dp_group: Any, *args: Any, **kwargs: Any
    ) -> Any:
        shapes = [gradient.shape for gradient in bucket]
        dtype = self.engine.communication_data_type
        self.expect(predict_all_reduce(shapes, dtype, self.spec, dist.get_world_size(dp_group)))
        with opened(Scope(self, shapes)):
            return original(bucket, dp_group, *args, **kwargs)

    def _average_tensor(
        self, original: Callable[..., Any], tensor: Tensor, communication_data_type: torch.dtype
    ) -> Any:
        optimizer = self.optimizer
        entries = optimizer.ipg_buckets[communication_data_type].params
        shapes = [optimizer.bit16_groups[group][index].shape for group, index, _ in entries]
        if self.spec is None or not optimizer.reduce_scatter:
            world = dist.get_world_size(optimizer.dp_process_group)
            self.expect(predict_all_reduce(shapes, communication_data_type, self.spec, world))
        with opened(Scope(self, shapes, tensor)):
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
        scope, group = THREAD.scope, process_group or self.optimizer.dp_process_group
        if self.spec is None or dist.get_world_size(group) == 1:
            original(bucket, communication_data_type, *args, divide=divide, process_group=process_group, **kwargs)
            return
        if scope is None or scope.bucket is None or divide:
            raise WireError("DeepSpeed calls allreduce_and_scatter from an unknown place", where="deepspeed")
        link = self.link(group)
        owned = [Bundle() for _ in range(link.world)]
        summed: list[tuple[Tensor, Tensor, Tensor | None]] = []
        mine = Bundle()
        for ranks, grad_slice, *output in bucket:
            owner = only_owner(ranks)
            cuts = cuts_of(scope.bucket, scope.shapes, grad_slice, self.spec, communication_data_type)
            for start, stop, codec in cuts:
                owned[owner].add(codec, grad_slice[start:stop])
            if owner == link.rank:
                total = torch.empty(grad_slice.shape, dtype=torch.float32, device=grad_slice.device)
                for start, stop, codec in cuts:
                    mine.add(codec, total[start:stop])
                summed.append((grad_slice, total, output[0] if output else None))
        self.expect(predict_reduce_to_owners([part.numels for part in owned], link.rank))
        mine.fill(self.reduce(owned, link))
        for grad_slice, total, output_slice in summed:
            self.optimizer._add_to_grad_partition_buffer(output_slice, total)
            grad_slice.copy_(total)

    def _avg_scatter_grads(
        self, original: Callable[..., Any], params: Sequence[Any], communication_data_type: torch.dtype
    ) -> Any:
        shapes = [param.ds_shape for param in params]
        group = self.optimizer._get_param_partition_group(params[0])
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        self.expect(predict_reduce_scatter(shapes, communication_data_type, self.spec, world, rank))
        with opened(Scope(self, shapes)):
            return original(params, communication_data_type)

    def _avg_scatter_contiguous_grads(
        self, original: Callable[..., Any], buffer: Tensor, communication_data_type: torch.dtype
    ) -> Any:
        bucket = self.optimizer.ipg_buckets[communication_data_type]
        shapes = [param.ds_shape for param in bucket.params]
        world = dist.get_world_size(bucket.process_group)
        self.expect(predict_all_reduce(shapes, communication_data_type, self.spec, world))
        with opened(Scope(self, shapes)):
            return original(buffer, communication_data_type)

    @torch.no_grad()
    def all_reduce(self, tensor: Tensor, shapes: Shapes, group: Any, spec: WireSpec) -> None:
        """Sum a flat bucket in place."""
        link, numel = self.link(group), sum(torch.Size(shape).numel() for shape in shapes)
        if tensor.numel() != numel:
            raise WireError(
                "the bucket is not what the entry point said", expected=f"{numel} elements", got=str(tensor.numel())
            )
        if link.world > 1:
            bundle = Bundle()
            for start, stop, codec in segments(shapes, spec, tensor.dtype, 0, numel):
                bundle.add(codec, tensor[start:stop])
            lanes = bundle.lanes()
            self.num_compressed += _is_compressed(lanes)
            bundle.fill(all_reduce_lanes(lanes, link))

    @torch.no_grad()
    def reduce_scatter(self, tensors: Sequence[Tensor], shapes: Shapes, group: Any, spec: WireSpec) -> list[Tensor]:
        """The mean over ranks of this rank's part of each tensor: ceil(n / W) elements, the last shorter or empty.

        Nothing is padded. DeepSpeed pads with uninitialized memory, and one 3e38 there sets the scale of a block.
        """
        link = self.link(group)
        owned = [Bundle() for _ in range(link.world)]
        mine, outputs = Bundle(), []
        for tensor, shape in zip(tensors, shapes):
            codec, parts = spec.codec(shape, tensors[0].dtype), parts_of(tensor.reshape(-1), link.world)
            for bundle, part in zip(owned, parts):
                bundle.add(codec, part)
            outputs.append(torch.empty_like(parts[link.rank]))
            mine.add(codec, outputs[-1])
        total = self.reduce(owned, link)
        for lane in total:
            lane.flat.div_(link.world)
        mine.fill(total)
        return outputs

    def reduce(self, owned: Sequence[Bundle], link: Link) -> list[Lane]:
        lanes = [bundle.lanes() for bundle in owned]
        self.num_compressed += any(map(_is_compressed, lanes))
        return reduce_to_owners(lanes, link)


def _is_compressed(lanes: Sequence[Lane]) -> bool:
    return any(lane.codec.kind == "gradient_compressed" and lane.flat.numel() for lane in lanes)
