"""Slices: which gradients a stretch of a DeepSpeed bucket holds, and by which codec each travels."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.collectives.codec import Codec, WireSpec
from runtime.errors import WireError

Shapes = Sequence[Sequence[int]]
"""Of the gradients in a bucket, in their order there."""


def segments(
    shapes: Shapes, spec: WireSpec, dtype: torch.dtype, start: int, stop: int
) -> Iterator[tuple[int, int, Codec]]:
    """(from, to, codec) of the gradients in [start, stop) of the flat bucket, counted from `start`."""
    low = 0
    for shape in shapes:
        high = low + torch.Size(shape).numel()
        if max(low, start) < min(high, stop):
            yield max(low, start) - start, min(high, stop) - start, spec.codec(shape, dtype)
        low = high


def cuts_of(
    bucket: Tensor, shapes: Shapes, grad_slice: Tensor, spec: WireSpec, dtype: torch.dtype
) -> list[tuple[int, int, Codec]]:
    """`segments` of a slice of the bucket, found by its place in the memory they share."""
    start = int(grad_slice.storage_offset() - bucket.storage_offset())
    same_memory = bool(vars(torch._C)["_is_alias_of"](grad_slice, bucket))
    cuts = list(segments(shapes, spec, dtype, start, start + grad_slice.numel()))
    if not same_memory or sum(stop - begin for begin, stop, _ in cuts) != grad_slice.numel():
        raise WireError("a gradient slice is not in the bucket that is reduced", where="deepspeed")
    return cuts


def parts_of(flat_N: Tensor, world: int) -> list[Tensor]:
    """What each rank owns of a gradient: ceil(n / W) elements, the last less, perhaps none."""
    size = -(-flat_N.numel() // world)
    return [flat_N[rank * size : (rank + 1) * size] for rank in range(world)]


def only_owner(ranks: Any) -> int:
    """The one owner of a slice."""
    owners = list(ranks) if isinstance(ranks, frozenset) else [ranks]
    if len(owners) != 1:
        raise WireError(
            "a gradient slice has several owners, as Muon's split matrices do", where="deepspeed", got=str(owners)
        )
    return int(owners[0])
