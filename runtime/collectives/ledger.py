"""Ledger: the bytes a rank sends in a collective, predicted from shapes alone.

    all-reduce, 8 bits     W = 2: packed(n)                              W > 2: 2 (W - 1) packed(ceil(n / W))
    reduce-scatter, 8 bits        sum of packed(n_owner) over the other owners
    all-reduce, ring       2 (W - 1) / W nbytes      reduce-scatter, ring   (W - 1) / W nbytes
    all-gather             (W - 1) shard             W = 1: nothing is sent

W is the world size, n elements. What travels in full precision beside the codes is a sum of its own. The counter beside
this file counts what was really handed to the collectives, and shares no code with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.collectives.codec import WireSpec, packed_bytes


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


@dataclass(frozen=True)
class Load:
    """Elements of a bucket, or of one rank's part of it, by how they travel."""

    compressed: int = 0
    full: int = 0

    def nbytes(self, itemsize: int, spec: WireSpec) -> Traffic:
        """Bytes when written once; `itemsize` is the bytes of a full-precision element."""
        return Traffic(packed_bytes(self.compressed, spec), self.full * itemsize)


def predict_all_reduce(shapes: Sequence[Sequence[int]], itemsize: int, spec: WireSpec | None, world: int) -> Traffic:
    """Bytes a rank sends to all-reduce one bucket of gradients of these shapes; `spec` None: as they are, by ring."""
    if spec is None:
        numel = sum(_numel(shape) for shape in shapes)
        return Traffic(full=predict_ring_all_reduce(numel * itemsize, world))
    load = _load(shapes, spec)
    if world > 2:
        load = Load(-(-load.compressed // world), -(-load.full // world))
    once, times = load.nbytes(itemsize, spec), {1: 0, 2: 1}.get(world, 2 * (world - 1))
    return Traffic(once.compressed * times, once.full * times)


def predict_reduce_to_owners(owned: Sequence[Load], itemsize: int, spec: WireSpec, rank: int) -> Traffic:
    """Bytes `rank` sends when rank d gets the sum of `owned[d]`: one message to each other owner."""
    sent = [load.nbytes(itemsize, spec) for owner, load in enumerate(owned) if owner != rank]
    return Traffic(sum(part.compressed for part in sent), sum(part.full for part in sent))


def predict_reduce_scatter(
    shapes: Sequence[Sequence[int]], itemsize: int, spec: WireSpec | None, world: int, rank: int
) -> Traffic:
    """Bytes `rank` sends when each gradient is cut into `world` parts of ceil(n / world) elements, the last shorter.

    `spec` None: by ring, where each gradient is padded to `world` equal parts.
    """
    if spec is None:
        padded = sum(-(-_numel(shape) // world) * world for shape in shapes)
        return Traffic(full=predict_ring_reduce_scatter(padded * itemsize, world))
    owned = []
    for owner in range(world):
        compressed = full = 0
        for shape in shapes:
            part = -(-_numel(shape) // world)
            numel = max(0, min(part, _numel(shape) - owner * part))
            compressed, full = (compressed + numel, full) if spec.compresses(shape) else (compressed, full + numel)
        owned.append(Load(compressed, full))
    return predict_reduce_to_owners(owned, itemsize, spec, rank)


def predict_ring_all_reduce(nbytes: int, world: int) -> int:
    """Bytes a rank sends to all-reduce a tensor of `nbytes` by ring."""
    return 2 * (world - 1) * nbytes // world


def predict_ring_reduce_scatter(nbytes: int, world: int) -> int:
    """Bytes a rank sends to reduce-scatter an input of `nbytes` by ring."""
    return (world - 1) * nbytes // world


def predict_all_gather(shard_nbytes: int, world: int) -> int:
    """Bytes a rank sends so that every other rank gets its shard."""
    return (world - 1) * shard_nbytes


def _load(shapes: Sequence[Sequence[int]], spec: WireSpec) -> Load:
    compressed = sum(_numel(shape) for shape in shapes if spec.compresses(shape))
    return Load(compressed, sum(_numel(shape) for shape in shapes) - compressed)


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
