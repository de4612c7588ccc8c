"""DDP: DistributedDataParallel averages its gradients over the compressed wire, by a communication hook.

Of each bucket the gradients of 1-D and tiny parameters travel as they are, behind the codes of all others, in one
message.
DDP itself decides when: under no_sync the hook is not called, so gradient accumulation sends once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import Lanes, Link, Tamper, flatten, start_all_reduce, unflatten_into
from runtime.collectives.ledger import predict_all_reduce
from runtime.errors import WireError


def attach_ddp(
    ddp: DistributedDataParallel, spec: WireSpec | None, counter: WireCounter, tamper: Tamper | None = None
) -> None:
    """Average `ddp`'s gradients in `spec`, or as they are if None, counting the bytes either way. Once for each `ddp`.

    The mean is sum / world size, in fp32; ranks end bit-identical. WireError if `ddp` has a communication hook already.
    """
    group = ddp.process_group
    link = Link(spec, group, counter, tamper) if spec else None

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        shapes = [parameter.shape for parameter in bucket.parameters()]
        expected = predict_all_reduce(shapes, bucket.buffer().itemsize, spec, dist.get_world_size(group))
        counter.expect("gradient_compressed", expected.compressed)
        counter.expect("gradient_full", expected.full)
        return _average_compressed(bucket, link) if link else _average_plain(bucket, group, counter)

    try:
        ddp.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise WireError(
            "DDP takes no communication hook", where="attach_ddp", got=str(error), hint="attaching once, to a fresh DDP"
        ) from error


def _average_plain(bucket: GradBucket, group: dist.ProcessGroup, counter: WireCounter) -> torch.futures.Future[Tensor]:
    world, buffer = dist.get_world_size(group), bucket.buffer()
    counter.all_reduce("gradient_full", buffer, world)
    work: Any = dist.all_reduce(buffer.div_(world), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@torch.no_grad()
def _average_compressed(bucket: GradBucket, link: Link) -> torch.futures.Future[Tensor]:
    if link.world == 1:
        return _done(bucket.buffer())
    compressed: list[Tensor] = []
    full: list[Tensor] = []
    for gradient, parameter in zip(bucket.gradients(), bucket.parameters()):
        (compressed if link.spec.compresses(parameter.shape) else full).append(gradient)
    pending = start_all_reduce(Lanes(flatten(compressed, bucket.buffer()), flatten(full, bucket.buffer())), link)

    def write_back(_: Any = None) -> Tensor:
        with torch.no_grad():
            for total_N, gradients in zip(pending.finish(), (compressed, full)):
                unflatten_into(gradients, total_N.div_(link.world))
        return bucket.buffer()

    return pending.future.then(write_back) if pending.future else _done(write_back())


def _done(value: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(value)
    return future
