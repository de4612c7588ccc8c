"""Draws: what keys the random bits of one cast."""

from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import NO_DRAW, Draw
from runtime.state import RunState
from runtime.streams import NO_CLOCK, SIGN_SLOTS, Turn, stream_of


def draw_of(spec: QuantSpec, turn: RunState | Turn | None, site: int, slot: int) -> Draw:
    """What keys the random bits of a cast, where it has any."""
    if not spec.is_stochastic:
        return NO_DRAW
    clock = NO_CLOCK if turn is None else turn.clock
    number = turn.site if isinstance(turn, Turn) else site
    signs = stream_of(clock, number, SIGN_SLOTS[slot])[2] if spec.transform is not None else 0
    return Draw(*stream_of(clock, number, slot), signs)
