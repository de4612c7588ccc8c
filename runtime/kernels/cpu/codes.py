"""Codes on the CPU: `encode` and `decode` in one pass over memory, by cast.cpp and codes.cpp.

Served are fp32, bf16 and fp16 tensors, scalar formats that cast.cpp rounds to (all but e8m0 and floats whose constants
are no fp32), every rounding and scale, saturating; decode has every format. What
the grid kernel rounds becomes codes in a pass of its own.
"""

import ctypes
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import DTYPES, CastPlan, RandomPlan, TablePlan, cast_library, num_threads
from runtime.kernels.fake import beside_tracing
from runtime.numerics.codes import code_dtype, codes_of_grid
from runtime.numerics.format_kinds import IntFormat, LookupFormat
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import matrix_shape
from runtime.numerics.specs import Rounding

SOURCE = Path(__file__).with_name("codes.cpp")
BYTES = {torch.uint8: 1, torch.int32: 4, torch.int64: 8}
"""Of a code, by the dtype of codes that are read and written."""
_NEVER = 0xFFFFFFFF


class CodePlan(ctypes.Structure):
    """How codes and fp32 bits belong together; mirrors CodePlan of codes.h, which explains each."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        *((name, ctypes.c_uint32) for name in ("shift", "offset", "first_normal", "special_from", "infinity")),
        *((name, ctypes.c_uint32) for name in ("nan_code", "nan_sign", "lone_nan")),
        *((name, ctypes.c_float) for name in ("low", "magic", "quantum")),
        *((name, ctypes.c_int32) for name in ("zero", "is_signed", "count")),
        ("grid", ctypes.c_float * 64),
        ("code_of", ctypes.c_int32 * 64),
        ("minus_zero", ctypes.c_int32),
        ("values", ctypes.c_float * 256),
    ]


@lru_cache(maxsize=1)
def codes_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler."""
    library, casts = load_library(SOURCE), cast_library()
    if library is None or casts is None:
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    plan = ctypes.POINTER(CodePlan)
    library.lp_decode.argtypes = [plan, pointer, integer, pointer, size, integer]
    library.lp_codes.argtypes = [plan, pointer, pointer, size, pointer, size, pointer, integer, integer]
    library.lp_codes.restype = None
    real = ctypes.c_float
    library.lp_decode_blocks.argtypes = [
        plan,
        pointer,
        pointer,
        pointer,
        size,
        size,
        size,
        real,
        real,
        integer,
        integer,
    ]
    return library


def _encoder(casts: ctypes.CDLL) -> Any:
    """lp_encode of the library of casts, its arguments declared: a library that was loaded again knows none."""
    if casts.lp_encode.argtypes is None:
        plan, pointer, size, integer = ctypes.POINTER(CodePlan), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        casts.lp_encode.argtypes = [
            *(
                ctypes.POINTER(CastPlan),
                ctypes.POINTER(TablePlan),
                plan,
                pointer,
                integer,
                pointer,
                integer,
                size,
                size,
            ),
            *(pointer, size, size, ctypes.POINTER(RandomPlan), integer),
        ]
    return casts.lp_encode


@lru_cache(maxsize=1024)
def code_plan(format: str) -> CodePlan | None:
    """The plan of a format; None if codes.h has no arithmetic for it."""
    row = get_format(format)
    if isinstance(row, IntFormat):
        return CodePlan(kind=1, bits=row.bits, zero=row.zero, is_signed=row.signed)
    if isinstance(row, LookupFormat):
        return _table_codes(row)
    lowest = 0 if row.zero_exponent_is_normal else 1
    field = row.emin + 127 - lowest
    magic = 2.0**23 * row.quantum
    if field < 0 or magic >= 2.0**128:
        return None
    sign, ones = 2 ** (row.bits - 1), 2 ** (row.bits - 1) - 1
    top = ones - (2**row.mantissa - 1)
    return CodePlan(
        kind=0,
        bits=row.bits,
        shift=23 - row.mantissa,
        offset=field << row.mantissa,
        first_normal=1 if row.zero_exponent_is_normal else 2**row.mantissa,
        special_from={"ieee": top, "nan": ones, "merged": ones, "p3109": ones}.get(row.top, _NEVER),
        infinity={"ieee": top, "p3109": ones}.get(row.top, _NEVER),
        nan_code=ones if row.has_negative_zero else sign,
        nan_sign=row.has_negative_zero,
        lone_nan=_NEVER if row.has_negative_zero else sign,
        low=2.0**row.emin,
        magic=magic,
        quantum=row.quantum if row.subnormals else 0.0,
    )


def _table_codes(row: LookupFormat) -> CodePlan | None:
    if row.bits > 8:
        return None
    is_exponents = row.values[:-1] == tuple(2.0 ** (e - 127) for e in range(255))
    plan = CodePlan(kind=3 if is_exponents else 2, bits=row.bits)
    plan.values[: len(row.values)] = row.values
    first = {value: code for code, value in reversed(list(enumerate(row.values)))}  # of two zeros the first
    zeros = [code for code, value in enumerate(row.values) if value == 0 and math.copysign(1, value) < 0]
    plan.minus_zero = zeros[0] if zeros else first.get(0.0, 0)
    plan.nan_code = next((code for code, value in enumerate(row.values) if math.isnan(value)), 0)
    if len(row.grid) > 64:
        return plan  # count 0: `encode` does not serve it
    plan.count = len(row.grid)
    plan.grid[: plan.count] = row.grid
    plan.code_of[: plan.count] = [first[value] for value in row.grid]
    return plan


def can_encode(format: str, rounding: Rounding) -> bool:
    """Whether `encode` below serves, on a tensor that cast.cpp can read; saturating."""
    plan = code_plan(format)
    if plan is None or (plan.kind == 2 and plan.count == 0) or codes_library() is None:
        return False
    return (cast_plan(format, rounding) or table_plan(format, rounding)) is not None


def can_decode(codes: Tensor, format: str) -> bool:
    """Whether `decode` below serves."""
    return (
        codes.is_cpu and codes.layout == torch.strided and code_plan(format) is not None and codes_library() is not None
    )


def encode(
    x: Tensor, format: str, rounding: Rounding, scale: Tensor | None, tile: tuple[int, int], random: RandomPlan | None
) -> Tensor:
    """The codes of x / scale. x contiguous; scale and tile as `run_cast` takes them. FormatError for NaN in a format
    that has no code for it.
    """
    library, row, codes = cast_library(), get_format(format), code_plan(format)
    assert library is not None
    assert codes is not None
    out = torch.empty(x.shape, dtype=code_dtype(row.bits), device="cpu")
    m, k = (1, x.numel()) if scale is None else matrix_shape(x.shape)
    beyond = _encoder(library)(
        *(cast_plan(format, rounding), table_plan(format, rounding), codes),
        *(address(x), DTYPES.index(x.dtype), address(out), BYTES[out.dtype], m, k),
        *(None if scale is None else address(scale), *((m, k) if scale is None else tile)),
        *(random, num_threads(x.numel())),
    )
    if beyond and not row.has_nan and (num_nan := int(x.isnan().sum())):
        raise FormatError(f"{row.name} has no code for NaN", got=f"{num_nan} NaN", hint="cleaning the tensor")
    return out


def codes_on_grid(q: Tensor, format: str) -> Tensor:
    """What codes_of_grid gives, inside of a torch op: by codes.cpp where it serves."""
    row, plan = get_format(format), code_plan(format)
    if not q.is_cpu or plan is None or not q.numel() or (library := codes_library()) is None:
        return codes_of_grid(q, row)
    if not row.has_nan and (num_nan := int(q.isnan().sum())):
        raise FormatError(f"{row.name} has no code for NaN", got=f"{num_nan} NaN", hint="cleaning the tensor")
    if isinstance(row, IntFormat) and row.bits > 24:  # fp32 does not hold every value
        return (q.long() + row.zero & (2**row.bits - 1)).to(code_dtype(row.bits))
    values = q.float().contiguous()
    out = torch.empty(q.shape, dtype=code_dtype(row.bits), device="cpu")
    table, code_of = _long_table(format) if plan.kind == 2 else (None, None)
    library.lp_codes(
        plan,
        *((None, None, 0) if table is None or code_of is None else (address(table), address(code_of), len(table))),
        *(address(values), values.numel(), address(out), BYTES[out.dtype]),
        num_threads(values.numel()),
    )
    return out


@lru_cache(maxsize=64)
def _long_table(format: str) -> tuple[Tensor, Tensor]:
    """The finite values of a table, increasing, and their codes."""
    row = get_format(format)
    assert isinstance(row, LookupFormat)
    first = {value: code for code, value in reversed(list(enumerate(row.values)))}  # of two zeros the first
    with beside_tracing():
        table = torch.tensor(row.grid, dtype=torch.float32, device="cpu")
        return table, torch.tensor([first[value] for value in row.grid], dtype=torch.int32, device="cpu")


def decode(codes: Tensor, format: str) -> Tensor:
    """The fp32 values of codes. FormatError for a number that is no code."""
    library, plan, row = codes_library(), code_plan(format), get_format(format)
    assert library is not None
    if codes.dtype not in BYTES or (row.bits == 32 and codes.dtype != torch.int64):
        codes = codes.long()
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    is_beyond = library.lp_decode(
        plan, address(codes), BYTES[codes.dtype], address(out), codes.numel(), num_threads(codes.numel())
    )
    if is_beyond:
        raise FormatError(f"not codes of {row.name}", expected=f"0 <= code < 2^{row.bits}")
    return out
