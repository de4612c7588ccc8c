"""The emulation kernel: GEMMs that round to the accumulator's format after every multiply-add, by accumulate.cpp.

Bitwise equal to runtime/numerics/reference_gemm.py, which is exact by float64 and rounding to odd. Here the sum is
fp32. With s the significant bits of a product (those of the operands, added) and m the accumulator's fraction bits:

    fp32             sums in fp32 to nearest even: a fused multiply-add is the rounding that is asked for
    cut              nearest away: the sum is first rounded toward zero in fp32, whatever the product
    direct           nearest even, s <= min(22 - m, m + 1), no product below 2^-149: then rounding the fp32 sum is
                     rounding the exact sum
    rounded product  nearest even, m <= 10 and products exact in fp32: one rounded by Q has m + 1 bits, so its sum
                     is direct
    odd              m <= 21: the sum is first rounded to odd in fp32, whatever the product
    no underflow     the smallest product is a multiple of the accumulator's quantum, by the formats or by the values of
                     the tile: sums need no care for being small, and where the largest |a| and |b| say that none
                     saturates either, Q is two operations
    low              the largest |a| and |b| say that none saturates: Q is three to five operations

Why cut is right: |sum| rounds up from the middle of its neighbours on, which fp32 holds (m <= 22), and a number is at
least the middle if and only if what is left of it after cutting is. Products are rounded alike.

Every other spec takes the general loop of accumulate.cpp: odd sums of exact products for nearest, and sums cut in fp32
for toward zero (cutting twice is cutting once, to fp32 itself too) and for stochastic, whose digits the cut sum holds.

Why direct is right: a double rounding needs an inexact fp32 sum that lands on a midpoint of the accumulator's grid. The
accumulated value is on the grid, so the product alone must reach from the midpoint's bit, m + 1, past bit 23:
s >= 23 - m. Where the product is the larger of the two it is on the grid itself, s <= m + 1, and the smaller one, at
most m + 1 bits long, cannot hold the midpoint's bit and one past bit 23 at once.
"""

import ctypes
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cast_plans import cast_plan
from runtime.kernels.cpu.address import address, check_product
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import CastPlan, RandomPlan
from runtime.kernels.cpu.philox import random_plan
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat, IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.reference_gemm import NO_KEY, RandomKey, random_digits
from runtime.numerics.specs import GemmSpec, QuantSpec

SOURCE = Path(__file__).with_name("accumulate.cpp")


class How(ctypes.Structure):
    """How to sum; mirrors How of accumulate.cpp."""

    _fields_ = [
        ("smallest_product", ctypes.c_double),
        ("least_sum", ctypes.c_double),
        ("a_bits", ctypes.c_int32),
        ("b_bits", ctypes.c_int32),
        ("is_fp32", ctypes.c_int32),
        ("is_odd", ctypes.c_int32),
        ("is_away", ctypes.c_int32),
        ("is_general", ctypes.c_int32),
        ("is_cut", ctypes.c_int32),
        ("is_rounded_product", ctypes.c_int32),
        ("is_per_chunk", ctypes.c_int32),
        ("digits", ctypes.c_int32),
        ("first_element", ctypes.c_int64),
        ("num_elements", ctypes.c_int64),
        ("random", RandomPlan),
    ]


@lru_cache(maxsize=1)
def accumulate_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler or without AVX-512."""
    library = load_library(SOURCE)
    if library is None or not library.lp_accumulate_is_supported():
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    operand = (pointer, size, size)
    plan = ctypes.POINTER(CastPlan)
    library.lp_accumulate.argtypes = (
        *(plan, ctypes.POINTER(How), *operand, *operand),
        *(pointer, size, size, size, size, ctypes.c_int),
    )
    library.lp_accumulate.restype = None
    return library


def declines(spec: GemmSpec) -> str | None:
    """Why the kernel cannot run this GEMM; None if it can."""
    row = get_format(spec.accumulate)
    if not isinstance(row, FloatFormat):
        return f"it sums in floats, not in {spec.accumulate}"
    how = spec.accumulator
    if how.model == "aligned":
        return "its loops add one product after another"
    if is_plain(spec):
        return None if accumulate_library() else _NO_LIBRARY
    if (row.mantissa > 21 and not _is_cut_once(spec)) or cast_plan(spec.accumulate, how.mode) is None:
        return f"{spec.accumulate} leaves no room in fp32 to round to odd"
    if how.mode == "stochastic":
        if row.mantissa > 15:
            return f"{spec.accumulate} leaves no room in fp32 for 16 random digits"
        if row.quantum * 2.0 ** -random_digits(how) < 2.0**-149:
            return f"the random digits of subnormals of {spec.accumulate} leave fp32"
    return None if accumulate_library() else _NO_LIBRARY


def is_plain(spec: GemmSpec) -> bool:
    """Whether the adder of fp32 itself rounds as asked. A chunk summed in fp32 first is then a chunk."""
    return spec.accumulate == "fp32" and spec.accumulator.mode == "nearest_even"


def _is_cut_once(spec: GemmSpec) -> bool:
    """Whether no sum is rounded but toward zero, which the adder does: then no bit is needed beside the format's."""
    return spec.accumulator.mode == "toward_zero" and spec.accumulator.model == "per_mac"


def is_direct(spec: GemmSpec) -> bool:
    """Whether rounding the fp32 sum is rounding the exact sum; see the top of this file."""
    row = get_format(spec.accumulate)
    assert isinstance(row, FloatFormat)
    nearest = spec.accumulator.mode == "nearest_even"
    is_rounded, bits = spec.accumulator.product == "rounded", _product_bits(spec)
    if _smallest_product(spec) < 2.0**-149 or (is_rounded and bits > 24):
        return False
    return nearest and (row.mantissa + 1 if is_rounded else bits) <= min(22 - row.mantissa, row.mantissa + 1)


def never_underflows(spec: GemmSpec) -> bool:
    """Whether no sum but 0 loses precision for being small. Every sum is a multiple of the smallest product: roundings
    keep that, as all of it are powers of two.
    """
    return _smallest_product(spec) >= _least_sum(spec)


def _least_sum(spec: GemmSpec) -> float:
    """From where on rounding to the accumulator, in fp32, has a constant precision, if sums are multiples of it."""
    row = get_format(spec.accumulate)
    assert isinstance(row, FloatFormat)
    return max(row.quantum if row.subnormals else row.tiny, 2.0**-126)


def is_default_loop(spec: GemmSpec) -> bool:
    """Whether accumulate.cpp runs its default loop, which the convolutions of accumulate_conv.cpp have too."""
    if is_plain(spec):
        return True
    how = spec.accumulator
    is_nearest, is_fused = how.mode in ("nearest_even", "nearest_away"), how.product == "fma"
    return is_nearest and how.model == "per_mac" and (is_fused or _is_away(spec) or is_direct(spec))


def _is_away(spec: GemmSpec) -> bool:
    return spec.accumulator.mode == "nearest_away"


def how_of(spec: GemmSpec, key: RandomKey, first_element: int, num_elements: int) -> How:
    how = spec.accumulator
    return How(
        smallest_product=_smallest_product(spec),
        least_sum=_least_sum(spec),
        a_bits=_significant_bits(spec.lhs),
        b_bits=_significant_bits(spec.rhs),
        is_fp32=is_plain(spec),
        is_odd=not is_direct(spec),
        is_away=_is_away(spec),
        is_general=not is_default_loop(spec),
        is_cut=how.mode not in ("nearest_even", "nearest_away"),
        is_rounded_product=how.product == "rounded",
        is_per_chunk=how.model == "per_chunk",
        digits=random_digits(how) if how.mode == "stochastic" else 0,
        first_element=first_element,
        num_elements=num_elements,
        random=random_plan(key.seed, key.step, key.stream, 0),
    )


def multiply(a: Tensor, b: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32. Values must be on the grids that `spec` names: of an operand
    with a scale inside the sum say IDENTITY, since its values may be anywhere in fp32.
    """
    if a.dim() > 2 or b.dim() > 2:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left, right = (x.expand(*batch, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
        size = a.shape[-2] * b.shape[-1]
        out = torch.empty(len(left), a.shape[-2], b.shape[-1], dtype=torch.float32, device="cpu")
        for index, (x, y) in enumerate(zip(left, right)):
            _multiply(x, y, out[index], spec, how_of(spec, key, index * size, out.numel()))
        return out.view(*batch, *out.shape[-2:])
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device="cpu")
    _multiply(a, b, out, spec, how_of(spec, key, 0, out.numel()))
    return out


def _multiply(a_MK: Tensor, b_KN: Tensor, out: Tensor, spec: GemmSpec, how: How) -> None:
    library = accumulate_library()
    assert library is not None
    a_MK, b_KN = a_MK.float(), b_KN.float()
    check_product(a_MK, b_KN)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    library.lp_accumulate(
        *(accumulator_plan(spec), how),
        *(address(a_MK), a_MK.stride(0), a_MK.stride(1)),
        *(address(b_KN), b_KN.stride(1), b_KN.stride(0)),
        *(address(out), m, n, k, spec.chunk or max(k, 1)),
        torch.get_num_threads() if m * n * k > _SERIAL else 1,
    )


def accumulator_plan(spec: GemmSpec) -> CastPlan | None:
    """How to round to the accumulator."""
    plan = cast_plan(spec.accumulate, spec.accumulator.mode)
    if spec.accumulate == "fp32" and plan is not None:  # does not saturate: Inf stays
        plan = CastPlan.from_buffer_copy(plan)
        plan.max = math.inf
    return plan


def _product_bits(spec: GemmSpec) -> int:
    return _significant_bits(spec.lhs) + _significant_bits(spec.rhs)


def _significant_bits(operand: QuantSpec) -> int:
    row = grid_format(operand.format)
    if isinstance(row, LookupFormat):
        return max(_bits_and_quantum(value)[0] for value in row.grid)
    if isinstance(row, IntFormat):
        return int(max(row.max, -row.min)).bit_length()
    return row.mantissa + 1


def _smallest_product(spec: GemmSpec) -> float:
    return _quantum(spec.lhs) * _quantum(spec.rhs)


def _quantum(operand: QuantSpec) -> float:
    """A power of two of which every value is a multiple."""
    row = grid_format(operand.format)
    if isinstance(row, LookupFormat):
        return min(_bits_and_quantum(value)[1] for value in row.grid if value)
    return row.quantum if isinstance(row, FloatFormat) else 1.0


def _bits_and_quantum(value: float) -> tuple[int, float]:
    """How many significant bits a value of fp32 has, and what the last of them is worth."""
    fraction, exponent = math.frexp(value)
    whole = int(abs(fraction) * 2**24)
    bits = 24 - ((whole & -whole).bit_length() - 1) if whole else 0
    return bits, 2.0 ** (exponent - bits)


_NO_LIBRARY = "no C++ compiler, or a CPU without AVX-512"
_SERIAL = 16**3
"""Multiply-adds below which waking the other threads costs more than they save."""
