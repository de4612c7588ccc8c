"""Agreement: ranks compare what they are about to exchange, before a difference ends in garbage or an abort.

A collective among ranks that disagree about sizes or formats hangs, aborts the process, or mixes bytes of one tensor
into another. For debugging: it costs a collective of its own each time.
"""

from collections.abc import Sequence

import torch.distributed as dist

from runtime.errors import WireError

Item = tuple[str, int]
"""What is sent by which codec, and how many values of it."""


def check_agreement(items: Sequence[Item], what: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise WireError on every rank if the items are not the same on all; collective."""
    mine = (what, list(items))
    everyones: list[tuple[str, list[Item]]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            expected, got = _difference(everyones[0], theirs)
            raise WireError(
                "ranks are about to exchange different things",
                where=f"{what}, rank {rank} of {len(everyones)}",
                expected=f"{expected}, as on rank 0",
                got=got,
                hint="the same calls, shapes, formats and blocks on every rank",
            )


def _difference(first: tuple[str, list[Item]], other: tuple[str, list[Item]]) -> tuple[str, str]:
    """The first thing in which two ranks differ."""
    if first[0] != other[0]:
        return first[0], other[0]
    for a, b in zip(first[1], other[1]):
        if a != b:
            return _print(a), _print(b)
    return f"{len(first[1])} tensors", f"{len(other[1])} tensors"


def _print(item: Item) -> str:
    return f"{item[1]} values by {item[0]}"
