"""Aligned sums on the CPU, by accumulate_aligned.cpp: bitwise equal to runtime/numerics/reference_aligned.py.

Any accumulator of the model, any values, any compiler; where no value is Inf or NaN and no product comes near the ends
of fp32's range, as with every 8-bit format, the sums are made in float and int32 lanes, else in double ones.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address, check_product
from runtime.kernels.cpu.build import load_library
from runtime.numerics.accumulators import declines_aligned
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec

SOURCE = Path(__file__).with_name("accumulate_aligned.cpp")


class AlignedPlan(ctypes.Structure):
    """The accumulator and the operands; mirrors AlignedPlan of accumulate_aligned.cpp, which explains each."""

    _fields_ = [(name, ctypes.c_int32) for name in ("align", "mantissa", "chunk", "a_emin", "b_emin")]


@lru_cache(maxsize=1)
def aligned_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler."""
    library = load_library(SOURCE)
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        operand = (pointer, size, size)
        library.lp_accumulate_aligned.argtypes = (
            *(ctypes.POINTER(AlignedPlan), *operand, *operand),
            *(pointer, size, size, size, ctypes.c_int),
        )
        library.lp_accumulate_aligned.restype = None
    return library


def declines(spec: GemmSpec) -> str | None:
    """Why the kernel cannot run this GEMM; None if it can."""
    if spec.accumulator.model != "aligned":
        return f"it aligns sums, and {spec.accumulator} does not"
    return declines_aligned(spec) or (None if aligned_library() else "no C++ compiler")


def multiply(a: Tensor, b: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32. Values must be on the grids that `spec` names."""
    a, b = a.float(), b.float()
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    left, right = (x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (a, b))
    out = torch.empty(left.shape[0], a.shape[-2], b.shape[-1], dtype=torch.float32, device="cpu")
    for x, y, z in zip(left, right, out):
        _multiply(x, y, z, spec)
    return out.view(*batch, *out.shape[-2:])


def _multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, spec: GemmSpec) -> None:
    library = aligned_library()
    assert library is not None
    check_product(a_MK, b_KN)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    row, how = get_format(spec.accumulate), spec.accumulator
    assert isinstance(row, FloatFormat)
    plan = AlignedPlan(how.align_bits, row.mantissa, how.chunk, _emin(spec.lhs.format), _emin(spec.rhs.format))
    library.lp_accumulate_aligned(
        plan,
        *(address(a_MK), a_MK.stride(0), a_MK.stride(1)),
        *(address(b_KN), b_KN.stride(1), b_KN.stride(0)),
        *(address(out_MN), m, n, k),
        torch.get_num_threads() if m * n * k > _SERIAL else 1,
    )


def _emin(format: str) -> int:
    row = grid_format(format)
    assert isinstance(row, FloatFormat)
    return row.emin


_SERIAL = 16**3
"""Multiply-adds below which waking the other threads costs more than they save."""
