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
from runtime.kernels.cpu.cast_library import RandomPlan, num_threads
from runtime.kernels.cpu.codes import code_plan
from runtime.kernels.cpu.grid import _plan as grid_plan
from runtime.kernels.cpu.grid import grid_library
from runtime.kernels.cpu.philox import random_plan
from runtime.numerics.formats import get_format
from runtime.numerics.random import signed_seed
from runtime.numerics.specs import Rounding

SOURCE = Path(__file__).with_name("update.cpp")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.int16: 3, torch.float16: 3}
_SPLIT, _NOTHING, _TABLE = 4, 5, 6
_BLOCK = 1024
"""Elements of a block of update.cpp, which those of a moment must divide."""


class _Kept(ctypes.Structure):
    """Mirrors Kept of update.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "is_rounded", "is_stochastic", "mode")),
        *((name, ctypes.c_void_p) for name in ("at", "low", "cast", "grid", "codes", "round", "blocks")),
        ("random", RandomPlan),
    ]


class _Blocks(ctypes.Structure):
    """Mirrors Blocks of update_blocks.h."""

    _fields_ = [
        ("scales", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("max", ctypes.c_float),
        ("bits", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("values", "middles", "bases")),
        *((name, ctypes.c_int32) for name in ("first", "last")),
    ]


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
    scales: Tensor | None = None
    """One a block of `block` elements; `kept` are codes then: of `format`, or of a table of so many values."""
    block: int = 0
    table: Tensor | None = None


def is_served(values: Values) -> bool:
    """Whether update.cpp reads, rounds and writes these."""
    if values.low is not None:
        return values.kept is not None and values.kept.is_cpu
    if values.kept is not None and not (values.kept.is_cpu and values.kept.dtype in _KINDS):
        return False
    if values.kept is not None and values.kept.dtype == torch.float16 and values.format != "fp16":
        return False  # fp16's own bits are its codes, and no other format's
    if values.scales is not None and (_BLOCK % values.block or not values.scales.is_cpu):
        return False
    if values.table is not None:
        return True
    if values.format == "fp32":
        return values.kept is None or values.kept.dtype == torch.float32
    row = get_format(values.format)
    return (
        row.has_nan and cast_plan(values.format, values.rounding) is not None and code_plan(values.format) is not None
    )


@lru_cache(maxsize=1)
def update_library() -> ctypes.CDLL | None:
    """The library, with the one that it calls; None if one of them cannot be built."""
    library = load_library(SOURCE)
    if library is None or grid_library() is None:
        return None
    numbers, kept = ctypes.POINTER(Numbers), ctypes.POINTER(_Kept)
    for function in (library.lp_adamw, library.lp_sgd):
        function.argtypes = [numbers, kept, kept, kept, kept, ctypes.c_int64, ctypes.c_int]
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
    getattr(update_library(), name)(numbers, *given, count, num_threads(count))


def _gradient(gradient: Tensor) -> Values:
    return Values(gradient, "fp32" if gradient.dtype == torch.float32 else "bf16")


def _kept(values: Values, seed: int, step: int, offset: int) -> _Kept:
    kept = _Kept(kind=_NOTHING if values.kept is None else _KINDS[values.kept.dtype])
    if values.kept is not None:
        kept.at = address(values.kept)
    if values.scales is not None:
        blocks = _blocks(values, values.scales)
        kept.blocks, kept.parts = ctypes.addressof(blocks), blocks
    if values.table is not None:
        kept.kind = _TABLE
        return kept
    if values.low is not None:
        kept.kind, kept.low = _SPLIT, address(values.low)
        return kept
    if values.format == "fp32":
        return kept
    kept.is_rounded, kept.is_stochastic = True, values.rounding == "stochastic"
    cast, codes = cast_plan(values.format, values.rounding), code_plan(values.format)
    grid = grid_plan(values.format, values.rounding, "saturate", torch.float64)
    kept.cast, kept.grid, kept.codes = map(_address, (cast, grid.plan, codes))
    kept.plans = cast, grid, codes  # what it points to
    library = grid_library()
    assert library is not None
    kept.round = ctypes.cast(library.lp_round, ctypes.c_void_p)
    kept.mode = grid.plan.mode if 1 <= grid.plan.mantissa <= 19 else -1
    if kept.is_stochastic:
        kept.random = random_plan(signed_seed(seed), step, values.stream, offset)
    return kept


def _address(plan: ctypes.Structure | None) -> int:
    assert plan is not None
    return ctypes.addressof(plan)


def _blocks(values: Values, scales: Tensor) -> _Blocks:
    blocks = _Blocks(scales=address(scales), size=values.block, max=1.0, bits=8)
    if values.table is None:
        blocks.max = float(get_format(values.format).max)
        return blocks
    table, middles, bases, first = _buckets(tuple(values.table.tolist()))
    blocks.bits = len(table).bit_length() - 1
    blocks.values, blocks.middles, blocks.bases = map(address, (table, middles, bases))
    blocks.first, blocks.last = first, first + len(bases) // 2 - 1
    return blocks


@lru_cache(maxsize=8)
def _buckets(values: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, int]:
    """(values, middles, bases, first) as update_blocks.h has them, for numbers up to 1; below 2^-24 is one bucket.

    The middles of a table are further apart than a bucket is wide: none has two.
    """
    table = torch.tensor(values, dtype=torch.float32)
    middles = (table[:-1] + table[1:]) / 2
    first, last = 103 << 7, 127 << 7  # the upper 15 bits of 2^-24 and of 1
    starts = torch.arange(first, last + 1, dtype=torch.int32) << 16
    ends = starts + 0xFFFF  # of negative numbers the least
    low = starts.view(torch.float32).clone()
    low[0] = 0.0
    least = torch.cat((low, -ends.view(torch.float32)))
    bases = torch.bucketize(least, middles).int()
    greatest = torch.cat((ends.view(torch.float32), -low))
    assert int((torch.bucketize(greatest, middles) - bases).max()) <= 1
    return table, torch.cat((middles, torch.tensor([torch.inf]))), bases, first
