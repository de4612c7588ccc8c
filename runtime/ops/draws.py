"""Draws: what keys the random bits of one cast."""

from runtime.numerics.specs import QuantSpec
from runtime.quantize.quantizer import NO_DRAW, Draw
from runtime.state import RunState
from runtime.streams import NO_CLOCK, Turn, stream_of


def draw_of(spec: QuantSpec, turn: RunState | Turn | None, site: int, slot: int) -> Draw:
    """What keys the random bits of a cast, where it has any."""
    if spec.rounding != "stochastic":
        return NO_DRAW
    if isinstance(turn, Turn):
        return Draw(*stream_of(turn.clock, turn.site, slot))
    return Draw(*stream_of(NO_CLOCK if turn is None else turn.clock, site, slot))
