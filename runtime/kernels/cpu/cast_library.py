"""The C face of cast.cpp: its structs, its functions with their argument types, and who is served by them."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.constants import MAX_TABLE
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.contiguous import contiguous

SOURCE = Path(__file__).with_name("cast.cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; the index is the number they know the dtype by."""
OUT_DTYPES = (*DTYPES, torch.int8)
"""What the casts write, likewise."""
SERIAL = 1 << 15
"""Elements below which waking the other threads costs more than they save."""


@lru_cache(maxsize=1)
def cast_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None if it cannot be (one warning has said why)."""
    library = load_library(SOURCE)
    if library is not None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        plan, draw, turn = (ctypes.POINTER(each) for each in (CastPlan, RandomPlan, TurnPlan))
        shape = [size, size]
        into: list[Any] = [pointer, integer, pointer, integer, *shape]
        rest: list[Any] = [pointer, *shape, integer, draw, integer]
        library.lp_cast.argtypes = [plan, *into, *rest]
        library.lp_cast_table.argtypes = [ctypes.POINTER(TablePlan), *into, *rest]
        library.lp_cast_strided.argtypes = [plan, ctypes.POINTER(TablePlan), *into, *shape, *rest]
        tables = ctypes.POINTER(TablePlan)
        library.lp_cast_observed.argtypes = [
            plan, tables, pointer, integer, pointer, integer, size, pointer, draw, pointer, integer
        ]  # fmt: skip
        library.lp_cast_blocks.argtypes = [
            ctypes.POINTER(BlockPlan), *into, size, integer, ctypes.c_float, integer, draw, turn, integer
        ]  # fmt: skip
        library.lp_finite_amax.argtypes = [pointer, integer, size, *shape, integer, integer, turn, integer]
        library.lp_finite_amax.restype = ctypes.c_float
        library.lp_scale.argtypes = [pointer, integer, pointer, *shape, *shape, ctypes.c_double, integer, integer]
        library.lp_scale.restype = None
    return library


def is_readable(x: Tensor) -> bool:
    """Whether the kernels can read x, once it is contiguous: on the CPU, one of DTYPES, not empty."""
    return x.is_cpu and x.dtype in DTYPES and x.layout == torch.strided and x.numel() > 0


def num_threads(count: int) -> int:
    """Threads for a loop over `count` elements: torch's own number, or one for a small loop."""
    return torch.get_num_threads() if count > SERIAL else 1


class CastPlan(ctypes.Structure):
    """What the loop needs to know of a format and a rounding; mirrors CastPlan of cast.cpp, which explains each."""

    _fields_ = [
        ("shift", ctypes.c_uint32),
        ("round_bias", ctypes.c_uint32),
        ("odd_mask", ctypes.c_uint32),
        ("keep_mask", ctypes.c_uint32),
        ("low", ctypes.c_float),
        ("magic", ctypes.c_float),
        ("spacing", ctypes.c_float),
        ("up_at", ctypes.c_float),
        ("down_below", ctypes.c_float),
        ("max", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("min", ctypes.c_float),
    ]


class TablePlan(ctypes.Structure):
    """A lookup format as a step function; mirrors TablePlan of cast.cpp."""

    _fields_ = [
        ("count", ctypes.c_int64),
        ("values", ctypes.c_float * MAX_TABLE),
        ("starts", ctypes.c_float * MAX_TABLE),
        ("max", ctypes.c_float),
        ("min", ctypes.c_float),
        ("zero", ctypes.c_float),
    ]


class BlockPlan(ctypes.Structure):
    """How the blocks of a block format are scaled; mirrors BlockPlan of cast.cpp."""

    _fields_ = [
        ("rule", ctypes.c_int),
        ("exponent", ctypes.c_int),
        ("max", ctypes.c_double),
        ("round_from", ctypes.c_float),
        ("unit", ctypes.c_float),
        ("bf16_from", ctypes.c_int),
        ("block", ctypes.c_int),
        ("per_max", ctypes.c_float),
        ("height", ctypes.c_int),
        ("per_four", ctypes.c_float),
        ("element", CastPlan),
        ("scale", CastPlan),
    ]


class TurnPlan(ctypes.Structure):
    """What turns an operand before its cast; mirrors TurnPlan of rotate.h. The signs live as long as the plan does."""

    _fields_ = [("size", ctypes.c_int32), ("is_rounded", ctypes.c_int32), ("signs", ctypes.c_void_p)]


class RandomPlan(ctypes.Structure):
    """Key and counter of one random stream; mirrors RandomPlan of cast.cpp field by field."""

    _fields_ = [
        ("key", ctypes.c_uint32 * 2),
        ("high", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("stream", ctypes.c_uint32),
        ("offset", ctypes.c_int64),
    ]


def run_cast(
    plan: CastPlan | TablePlan,
    x: Tensor,
    out: Tensor,
    scale: Tensor | None,
    tile: tuple[int, int],
    draw: RandomPlan | None,
    *,
    is_multiplied: bool = False,
) -> bool:
    """x / scale rounded into `out`, times the scale if `is_multiplied`; whether a value overflowed or was NaN.

    out contiguous, of x's shape, and x's memory or apart from it; scale: contiguous fp32, one per `tile` of the matrix
    view, or None. draw: None unless the rounding is stochastic.
    """
    library = cast_library()
    assert library is not None
    k = x.shape[-1] if x.ndim else 1
    is_table, threads = isinstance(plan, TablePlan), num_threads(x.numel())
    if not x.is_contiguous():
        strides = _matrix_strides(x)
        if strides is not None:
            m = x.numel() // k
            return bool(
                library.lp_cast_strided(
                    *((None, plan) if is_table else (plan, None)),
                    *(address(x), DTYPES.index(x.dtype), address(out), OUT_DTYPES.index(out.dtype), m, k, *strides),
                    *(None if scale is None else address(scale), *((m, k) if scale is None else tile), is_multiplied),
                    *(draw, threads),
                )
            )
        x = contiguous(x)
    m, k = (1, x.numel()) if scale is None else (x.numel() // k, k)
    tile = (m, k) if scale is None else tile
    run = library.lp_cast_table if is_table else library.lp_cast
    beyond = run(
        plan,
        *(address(x), DTYPES.index(x.dtype), address(out), OUT_DTYPES.index(out.dtype), m, k),
        *(None if scale is None else address(scale), *tile, is_multiplied),
        *(draw, threads),
    )
    return bool(beyond)


def run_cast_observed(
    plan: CastPlan | TablePlan, x: Tensor, out: Tensor, scale: Tensor, draw: RandomPlan | None
) -> float:
    """x / scale rounded into `out`, and max |x| in the same pass: NaN where x holds one. x and out contiguous, of one
    shape; scale: fp32 (); draw as in `run_cast`.
    """
    library = cast_library()
    assert library is not None
    amax = ctypes.c_float(0.0)
    library.lp_cast_observed(
        *((None, plan) if isinstance(plan, TablePlan) else (plan, None)),
        *(address(x), DTYPES.index(x.dtype), address(out), OUT_DTYPES.index(out.dtype), x.numel()),
        *(address(scale), draw, ctypes.byref(amax), num_threads(x.numel())),
    )
    return amax.value


def _matrix_strides(x: Tensor) -> tuple[int, int] | None:
    """(row, column) of the matrix view, in elements; None where its rows lie at no one distance, or it has but one."""
    *lead, columns = x.shape
    *strides, column_stride = x.stride()
    if not lead or x.numel() == columns or x.is_neg():
        return None
    is_one_view = all(a == b * n for a, b, n in zip(strides, strides[1:], lead[1:]))
    return (strides[-1], column_stride) if is_one_view else None
