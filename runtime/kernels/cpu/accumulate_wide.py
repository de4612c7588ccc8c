"""The emulation kernel in wide lanes: sums that runtime/kernels/cpu/accumulate.py declines, by accumulate_wide.cpp.

Double lanes hold every float accumulator, rounding, product and model: fp32 itself but to nearest even, and formats
that leave no room in fp32 to round to odd. Integer accumulators take int64 lanes; where no sum can leave one, any order
gives the same, and the product is one of the int8 unit or of float64. Bitwise equal to
runtime/numerics/reference_gemm.py; any compiler will do, no AVX-512 is needed.
"""

import ctypes
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.constants import ROUNDING_NUMBERS
from runtime.kernels.cpu.address import address, check_product
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import RandomPlan
from runtime.kernels.cpu.gemm import int8_library, multiply_int8
from runtime.kernels.cpu.philox import random_plan
from runtime.numerics.format_kinds import IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.reference_gemm import NO_KEY, RandomKey, random_digits
from runtime.numerics.reference_gemm import declines as reference_declines
from runtime.numerics.specs import AccumulateSpec, GemmSpec

SOURCE = Path(__file__).with_name("accumulate_wide.cpp")


class WidePlan(ctypes.Structure):
    """The accumulator and how it is reached; mirrors WidePlan of accumulate_wide.cpp, which explains each."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("tiny", "first_tie", "max", "top", "chunk_top")),
        *((name, ctypes.c_int64) for name in ("low", "high", "wraps")),
        *(
            (name, ctypes.c_int32)
            for name in ("is_integer", "emin", "mantissa", "has_gap", "has_negative_zero", "mode")
        ),
        *((name, ctypes.c_int32) for name in ("is_rounded_product", "is_per_chunk", "digits")),
        ("first_element", ctypes.c_int64),
        ("num_elements", ctypes.c_int64),
        ("random", RandomPlan),
    ]


@lru_cache(maxsize=1)
def wide_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler."""
    library = load_library(SOURCE)
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        operand = (pointer, size, size)
        library.lp_accumulate_wide.argtypes = (
            *(ctypes.POINTER(WidePlan), *operand, *operand),
            *(pointer, size, size, size, size, ctypes.c_int),
        )
        library.lp_accumulate_wide.restype = None
    return library


def declines(spec: GemmSpec) -> str | None:
    """Why the kernel cannot run this GEMM; None if it can."""
    if spec.accumulator.model == "aligned":
        return "its loops add one product after another"
    if spec.accumulator.mode not in ROUNDING_NUMBERS:
        return f"its loops do not round {spec.accumulator.mode}"
    return reference_declines(spec) or (None if wide_library() else "no C++ compiler")


def multiply(a: Tensor, b: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32. Values must be on the grids that `spec` names."""
    a, b = a.float(), b.float()
    if spec.accumulator.is_integer:
        is_nan = a.isnan().any(-1, keepdim=True) | b.isnan().any(-2, keepdim=True)
        if bool(is_nan.any()):
            return multiply(a.nan_to_num(0.0), b.nan_to_num(0.0), spec, key).masked_fill(is_nan, torch.nan)
        if _is_exact(spec, a.shape[-1]):
            return _exact_product(a, b, spec)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, n = a.shape[-2], b.shape[-1]
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (a, b))
    out = torch.empty(left.shape[0], m, n, dtype=torch.float32, device="cpu")
    for index, (x, y) in enumerate(zip(left, right)):
        _multiply(x, y, out[index], spec.accumulator, _plan(spec.accumulator, key, index * m * n, out.numel()))
    return out.view(*batch, m, n)


def _is_exact(spec: GemmSpec, num_k: int) -> bool:
    """Whether no sum of products leaves an integer accumulator, nor what float64 holds exactly."""
    left, right = (max(row.max, -row.min) for row in map(get_format, (spec.lhs.format, spec.rhs.format)))
    low, high = _ends(spec.accumulator)
    most = max(1, num_k) * left * right
    return most <= min(high, -low, 2**53)


def _exact_product(a: Tensor, b: Tensor, spec: GemmSpec) -> Tensor:
    """Exact, and rounded once to fp32. The values are integers within the formats."""
    is_int8 = all(get_format(each.format).max <= 127 >= -get_format(each.format).min for each in (spec.lhs, spec.rhs))
    if is_int8 and a.shape[-1] < 2**17 and a.dim() == b.dim() == 2 and min(*a.shape, *b.shape) > 0 and int8_library():
        return multiply_int8(a.to(torch.int8), b.to(torch.int8))
    return (a.double() @ b.double()).float() + 0.0


def _ends(how: AccumulateSpec) -> tuple[int, int]:
    """The least and the largest value of an integer accumulator."""
    row = get_format(how.format)
    assert isinstance(row, IntFormat)
    if how.overflow != "wrap":
        return int(row.min), int(row.max)
    low = -(2 ** (row.bits - 1)) if row.signed else 0
    return low, low + 2**row.bits - 1


def _multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, how: AccumulateSpec, plan: WidePlan) -> None:
    library = wide_library()
    assert library is not None
    check_product(a_MK, b_KN)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    library.lp_accumulate_wide(
        plan,
        *(address(a_MK), a_MK.stride(0), a_MK.stride(1)),
        *(address(b_KN), b_KN.stride(1), b_KN.stride(0)),
        *(address(out_MN), m, n, k, how.chunk or max(k, 1)),
        torch.get_num_threads() if m * n * k > _SERIAL else 1,
    )


def _plan(how: AccumulateSpec, key: RandomKey, first_element: int, num_elements: int) -> WidePlan:
    row = get_format(how.format)
    assert not isinstance(row, LookupFormat)
    plan = WidePlan(
        mode=ROUNDING_NUMBERS[how.mode],
        is_rounded_product=how.product == "rounded",
        is_per_chunk=how.model == "per_chunk",
        digits=random_digits(how) if how.mode == "stochastic" else 0,
        first_element=first_element,
        num_elements=num_elements,
        random=random_plan(key.seed, key.step, key.stream, 0),
    )
    if isinstance(row, IntFormat):
        plan.is_integer, plan.wraps = True, how.overflow == "wrap"
        plan.low, plan.high = _ends(how)
        return plan
    overflows = how.format == "fp32"
    plan.tiny, plan.first_tie, plan.max = row.tiny, row.first_tie, row.max
    plan.top, plan.chunk_top = (math.inf, math.inf) if overflows else (row.max, torch.finfo(torch.float32).max)
    plan.emin, plan.mantissa = row.emin, row.mantissa
    plan.has_gap, plan.has_negative_zero = not row.subnormals, row.has_negative_zero
    return plan


_SERIAL = 16**3
"""Multiply-adds below which waking the other threads costs more than they save."""
