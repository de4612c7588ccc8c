"""Ledger: the bytes a rank sends in a collective, predicted from shapes alone.

    all-reduce, 8 bits     W = 2: codec(n)                              W > 2: 2 (W - 1) codec(ceil(n / W))
    reduce-scatter, 8 bits        sum of codec(n_owner) over the other owners
    all-reduce, ring       2 (W - 1) / W nbytes      reduce-scatter, ring   (W - 1) / W nbytes
    all-gather             (W - 1) shard             W = 1: nothing is sent

W is the world size, n elements. What travels in full precision beside the codes is a sum of its own. The counter beside
this file counts what was really handed to the collectives, and shares no code with it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.collectives.codec import Codec, WireSpec
from runtime.collectives.topology import Flat, Topology

Shapes = Sequence[Sequence[int]]
Load = Mapping[Codec, int]
"""How many elements of a bucket, or of one rank's part of it, travel by each codec."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends for one gradient collective."""

    compressed: int = 0
    """Codes and their scales."""
    full: int = 0
    """Gradients in full precision."""

    @property
    def total(self) -> int:
        return self.compressed + self.full


def predict_all_reduce(shapes: Shapes, dtype: torch.dtype, spec: WireSpec | None, over: Topology | int) -> Traffic:
    """Bytes a rank sends to all-reduce one bucket of gradients of these shapes; `spec` None: as they are, by ring.

    `dtype` is that of full precision; `over` the topology, or how many ranks lie flat.
    """
    topology = Flat(over) if isinstance(over, int) else over
    if spec is None:
        return Traffic(full=predict_ring_all_reduce(sum(map(_numel, shapes)) * dtype.itemsize, topology.world))
    load: Load = _load(shapes, dtype, spec)
    sent = Traffic()
    for step in topology.all_reduce():
        if step.name == "scatter":
            load = {codec: -(-numel // step.world) for codec, numel in load.items()}
        sent = _add(sent, _bytes_of(load), step.world - 1)
        if step.name == "gather":
            load = {codec: numel * step.world for codec, numel in load.items()}
    return sent


def predict_reduce_to_owners(owned: Sequence[Load], rank: int) -> Traffic:
    """Bytes `rank` sends when rank d gets the sum of `owned[d]`: one message to each other owner."""
    sent = Traffic()
    for owner, load in enumerate(owned):
        sent = sent if owner == rank else _add(sent, _bytes_of(load))
    return sent


def predict_reduce_scatter(shapes: Shapes, dtype: torch.dtype, spec: WireSpec | None, world: int, rank: int) -> Traffic:
    """Bytes `rank` sends when each gradient is cut into `world` parts of ceil(n / world) elements, the last shorter.

    `spec` None: by ring, where each gradient is padded to `world` equal parts.
    """
    if spec is None:
        padded = sum(-(-_numel(shape) // world) * world for shape in shapes)
        return Traffic(full=predict_ring_reduce_scatter(padded * dtype.itemsize, world))
    owned: list[Counter[Codec]] = [Counter() for _ in range(world)]
    for shape in shapes:
        part = -(-_numel(shape) // world)
        for owner, load in enumerate(owned):
            load[spec.codec(shape, dtype)] += max(0, min(part, _numel(shape) - owner * part))
    return predict_reduce_to_owners(owned, rank)


def predict_ring_all_reduce(nbytes: int, world: int) -> int:
    """Bytes a rank sends to all-reduce a tensor of `nbytes` by ring."""
    return 2 * (world - 1) * nbytes // world


def predict_ring_reduce_scatter(nbytes: int, world: int) -> int:
    """Bytes a rank sends to reduce-scatter an input of `nbytes` by ring."""
    return (world - 1) * nbytes // world


def predict_all_gather(shard_nbytes: int, world: int) -> int:
    """Bytes a rank sends so that every other rank gets its shard."""
    return (world - 1) * shard_nbytes


def _load(shapes: Shapes, dtype: torch.dtype, spec: WireSpec) -> Load:
    load: Counter[Codec] = Counter()
    for shape in shapes:
        load[spec.codec(shape, dtype)] += _numel(shape)
    return load


def _bytes_of(load: Load) -> Traffic:
    """Bytes of a load when written once."""
    sent = Counter({"gradient_compressed": 0, "gradient_full": 0})
    for codec, numel in load.items():
        sent[codec.kind] += codec.nbytes(numel)
    return Traffic(sent["gradient_compressed"], sent["gradient_full"])


def _add(sent: Traffic, more: Traffic, times: int = 1) -> Traffic:
    return Traffic(sent.compressed + times * more.compressed, sent.full + times * more.full)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
