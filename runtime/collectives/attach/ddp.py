"""DDP: DistributedDataParallel averages its gradients over the compressed wire, by a communication hook.

Of each bucket the gradients of 1-D and tiny parameters travel as they are, behind the codes of all others, in one
message.
DDP itself decides when: under no_sync the hook is not called, so gradient accumulation sends once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from runtime.collectives.codec import WireSpec
from runtime.collectives.counter import WireCounter
from runtime.collectives.exchange import Bundle, Link, Tamper, open_link, start_all_reduce
from runtime.collectives.ledger import predict_all_reduce
from runtime.errors import WireError


def attach_ddp(
    ddp: DistributedDataParallel,
    spec: WireSpec | None,
    counter: WireCounter,
    tamper: Tamper | None = None,
    *,
    check: bool = False,
) -> None:
    """Average `ddp`'s gradients in `spec`, or as they are if None, counting the bytes either way. Once for each `ddp`.

    The mean is sum / world size, in fp32; ranks end bit-identical. `check`: ranks compare each bucket before it is
    sent. WireError if `ddp` has a communication hook already, complex parameters, or sparse gradients.
    """
    _refuse_what_is_not_summed(ddp)
    group = ddp.process_group
    link = open_link(group, counter, check, tamper)

    def hook(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        shapes = [parameter.shape for parameter in bucket.parameters()]
        expected = predict_all_reduce(shapes, bucket.buffer().dtype, spec, link.topology)
        counter.expect("gradient_compressed", expected.compressed)
        counter.expect("gradient_full", expected.full)
        return _average_compressed(bucket, spec, link) if spec else _average_plain(bucket, group, counter)

    try:
        ddp.register_comm_hook(None, hook)
    except RuntimeError as error:
        raise WireError(
            "DDP takes no communication hook", where="attach_ddp", got=str(error), hint="attaching once, to a fresh DDP"
        ) from error


def _refuse_what_is_not_summed(ddp: DistributedDataParallel) -> None:
    """DDP hands a hook complex gradients as a buffer of twice the numbers, and sparse ones as no buffer at all."""
    for name, parameter in ddp.module.named_parameters():
        if parameter.is_complex():
            raise WireError(
                f"{name} is complex",
                where="attach_ddp",
                expected="float32, bfloat16 or float16",
                got=str(parameter.dtype),
                hint="two real parameters and torch.view_as_complex, or DDP without a wire",
            )
    for path, module in ddp.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise WireError(
                f"{path or 'the model'} has sparse gradients",
                where="attach_ddp",
                expected="dense gradients",
                got=f"{type(module).__name__}(sparse=True)",
                hint="sparse=False, or DDP without a wire",
            )


def _average_plain(bucket: GradBucket, group: dist.ProcessGroup, counter: WireCounter) -> torch.futures.Future[Tensor]:
    world, buffer = dist.get_world_size(group), bucket.buffer()
    counter.all_reduce("gradient_full", buffer, world)
    work: Any = dist.all_reduce(buffer.div_(world), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


@torch.no_grad()
def _average_compressed(bucket: GradBucket, spec: WireSpec, link: Link) -> torch.futures.Future[Tensor]:
    if link.world == 1:
        return _done(bucket.buffer())
    bundle = Bundle()
    for gradient, parameter in zip(bucket.gradients(), bucket.parameters()):
        bundle.add(spec.codec(parameter.shape, gradient.dtype), gradient)
    pending = start_all_reduce(bundle.lanes(), link)

    def write_back(_: Any = None) -> Tensor:
        with torch.no_grad():
            total = pending.finish()
            for lane in total:
                lane.flat.div_(link.world)
            bundle.fill(total)
        return bucket.buffer()

    return pending.future.then(write_back) if pending.future else _done(write_back())


def _done(value: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(value)
    return future
