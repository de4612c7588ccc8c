"""Traced cast: the loop of runtime/kernels/cpu/cast.cpp in torch operations, bit for bit, for torch.compile.

A compiler fuses these with their neighbours, where it would stop before an opaque kernel. cast.cpp explains the
arithmetic. Stochastic rounding is left to the kernel: ten rounds of Philox an element take a compiler a minute.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.compile_marks import constant_result
from runtime.errors import FormatError
from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu.cast_library import DTYPES
from runtime.numerics.block_formats import is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.specs import Rounding


class Draw(NamedTuple):
    """The key of the random bits; runtime/numerics/random.py says what each is."""

    seed: int = 0
    step: int = 0
    stream: int = 0
    offset: int = 0


_LEAST_SCALE, _PAST_FP32 = 2.0**-150, 2.0**128 - 2.0**103
"""What rounds to 0 and to Inf in fp32."""


class _Facts(NamedTuple):
    """A cast plan or a table plan as plain numbers, which a compiler takes for constants."""

    rounding: Rounding
    shift: int
    round_bias: int
    is_even: bool
    low: float
    magic: float
    spacing: float
    up_at: float
    down_below: float
    max: float
    min: float
    has_negative_zero: bool
    values: tuple[float, ...]
    starts: tuple[float, ...]


@constant_result
def _facts(format: str, rounding: Rounding | None) -> _Facts | None:
    if is_block_format(format):
        return None
    mode = rounding or get_format(format).rounding
    plan = cast_plan(format, mode)
    if plan is not None:
        return _Facts(
            mode, plan.shift, plan.round_bias, bool(plan.odd_mask), plan.low, plan.magic, plan.spacing, plan.up_at,
            plan.down_below, plan.max, plan.min, math.copysign(1.0, plan.zero) < 0, (), (),
        )  # fmt: skip
    table = table_plan(format, mode)
    if table is None:
        return None
    values, starts = tuple(table.values[: table.count]), tuple(table.starts[: table.count])
    has_negative_zero = math.copysign(1.0, table.zero) < 0
    return _Facts(mode, 0, 0, False, 0.0, 0.0, 0.0, 0.0, 0.0, table.max, table.min, has_negative_zero, values, starts)


def is_traced(x: Tensor, format: str, rounding: Rounding | None) -> bool:
    """Whether `traced_to_grid` is called for and can do this cast; the oracle, which can be traced as well, has all."""
    facts = _facts(format, rounding) if torch.compiler.is_compiling() and x.dtype in DTYPES else None
    return facts is not None and facts.rounding != "stochastic"


def traced_quantize(x: Tensor, format: str, rounding: Rounding | None, scale: Tensor | float | None) -> Tensor:
    """`casts.quantize` on a scalar format, saturating. A scale that is a tensor is trusted: its values are not known
    when code is compiled.
    """
    if isinstance(scale, int | float) and not _LEAST_SCALE < scale < _PAST_FP32:
        raise FormatError("a scale divides and must not be zero, negative, Inf or NaN", expected="0 < scale < Inf")
    divisor = None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    q = traced_to_grid(x, format, rounding, divisor)
    return (q if divisor is None else q * divisor).to(x.dtype)


def traced_to_grid(x: Tensor, format: str, rounding: Rounding | None, divisor: Tensor | None) -> Tensor:
    """x / divisor rounded to the values of a scalar format, as `casts.to_grid` does; fp32. `is_traced` must hold."""
    facts = _facts(format, rounding)
    assert facts is not None
    y = x.float() if divisor is None else x.float() / divisor
    if _is_sum(facts):
        return _round_by_sums(y, facts)
    q = _look_up(y, facts) if facts.values else _round(y, facts)
    if not facts.has_negative_zero:  # not by adding 0, which a compiler drops
        q = torch.where(q == 0, 0.0, q)
    q = torch.where(y == y, q, y)  # Inductor has no vector code for isnan, nor for copysign below
    return q.clamp(facts.min, facts.max)


def _is_sum(facts: _Facts) -> bool:
    """Whether `_round_by_sums` does this cast: to nearest even, with subnormals."""
    if facts.values or facts.rounding != "nearest_even" or (facts.up_at, facts.down_below) != (math.inf, -math.inf):
        return False
    if facts.low > facts.max:
        return True
    return facts.is_even and facts.shift > 12 and facts.spacing == facts.low * 2.0 ** (facts.shift - 23)


def _round_by_sums(y: Tensor, facts: _Facts) -> Tensor:
    """Nearest even without a look at the bits, which no compiler for the CPU does in vectors, and without converting to
    bf16 and back, which Inductor leaves out.

    With a = |y| and `big` = a 2^shift: the spacing of fp32 at big is that of the format at a, and big a multiple of it.
    So big - a rounds as a does, to even too: where a is a tie, its last bit is 0, and so big is an even multiple. Where
    big - a is just below a power of two, and the spacing half of that, a is so near to a power of two that it rounds to
    it either way, for up to 10 bits of mantissa. Below `low` all spacings are one, and big is a constant. Where big
    would leave fp32 (bf16), large numbers are rounded as smaller ones of the same mantissa.
    """
    y = y.clamp(facts.min, facts.max)  # the ends are in the format: rounding does not pass them
    a = y.abs()
    if facts.low > facts.max:
        q = (a + facts.magic) - facts.magic
    else:
        is_wide = max(facts.max, -facts.min) * 2.0**facts.shift >= 2.0**127
        is_large = a >= 2.0**60
        if is_wide:
            a = torch.where(is_large, a * 2.0**-40, a)
        big = (a * 2.0**facts.shift).clamp(min=1.5 * facts.low * 2.0**facts.shift)
        q = big - (big - a)
        if is_wide:
            q = torch.where(is_large, q * 2.0**40, q)
    q = torch.where(y < 0, -q, q)
    return torch.where(y == 0, y, q) if facts.has_negative_zero else torch.where(q == 0, 0.0, q)


def _round(y: Tensor, facts: _Facts) -> Tensor:
    a = y.abs()
    bits = a.view(torch.int32).clamp(max=0x7F800000)  # of NaN too, so that no sum wraps
    raised = bits + facts.round_bias
    if facts.is_even:
        raised = raised + (bits >> facts.shift & 1)
    nearest = (a + facts.magic) - facts.magic
    rest = a - nearest
    lower = nearest
    if facts.up_at < math.inf:
        lower = lower + torch.where(rest >= facts.up_at, facts.spacing, 0.0)
    if facts.down_below > -math.inf:
        lower = lower - torch.where(rest < facts.down_below, facts.spacing, 0.0)
    upper = (raised >> facts.shift << facts.shift).view(torch.float32)
    magnitude = torch.where(a < facts.low, lower, upper)
    return torch.where(y == 0, y, torch.where(y < 0, -magnitude, magnitude))


def _look_up(y: Tensor, facts: _Facts) -> Tensor:
    q = torch.full_like(y, facts.values[0])
    for entry in range(1, len(facts.values)):
        q = torch.where(y >= facts.starts[entry], facts.values[entry], q)
    return torch.where(q == 0, torch.copysign(q, y), q)
