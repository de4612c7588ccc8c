"""Traced cast: the loop of runtime/kernels/cpu/cast.cpp in torch operations, bit for bit, for torch.compile.

A compiler fuses these with their neighbours, where it would stop before an opaque kernel. cast.cpp explains the
arithmetic. Stochastic rounding computes Philox for every element instead of for every four, which keeps it one kernel.
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
from runtime.numerics.random import check_counter, philox
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
    return torch.compiler.is_compiling() and x.dtype in DTYPES and _facts(format, rounding) is not None


def traced_quantize(
    x: Tensor, format: str, rounding: Rounding | None, scale: Tensor | float | None, draw: Draw
) -> Tensor:
    """`casts.quantize` on a scalar format, saturating. A scale that is a tensor is trusted: its values are not known
    when code is compiled.
    """
    if isinstance(scale, int | float) and not _LEAST_SCALE < scale < _PAST_FP32:
        raise FormatError("a scale divides and must not be zero, negative, Inf or NaN", expected="0 < scale < Inf")
    facts = _facts(format, rounding)
    if facts is not None and facts.rounding == "stochastic":
        check_counter(*draw[1:])
    divisor = None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    q = traced_to_grid(x, format, rounding, divisor, draw)
    return (q if divisor is None else q * divisor).to(x.dtype)


def traced_to_grid(
    x: Tensor, format: str, rounding: Rounding | None, divisor: Tensor | None, draw: Draw, *, saturate: bool = True
) -> Tensor:
    """x / divisor rounded to the values of a scalar format, as `casts.to_grid` does; fp32. `is_traced` must hold.

    saturate=False leaves a value that rounds out of range where it is: what is beyond [min, max] then overflowed.
    """
    facts = _facts(format, rounding)
    assert facts is not None
    y = x.float() if divisor is None else x.float() / divisor
    if saturate and _is_sum(facts):
        return _round_by_sums(y, facts)
    word = _words(y, draw) if facts.rounding == "stochastic" else None
    q = _look_up(y, facts, word) if facts.values else _round(y, facts, word)
    if not facts.has_negative_zero:  # not by adding 0, which a compiler drops
        q = torch.where(q == 0, 0.0, q)
    q = torch.where(y == y, q, y)  # Inductor has no vector code for isnan, nor for copysign below
    return q.clamp(facts.min, facts.max) if saturate else q


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


def _round(y: Tensor, facts: _Facts, word: Tensor | None) -> Tensor:
    a = y.abs()
    bits = a.view(torch.int32).clamp(max=0x7F800000)  # of NaN too, so that no sum wraps
    if word is None:
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
    else:
        raised = bits + (word >> 32 - facts.shift).int()
        t = a.clamp(max=facts.low).double() / facts.spacing
        below = torch.floor(t)
        up = t - below >= 1.0 - word.double() * 2.0**-32
        lower = ((below + torch.where(up, 1.0, 0.0)) * facts.spacing).float()
    upper = (raised >> facts.shift << facts.shift).view(torch.float32)
    magnitude = torch.where(a < facts.low, lower, upper)
    return torch.where(y == 0, y, torch.where(y < 0, -magnitude, magnitude))


def _look_up(y: Tensor, facts: _Facts, word: Tensor | None) -> Tensor:
    q = torch.full_like(y, facts.values[0])
    above = torch.full_like(y, facts.values[1])
    for entry in range(1, len(facts.values)):
        is_reached = y >= facts.starts[entry]
        q = torch.where(is_reached, facts.values[entry], q)
        above = torch.where(is_reached, facts.values[min(entry + 1, len(facts.values) - 1)], above)
    if word is not None:
        is_mirrored = above <= 0
        near = torch.where(is_mirrored, above, q).double()
        far = torch.where(is_mirrored, q, above).double()
        inside = y.clamp(min=facts.values[0]).double()
        is_far = (inside - near).abs() / (far - near).abs() >= 1.0 - word.double() * 2.0**-32
        q = torch.where(q == above, q, torch.where(is_far, far, near).float())
    return torch.where(q == 0, torch.copysign(q, y), q)


def _words(y: Tensor, draw: Draw) -> Tensor:
    """The 32 random bits of every element, int64. What may be a symbol in compiled code (a step, a stream) becomes a
    tensor before its bits are taken apart: Inductor has no vector code for bits of symbols.
    """
    element = torch.arange(y.numel(), dtype=torch.int64, device=y.device).view(y.shape) + draw.offset
    n = element >> 2
    seed, step, stream = (torch.zeros_like(n) + number for number in (draw.seed, draw.step, draw.stream))
    high = (n >> 32) + (stream >> 32 << 16)
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    words = philox((n & 0xFFFFFFFF, high, step, stream & 0xFFFFFFFF), key)
    place = element & 3
    word = words[3]
    for number in range(3):
        word = torch.where(place == number, words[number], word)
    return word
