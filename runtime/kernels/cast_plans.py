"""Cast plans: what the loops of runtime/kernels/cpu/cast.cpp need to know of a format and a rounding, from its row."""

import math
from functools import lru_cache

import numpy as np
import torch

from runtime.kernels.constants import MAX_TABLE, ROUNDING_NUMBERS, RULE_NUMBERS
from runtime.kernels.cpu.cast_library import BlockPlan, CastPlan, TablePlan
from runtime.kernels.fake import beside_tracing
from runtime.numerics.block_formats import BlockFormat
from runtime.numerics.format_kinds import FloatFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.grid import int_range, round_to_grid
from runtime.numerics.specs import ROUNDINGS, Rounding


@lru_cache(maxsize=4096)
def cast_plan(format: str, rounding: Rounding) -> CastPlan | None:
    """The plan of a cast; None if the loop cannot do it: a table, a rounding of its own, a constant that is no fp32."""
    row = get_format(format)
    if isinstance(row, LookupFormat) or rounding not in ROUNDING_NUMBERS:
        return None
    if isinstance(row, FloatFormat):
        shift, smallest, least, largest = 23 - row.mantissa, row.tiny, row.min, row.max
        zero = -0.0 if row.has_negative_zero else 0.0
        low = 2.0**row.emin if row.subnormals else row.tiny
        magic = 2.0**23 * row.quantum if row.subnormals else 2.0 ** (row.emin + 26)
        is_gap = not row.subnormals  # below the smallest value: of a tie there 0 is the even one
        tie = row.first_tie
    else:
        least, largest = int_range(row, torch.float32)
        shift, smallest, zero, low, magic, is_gap, tie = 0, 1.0, 0.0, 2.0**23, 2.0**23, False, 0.5
    up_at = tie if rounding == "nearest_away" and tie >= 2.0**-149 else math.inf
    if rounding == "nearest_even" and is_gap:
        up_at = float(np.nextafter(np.float32(tie), np.float32(np.inf)))
    if low < 2.0**-126 or magic >= 2.0**128 or (tie >= 2.0**-149 and float(np.float32(tie)) != tie):
        return None
    # With no fraction bits both neighbours are odd, and ties go up (IEEE 754-2019, 4.3.1: the larger in magnitude).
    is_even = rounding == "nearest_even" and 0 < shift < 23
    bias = (1 << shift >> 1) - is_even if rounding in ("nearest_even", "nearest_away") else 0
    return CastPlan(
        shift=shift,
        round_bias=bias,
        odd_mask=int(is_even),
        keep_mask=0xFFFFFFFF << shift & 0xFFFFFFFF,
        low=low,
        magic=magic,
        spacing=smallest,
        up_at=up_at,
        down_below=0.0 if rounding == "toward_zero" else -math.inf,
        max=largest,
        zero=zero,
        min=least,
    )


@lru_cache(maxsize=256)
def table_plan(format: str, rounding: Rounding) -> TablePlan | None:
    """The plan of a cast to a lookup format; None for other formats, and for tables that are long or have no zero
    between their signs where the rounding is toward zero, or no negative values.

    Rounding is monotone, so a deterministic one is a step function; the fp32 at which each step begins is found by
    bisection with the oracle, over fp32's own order.
    """
    row = get_format(format)
    if not isinstance(row, LookupFormat) or len(row.grid) + 2 > MAX_TABLE or not row.signed:
        return None
    if rounding not in ROUNDING_NUMBERS or (rounding == "toward_zero" and 0.0 not in row.grid):
        return None
    before = -row.beyond_max if row.min == -row.max else 2 * row.grid[0] - row.grid[1]
    with beside_tracing():
        tensor = torch.tensor((before, *row.grid, row.beyond_max), dtype=torch.float32, device="cpu")
        values = tensor.tolist()
        starts = values if rounding == "stochastic" else _starts(tensor, row, rounding).tolist()
    fill = MAX_TABLE - len(values)
    array = np.ctypeslib.as_ctypes
    return TablePlan(
        count=len(values),
        values=array(np.array([*values, *[values[-1]] * fill], np.float32)),
        starts=array(np.array([*starts, *[math.inf] * fill], np.float32)),
        max=row.max,
        min=row.min,
        zero=-0.0 if row.has_negative_zero else 0.0,
    )


@lru_cache(maxsize=256)
def block_plan(row: BlockFormat, rounding: Rounding) -> BlockPlan | None:
    """The plan of a cast to a block format; None where the loop cannot do it."""
    of_elements: Rounding = "nearest_even" if row.rule == "eden" else rounding
    element = cast_plan(row.element, of_elements) if rounding in ROUNDINGS else None
    is_two_level = row.is_two_level
    if rounding == "stochastic" and (row.is_square or row.rule == "four_six"):
        return None
    scale = cast_plan(row.scale, "nearest_even") if is_two_level else CastPlan()  # of 2^k nothing is rounded
    if element is None or scale is None or row.block != (16 if is_two_level else 32):
        return None
    if is_two_level == (row.scale == "e8m0"):
        return None
    facts = get_format(row.element)
    digits = facts.mantissa if isinstance(facts, FloatFormat) else facts.bits - 2
    quantum = (facts.quantum if isinstance(facts, FloatFormat) else 1.0) * row.element_unit
    return BlockPlan(
        rule=RULE_NUMBERS[row.rule],
        exponent=math.frexp(row.element_max)[1] - 1,
        max=row.element_max,
        round_from=2 - 2.0 ** -(digits + 1),
        unit=row.element_unit,
        bf16_from=-133 - (math.frexp(quantum)[1] - 1),
        block=row.block,
        per_max=1.0 / row.target,
        height=row.height,
        per_four=1.5 / row.target,
        element=element,
        scale=scale,
    )


def corrected_plan(row: BlockFormat, rounding: Rounding) -> CastPlan | None:
    """How the scales of a block format are rounded once they are corrected; None for one whose are not."""
    return cast_plan(row.scale, rounding) if row.rule == "eden" else None


def _starts(values: torch.Tensor, row: LookupFormat, rounding: Rounding) -> torch.Tensor:
    """The least fp32 that rounds to each value or beyond; that of the first is -Inf."""
    low, high = _ordered(values[:-1]), _ordered(values[1:])  # low rounds below the value, high to it
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        reached = round_to_grid(_number(middle), row, rounding, overflow="unbounded") >= values[1:]
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return torch.cat([torch.tensor([-math.inf], dtype=torch.float32, device="cpu"), _number(high)])


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the fp32 they stand for; both zeros are 0."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _number(order: torch.Tensor) -> torch.Tensor:
    return torch.copysign(order.abs().int().view(torch.float32), order.float())
