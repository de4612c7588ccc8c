"""Streams: what keys the random bits of one call of a product.

    stream    rank (16 bits), micro-batch modulo 1024 (10), site (18), operand slot (4)
    step      the optimizer step, and in its upper 8 of 32 bits the micro-batch divided by 1024
    seed      that of the model, moved for the second, third ... call of a site in one micro-batch

A micro-batch is a forward of the model with gradients; a site is a product by its number, with how many calls of it
came before in this micro-batch in the bits from 18 on. So two calls share bits only where seed, step, rank,
micro-batch, site, number of the call and slot are equal, whatever threads, layouts, devices and compilers run them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from runtime.errors import LpError
from runtime.numerics.random import signed_seed

SITE_BITS = 18
SIGN_SLOTS = (10, 10, 11, 12, 11, 12, 11)
"""By the slot of a cast: that of the signs of a transform, the same for both operands of a GEMM: FWD, BWD, GRAD."""
NO_CLOCK = (0, 0, 0, 0)


class Turn(NamedTuple):
    """One call of a product: the clock (seed, rank, step, micro-batch) that it saw, and `site` with its number."""

    clock: tuple[int, ...]
    site: int


def seed_of(turn: Turn) -> int:
    """The seed of the stream, which is moved from one call of a site to the next."""
    return signed_seed(turn.clock[0] + (turn.site >> SITE_BITS) * _ODD)


def stream_of(clock: Sequence[int], site: int, slot: int) -> tuple[int, int, int]:
    """Seed, step and stream of one operand or sum. LpError where a rank, a site or a slot does not fit."""
    seed, rank, step, micro_batch = clock
    earlier_calls, number = divmod(site, 1 << SITE_BITS)
    if earlier_calls:
        seed = seed_of(Turn(tuple(clock), site))
    lap = micro_batch // _LAP
    stream = 0
    for name, value, bits in (
        ("rank", rank, 16),
        ("micro_batch", micro_batch - lap * _LAP, 10),
        ("site", number, SITE_BITS),
        ("slot", slot, 4),
    ):
        is_symbol = isinstance(value, torch.SymInt)  # of what compiled code reads, which is checked as it reads
        if not is_symbol and not 0 <= value < 1 << bits:
            raise LpError(f"{name} has no stochastic stream left", expected=f"less than {1 << bits}", got=str(value))
        stream = stream * (1 << bits) + value
    return seed, step + (lap % 256) * (1 << 24), stream


_LAP = 1 << 10
_ODD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: the seeds of consecutive calls are far apart."""
