"""Rounding of an update: a x + b y exactly, then one rounding to the format it is kept in.

a x, b y     exact in float64: a and b are fp32, as x and y are (24 + 24 bits)
their sum    rounded to odd in float64, so that rounding it again is rounding the exact sum (Boldo, Melquiond 2008)
"""

from ctypes import c_float

import torch
from torch import Tensor

from runtime.numerics import quantize
from runtime.numerics.random import check_counter
from runtime.numerics.specs import Rounding
from runtime.optim.places import Run

KEY = 0x6D757473796D6F6E
"""What the optimizer's seed is xored with: a model and its optimizer of one seed draw apart."""


class Draw:
    """The random bits of one tensor of one parameter at one step: those of (seed, step, stream, place)."""

    def __init__(self, seed: int, step: int, stream: int, runs: list[Run]) -> None:
        check_counter(step, stream, 0)
        self.seed, self.step, self.stream, self.runs = seed ^ KEY, step, stream, runs


def combined(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """a x + b y of fp32 tensors and numbers that are taken as fp32: float64, rounded to odd. Inf and NaN as IEEE 754
    has them; -0 only from -0 + -0, as to nearest.
    """
    p, q = x.double() * c_float(a).value, y.double() * c_float(b).value
    total = p + q
    back = total - p
    lost = (p - (total - back)) + (q - back)  # exact: total + lost = p + q (Knuth's TwoSum)
    bits = total.view(torch.int64)
    step = torch.where((lost > 0) == (total > 0), 1, -1)
    is_odd_already = (bits & 1) == 1
    changed = (lost != 0) & lost.isfinite() & ~is_odd_already
    return torch.where(changed, bits + step, bits).view(torch.float64)


def rounded(values: Tensor, format: str, rounding: Rounding, draw: Draw) -> Tensor:
    """Flat fp32 or float64 values on the grid of `format`, as fp32: saturated, NaN kept; fp32 always to nearest."""
    if format == "fp32":
        return values.float()
    if rounding != "stochastic":
        return quantize(values, format, rounding).float()
    out = torch.empty_like(values, dtype=torch.float32)
    for begin, size, offset in draw.runs:
        part = values[begin : begin + size]
        out[begin : begin + size] = quantize(
            part, format, rounding, seed=draw.seed, step=draw.step, stream=draw.stream, offset=offset
        )
    return out
