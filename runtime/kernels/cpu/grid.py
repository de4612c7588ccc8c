"""Grid on the CPU: what runtime/numerics/grid.py computes, in one pass of grid.cpp, for what cast.cpp does not serve.

That is fp64 values, overflow="ieee", long tables (e8m0) and formats whose constants are no fp32: every scalar format,
rounding, dtype and scale.
"""

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import RandomPlan, num_threads
from runtime.kernels.cpu.contiguous import contiguous
from runtime.kernels.cpu.philox import random_plan
from runtime.numerics.format_kinds import FloatFormat, IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.grid import GridOverflow, int_range, meaning_of_overflow, round_to_grid
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.specs import Rounding

SOURCE = Path(__file__).with_name("grid.cpp")
_MODES: dict[Rounding, int] = {"nearest_even": 0, "nearest_away": 1, "toward_zero": 2, "stochastic": 3}


class GridPlan(ctypes.Structure):
    """What the loop needs to know; mirrors GridPlan of grid.cpp, which explains each."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("emin", "mantissa", "is_even", "is_signed", "mode", "has_top")),
        *((name, ctypes.c_int32) for name in ("has_tie", "has_negative_zero")),
        *((name, ctypes.c_double) for name in ("gap", "tie", "min", "max", "top")),
        ("count", ctypes.c_int64),
        ("table", ctypes.c_void_p),
    ]


class _Plan(NamedTuple):
    plan: GridPlan
    table: "np.ndarray[tuple[int], np.dtype[np.float64]]"
    """What the plan points to."""


@lru_cache(maxsize=1)
def grid_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None if it cannot be (one warning has said why)."""
    library = load_library(SOURCE)
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        draw = ctypes.POINTER(RandomPlan)
        library.lp_round.argtypes = [
            ctypes.POINTER(GridPlan), pointer, pointer, integer, ctypes.c_int64, draw, integer
        ]  # fmt: skip
        library.lp_round.restype = None
    return library


def on_grid(
    x: Tensor, format: str, rounding: Rounding, scale: Tensor | None, seed: int, step: int, stream: int, offset: int,
    overflow: GridOverflow = "saturate", out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What round_to_grid gives, inside of a torch op: by grid.cpp where it serves. `out`: where it may be written, of
    x's shape and apart from x, if it has the dtype of the result.
    """
    row = get_format(format)
    library = grid_library() if x.is_cpu and x.is_floating_point() and x.numel() and rounding in _MODES else None
    is_refused = rounding == "toward_zero" and isinstance(row, LookupFormat) and row.signed and 0.0 not in row.grid
    if library is None or is_refused or overflow == "unbounded" or x.layout != torch.strided:
        return round_to_grid(x, row, rounding, scale, seed, step, stream, offset, overflow)
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = contiguous(x.to(working) if scale is None else x.to(working) / scale.to(working))
    random = None
    if rounding == "stochastic":
        check_counter(step, stream, offset)
        random = random_plan(signed_seed(seed), step, stream, offset)
    if out is None or out.dtype != working or not out.is_contiguous():
        out = torch.empty(y.shape, dtype=working, device="cpu")
    plan = _plan(format, rounding, overflow, working)
    library.lp_round(
        plan.plan, address(y), address(out), working == torch.float64, y.numel(), random, num_threads(y.numel())
    )
    return out


@lru_cache(maxsize=1024)
def _plan(format: str, rounding: Rounding, overflow: GridOverflow, working: torch.dtype) -> _Plan:
    row = get_format(format)
    low, high = int_range(row, working) if isinstance(row, IntFormat) else (row.min, row.max)
    top = meaning_of_overflow(row) if overflow == "ieee" else None
    plan = GridPlan(
        is_even=isinstance(row, IntFormat),
        is_signed=row.signed,
        mode=_MODES[rounding],
        has_top=top is not None,
        has_negative_zero=row.has_negative_zero,
        min=low,
        max=high,
        top=0.0 if top is None else top,
    )
    values: tuple[float, ...] = ()
    if isinstance(row, FloatFormat):
        plan.emin, plan.mantissa, plan.gap = row.emin, row.mantissa, 0.0 if row.subnormals else row.tiny
        plan.has_tie = row.zero_exponent_is_normal and rounding in ("nearest_even", "nearest_away")
        plan.tie = row.first_tie
    elif isinstance(row, LookupFormat):
        below = -row.beyond_max if row.min == -row.max else 2 * row.grid[0] - row.grid[1]
        values = (*((below,) if row.signed else ()), *row.grid, row.beyond_max)
    size = 1 << (len(values) - 1).bit_length() if values else 1
    table = np.array(values + (math.inf,) * (size - len(values)), np.float64)
    plan.count, plan.table = len(values), table.ctypes.data
    return _Plan(plan, table)
