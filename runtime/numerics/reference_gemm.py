"""The reference GEMM: one that rounds after every add, written for the reader and not for speed.

    c = 0; for each chunk of `chunk` products: s = 0; for k in the chunk: s = Q(s + a_k b_k); c = Q(c + s)

Additions go in increasing k; Q rounds once to the accumulator's format and saturates, but for fp32, which overflows as
IEEE 754 says: to Inf, or to the largest value where the rounding is toward zero. With no chunk, and with one
chunk, the outer add is skipped. Of the choices of an AccumulateSpec

    product="fma"       s = Q(s + a_k b_k)       the product is not rounded first
    product="rounded"   s = Q(s + Q(a_k b_k))    each product is rounded to the accumulator, as separate units do
    model="per_chunk"   s = fp32(s + a_k b_k) within the chunk (nearest-even, saturating; with rounded products
                        fp32(s + Q(a_k b_k))), then s = Q(s) once, then c = Q(c + s): the cheap model

    model="aligned"     as the matrix units of GPUs add; reference_aligned.py is its definition and runs it

An integer accumulator is exact but for its ends: Q saturates there, or wraps to two's complement. Under per_chunk the
chunk is summed in int64 and Q comes once at its end.

Stochastic: every Q of an output element has a number. The adds of products come first, k of K (per_chunk: the
roundings of chunks, c of C), then the outer adds, c of C, then the roundings of products, k of K. Draw j of element i
of the E of the output (flat in C order, batch included) is 16 bits: with g = j div 8, half j mod 2 (0 the low one) of
word (j mod 8) div 2 of the four of Philox counter n = g E + i (runtime/numerics/random.py). Its b highest bits, as
u 2^b, decide: up when rest >= 1 - u, so with probability floor(rest 2^b) / 2^b. b = 23 - M for an accumulator of 7 <= M
<= 15 fraction bits, so that an fp32 sum rounded toward zero holds all that is compared, else 16. Nothing depends on
threads or tiles.

Exactness: operands of at most 26 significant bits have products exact in float64. The sum s + p is rounded to odd in
float64 (the inexact bit is kept in the last place), and rounding that to any format of at most 51 significant bits
equals rounding the exact sum (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from runtime.errors import SlowPathWarning
from runtime.numerics import reference_aligned
from runtime.numerics.accumulators import declines_aligned
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat, IntFormat
from runtime.numerics.formats import get_format
from runtime.numerics.grid import binade, round_to_grid
from runtime.numerics.random import random_bits
from runtime.numerics.specs import AccumulateSpec, GemmSpec

DRAWS = 8
"""Draws of 16 bits in the four words of one Philox counter."""
MANY_PRODUCTS = 10**7
"""From how many products on the reference says that it runs."""
Round = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class RandomKey:
    """Where stochastic sums take their bits: seed, optimizer step, 48-bit stream."""

    seed: int = 0
    step: int = 0
    stream: int = 0


NO_KEY = RandomKey()
_IS_TOLD: ContextVar[bool] = ContextVar("is_told", default=False)
_FP32 = get_format("fp32")


def multiply(a: Tensor, b: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32, accumulated as `spec` says. NaN propagates; of an integer
    accumulator beyond 2^24 the fp32 nearest is returned.
    """
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        shapes = " and ".join("x".join(map(str, each.shape)) for each in (a, b))
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shapes})")
    how, num_k = spec.accumulator, a.shape[-1]
    if how.is_integer and (a.is_floating_point() or b.is_floating_point()):
        is_nan = a.isnan().any(-1, keepdim=True) | b.isnan().any(-2, keepdim=True)
        if bool(is_nan.any()):
            return multiply(a.nan_to_num(0.0), b.nan_to_num(0.0), spec, key).masked_fill(is_nan, torch.nan)
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    if math.prod(shape) * num_k > MANY_PRODUCTS and not _IS_TOLD.get():
        _say_slow(str(spec))
    if how.model == "aligned":
        return reference_aligned.multiply(a, b, spec)
    working = torch.int64 if how.is_integer else torch.float64
    left, right = a.to(working), b.to(working)
    total = torch.zeros(shape, dtype=working, device=a.device)
    round_sum, add = _rounding(how, key, total), (torch.add if how.is_integer else add_to_odd)
    chunk = how.chunk or max(num_k, 1)
    num_chunks = -(-num_k // chunk)
    first_outer = num_chunks if how.model == "per_chunk" else num_k
    for index, start in enumerate(range(0, num_k, chunk)):
        part = torch.zeros_like(total)
        for k in range(start, min(start + chunk, num_k)):
            product = left[..., :, k : k + 1] * right[..., k : k + 1, :]
            if how.product == "rounded":
                product = round_sum(product.expand(shape), first_outer + num_chunks + k)
            part = add(part, product)
            if how.model == "per_mac":
                part = round_sum(part, k)
            elif not how.is_integer:
                part = round_to_grid(part, _FP32, "nearest_even", overflow=_overflow(how))
        if how.model == "per_chunk":
            part = round_sum(part, index)
        total = part if num_chunks == 1 else round_sum(add(total, part), first_outer + index)
    return total.float()


@contextmanager
def without_warning() -> Iterator[None]:
    """For callers that say themselves, with more to tell, that the reference runs."""
    token = _IS_TOLD.set(True)
    try:
        yield
    finally:
        _IS_TOLD.reset(token)


@cache
def _say_slow(spec: str) -> None:
    warnings.warn(
        f"gemm: `{spec}` runs in the reference, rounding by rounding in torch operations. Expected a kernel "
        f"for more than {MANY_PRODUCTS:.0e} products. Got none: there is no C++ compiler here, or the tensors are "
        "not on the CPU. Try installing g++ with OpenMP, or moving the tensors.",
        SlowPathWarning,
        stacklevel=3,
    )


def declines(spec: GemmSpec) -> str | None:
    """Why the reference does not define this GEMM; None if it does."""
    if spec.accumulator.model == "aligned":
        return declines_aligned(spec)
    if not spec.accumulator.is_integer:
        return None
    for operand in (spec.lhs, spec.rhs):
        if operand.is_block or not isinstance(grid_format(operand.format), IntFormat):
            return f"sums in {spec.accumulate} need integer operands, not {operand.format}"
        if operand.scale is not None and operand.scale.rule == "pow2":
            return "a scale inside the sum leaves the integers"
    return None


def random_digits(how: AccumulateSpec) -> int:
    """b: how many of a draw's 16 bits stochastic rounding to this accumulator compares."""
    row = get_format(how.format)
    return 23 - row.mantissa if isinstance(row, FloatFormat) and 7 <= row.mantissa <= 15 else 16


def random_text(how: AccumulateSpec) -> str:
    """What a reason says of stochastic sums; "" for others."""
    if how.mode != "stochastic":
        return ""
    return f"; {random_digits(how)} random bits: what is below 2^-{random_digits(how)} of an ulp of the sum is lost"


def _rounding(how: AccumulateSpec, key: RandomKey, like: Tensor) -> Round:
    """Q(x, number of the draw)."""
    row = get_format(how.format)
    if isinstance(row, IntFormat):
        if how.overflow == "saturate":
            low, high = int(row.min), int(row.max)
            return lambda x, _: x.clamp(low, high)
        base = -(2 ** (row.bits - 1)) if row.signed else 0
        return lambda x, _: (x - base) % 2**row.bits + base
    assert isinstance(row, FloatFormat)
    if how.mode != "stochastic":
        return lambda x, _: round_to_grid(x, row, how.mode, overflow=_overflow(how))
    digits, groups = random_digits(how), dict[int, Tensor]()
    top = torch.inf if _overflow(how) == "ieee" else row.max

    def round_stochastically(x: Tensor, number: int) -> Tensor:
        group, place = divmod(number, DRAWS)
        if group not in groups:
            if len(groups) == 3:  # one each for adds, outer adds and products
                groups.pop(next(iter(groups)))
            count = 4 * like.numel()
            words = random_bits(
                count, seed=key.seed, step=key.step, stream=key.stream, offset=group * count, device=like.device
            )
            groups[group] = words.view(*like.shape, 4)
        draw = (groups[group][..., place // 2] >> 16 * (place % 2) & 0xFFFF) >> (16 - digits)
        return _round_by_draw(x, row, draw, digits, top)

    return round_stochastically


def _overflow(how: AccumulateSpec) -> Literal["saturate", "ieee"]:
    """What becomes of a sum beyond the accumulator's largest value."""
    return "ieee" if how.format == "fp32" else "saturate"


def _round_by_draw(x: Tensor, row: FloatFormat, draw: Tensor, digits: int, top: float) -> Tensor:
    """x (float64, rounded to odd) up in magnitude when rest / ulp >= 1 - draw 2^-digits; exact: nothing is divided but
    by powers of two, or where the whole part is 0. Beyond the largest value is `top`.
    """
    size = x.abs()
    ulp = torch.exp2((binade(size, row.emin) - row.mantissa).double())
    if not row.subnormals:
        ulp = torch.where(size < row.tiny, row.tiny, ulp)
    below = torch.floor(size / ulp) * ulp
    up = (size - below) * 2.0**digits >= ulp * (2.0**digits - draw)
    rounded = below + torch.where(up, ulp, 0.0)
    rounded = torch.copysign(torch.where(x.isinf() | (rounded > row.max), top, rounded), x)
    return torch.where(x.isnan(), x, rounded if row.has_negative_zero else rounded + 0.0)


def add_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """x + y in float64, rounded to odd: toward zero, with the last bit set when anything was cut. Inf and NaN pass
    through.
    """
    s = x + y
    back = s - x
    error = (x - (s - back)) + (y - back)
    bits = s.view(torch.int64)
    # an even result with a remainder moves one ulp towards it; an odd one already carries the sticky bit
    step = torch.where((error > 0) == (s > 0), 1, -1)
    inexact = (error != 0) & torch.isfinite(error) & ((bits & 1) == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64)
