"""Places: where the elements that a rank holds of a parameter lie in the whole one, so that random bits are theirs.

shard of rows 2..3 of (4, 3)      one run: 6 elements from 6 on
shard of columns 1..2 of (4, 3)   four runs of 2 elements, from 1, 4, 7 and 10 on
"""

import itertools
import math
from typing import NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from runtime.errors import NotSupported


class Run(NamedTuple):
    """Elements that lie side by side here, flat from `begin` on, and in the whole parameter, flat from `offset` on."""

    begin: int
    size: int
    offset: int


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: itself, or of a DTensor its shard. The same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def runs_of(parameter: Tensor) -> list[Run]:
    """The runs of what this rank holds, in C order. NotSupported for a DTensor whose shards are no plain slices."""
    if not isinstance(parameter, DTensor):
        return [Run(0, parameter.numel(), 0)]
    for placement in parameter.placements:
        if type(placement) not in (Shard, Replicate):
            raise NotSupported(
                "the place of a shard in its parameter is not known", where="the optimizer",
                expected="plain slices (Shard) or copies (Replicate)", got=str(placement),
                hint="fully_shard without tensor parallelism of the same dimension",
            )  # fmt: skip
    whole = tuple(parameter.shape)
    shape, first = compute_local_shape_and_global_offset(whole, parameter.device_mesh, parameter.placements)
    if not math.prod(shape):
        return []
    split = max((dim for dim in range(len(whole)) if shape[dim] != whole[dim]), default=0)  # dims behind it are whole
    outer, size = shape[:split], math.prod(shape[split:])
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    start = sum(at * stride for at, stride in zip(first, strides))
    places = itertools.product(*map(range, outer))
    return [
        Run(number * size, size, start + sum(at * stride for at, stride in zip(place, strides)))
        for number, place in enumerate(places)
    ]


def cut_among(tensor: Tensor) -> list[ProcessGroup]:
    """The groups of ranks among which a DTensor is cut, one for each dimension of its mesh that cuts it."""
    if not isinstance(tensor, DTensor):
        return []
    mesh, placements = tensor.device_mesh, tensor.placements
    return [mesh.get_group(dim) for dim, placement in enumerate(placements) if type(placement) is Shard]
