"""The C face of update.cpp: one step of an optimizer in one pass over a parameter, and who is served by it.

Served are CPU tensors: fp32 and bf16 weights that are their own masters, with or without a remainder, moments in fp32,
bf16 and in codes of float formats of up to 16 bits that have a NaN. Others take torch's operations (runtime/optim/),
with equal bits.
"""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.kernels.cast_plans import cast_plan
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import RandomPlan, cast_library, num_threads
from runtime.kernels.cpu.codes import _encoder, code_plan, codes_library
from runtime.kernels.cpu.grid import _plan as grid_plan
from runtime.kernels.cpu.grid import grid_library
from runtime.kernels.cpu.philox import random_plan
from runtime.numerics.formats import get_format
from runtime.numerics.random import signed_seed
from runtime.numerics.specs import Rounding

SOURCE = Path(__file__).with_name("update.cpp")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 3, torch.int16: 4}
_SPLIT, _NOTHING = 5, 6


class _Kept(ctypes.Structure):
    """Mirrors Kept of update.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "is_rounded", "is_stochastic")),
        *((name, ctypes.c_void_p) for name in ("at", "low", "cast", "grid", "exact", "codes")),
        ("random", RandomPlan),
    ]


class _Calls(ctypes.Structure):
    """Mirrors Calls."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("cast", "encode", "decode", "round")]


class Numbers(ctypes.Structure):
    """Mirrors Numbers of update.cpp: what a step multiplies by, each rounded to fp32. SGD has lambda, m and -lr in
    `decay`, `beta` and `rest`.
    """

    _fields_ = [
        (name, ctypes.c_float) for name in ("unscale", "decay", "beta", "rest", "beta2", "rest2", "root", "eps", "size")
    ]


class Values(NamedTuple):
    """Flat values of one format: where they are kept (None: nowhere), how they are rounded, by which stream."""

    kept: Tensor | None
    format: str
    rounding: Rounding = "nearest_even"
    stream: int = 0
    low: Tensor | None = None
    """Of a bf16 that is the upper half of an fp32."""


def is_served(values: Values) -> bool:
    """Whether update.cpp reads, rounds and writes these."""
    if values.low is not None:
        return values.kept is not None and values.kept.is_cpu
    if values.kept is not None and not (values.kept.is_cpu and values.kept.dtype in _KINDS):
        return False
    if values.format == "fp32":
        return values.kept is None or values.kept.dtype == torch.float32
    row = get_format(values.format)
    return (
        row.has_nan and cast_plan(values.format, values.rounding) is not None and code_plan(values.format) is not None
    )


@lru_cache(maxsize=1)
def update_library() -> ctypes.CDLL | None:
    """The library and those that it calls; None if one of them cannot be built."""
    library = load_library(SOURCE)
    if library is None or None in (cast_library(), codes_library(), grid_library()):
        return None
    calls, numbers, kept = (ctypes.POINTER(each) for each in (_Calls, Numbers, _Kept))
    for function in (library.lp_adamw, library.lp_sgd):
        function.argtypes = [calls, numbers, kept, kept, kept, kept, ctypes.c_int64, ctypes.c_int]
        function.restype = None
    return library


def adamw(
    numbers: Numbers,
    weight: Values,
    moment: Values,
    variance: Values,
    gradient: Tensor,
    seed: int,
    step: int,
    offset: int,
) -> None:
    """One step of runtime/optim/adamw.py. All flat, contiguous, of one size; `offset` of the first element in the whole
    parameter. `is_served` must hold of each, and update_library() must be there.
    """
    given = [_kept(each, seed, step, offset) for each in (weight, moment, variance, _gradient(gradient))]
    _run("lp_adamw", numbers, given, gradient)


def sgd(
    numbers: Numbers,
    weight: Values,
    moment: Values,
    rounding: Values,
    gradient: Tensor,
    seed: int,
    step: int,
    offset: int,
) -> None:
    """One step of runtime/optim/sgd.py, likewise. `rounding`: that of AXPY (1), kept nowhere."""
    given = [_kept(each, seed, step, offset) for each in (weight, moment, _gradient(gradient), rounding)]
    _run("lp_sgd", numbers, given, gradient)


def _run(name: str, numbers: Numbers, given: list[_Kept], gradient: Tensor) -> None:
    count = gradient.numel()
    getattr(update_library(), name)(_calls(), numbers, *given, count, num_threads(count))


def _gradient(gradient: Tensor) -> Values:
    return Values(gradient, "fp32" if gradient.dtype == torch.float32 else "bf16")


def _kept(values: Values, seed: int, step: int, offset: int) -> _Kept:
    kept = _Kept(kind=_NOTHING if values.kept is None else _KINDS[values.kept.dtype])
    if values.kept is not None:
        kept.at = address(values.kept)
    if values.low is not None:
        kept.kind, kept.low = _SPLIT, address(values.low)
        return kept
    if values.format == "fp32":
        return kept
    kept.is_rounded, kept.is_stochastic = True, values.rounding == "stochastic"
    cast, exact = cast_plan(values.format, values.rounding), cast_plan(values.format, "nearest_even")
    grid, codes = grid_plan(values.format, values.rounding, "saturate", torch.float64), code_plan(values.format)
    kept.cast, kept.exact, kept.grid, kept.codes = map(_address, (cast, exact, grid.plan, codes))
    kept.plans = cast, exact, grid, codes  # what it points to
    if kept.is_stochastic:
        kept.random = random_plan(signed_seed(seed), step, values.stream, offset)
    return kept


def _address(plan: ctypes.Structure | None) -> int:
    assert plan is not None
    return ctypes.addressof(plan)


@lru_cache(maxsize=1)
def _calls() -> _Calls:
    casts, codes, grid = cast_library(), codes_library(), grid_library()
    assert casts is not None
    assert codes is not None
    assert grid is not None
    functions = (casts.lp_cast, _encoder(casts), codes.lp_decode, grid.lp_round)
    return _Calls(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))
