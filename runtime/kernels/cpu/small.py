"""Small: a product of small matrices in one call of C++: scales, casts, GEMM and epilogue, by the functions that a
large product calls one by one. What that saves is Python between them, which takes 10 times as long as their work.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cast_plans import cast_plan, table_plan
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import OUT_DTYPES, CastPlan, TablePlan, cast_library
from runtime.kernels.cpu.epilogue import epilogue_library
from runtime.numerics.format_kinds import filled_to
from runtime.numerics.formats import get_format
from runtime.numerics.specs import QuantSpec

_SOURCE = Path(__file__).with_name("small.cpp")
_SCALES = {"tensor": 1, "row": 2, "column": 3}


class _Operand(ctypes.Structure):
    """Mirrors Operand of small.cpp, which explains each."""

    _fields_ = [
        ("plan", ctypes.c_void_p),
        ("cast", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("max", ctypes.c_double),
        ("is_pow2", ctypes.c_int),
        ("scales", ctypes.c_int),
        ("is_summed_along_rows", ctypes.c_int),
    ]


class _Product(ctypes.Structure):
    """Mirrors Product of small.cpp."""

    _fields_ = [
        ("left", _Operand),
        ("right", _Operand),
        ("type", ctypes.c_int),
        ("bf16", ctypes.c_void_p),
        ("int8", ctypes.c_void_p),
        ("epilogue", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class SmallProduct:
    """left . right of two matrices, each cast as its spec says."""

    product: _Product
    plans: tuple[CastPlan | TablePlan, CastPlan | TablePlan]
    """What `product` points to."""
    is_exact_only: bool
    """Whether a value that overflows, or a NaN, gives no result."""

    def __call__(self, left: Tensor, right: Tensor, bias: Tensor | None, out: Tensor) -> int:
        """Write left . right + bias into `out`. All fp32, contiguous, of sizes that fit. Returns 1 if a value of left
        overflowed or was NaN, plus 2 if one of right was; if `is_exact_only`, `out` is then not written.
        """
        left_columns, right_columns = left.shape[-1], right.shape[-1]
        said: int = _library().lp_small(  # type: ignore[union-attr]
            self.product,
            address(left), left.numel() // left_columns, left_columns,
            address(right), right.numel() // right_columns, right_columns,
            None if bias is None else address(bias), address(out),
        )  # fmt: skip
        return said


Memory = dict[tuple[torch.Size, int], tuple[Tensor, Tensor | None]]
"""Of one thread: grid and scale by shape and number of scales. Asking for it anew takes as long as the cast."""


@dataclass(frozen=True)
class SmallCast:
    """The cast of one matrix, as a spec says."""

    operand: _Operand
    plan: CastPlan | TablePlan
    """What `operand` points to."""

    def __call__(self, x: Tensor, into: Memory) -> tuple[Tensor, Tensor | None]:
        """Grid values in fp32 and their scale, as `scaling.compute_scale` lays it, in the memory that `into` has for
        this shape: until the next cast into it. x: fp32, contiguous, not empty.
        """
        shape, how = x.shape, self.operand
        columns, key = shape[-1], (shape, how.scales)
        grid, scales = into.get(key) or into.setdefault(key, _room(x, how.scales))
        scales_at = None if scales is None else address(scales)
        where = address(x), x.numel() // columns, columns, address(grid), scales_at
        _library().lp_small_cast(how, *where)  # type: ignore[union-attr]
        return grid, scales


def _room(x: Tensor, scales: int) -> tuple[Tensor, Tensor | None]:
    *lead, columns = x.shape
    shapes = {1: (), 2: (*lead, 1), 3: (*(1 for _ in lead), columns)}
    return x.new_empty(x.shape), x.new_empty(shapes[scales]) if scales else None


def small_cast(spec: QuantSpec, along_rows: bool = False) -> SmallCast | None:
    """None for a cast that small.cpp does not make, and without a compiler. `along_rows`: whether it is summed down the
    rows of its matrix.
    """
    library = cast_library()
    if (
        library is None
        or _library() is None
        or not spec.is_elementwise
        or spec.is_stochastic
        or spec.quantizer is not None
    ):
        return None
    plan = cast_plan(spec.format, spec.rounding) or table_plan(spec.format, spec.rounding)
    if plan is None or (spec.scale is not None and spec.scale.granularity not in _SCALES):
        return None
    if spec.scale is not None and spec.scale.rule not in ("amax", "pow2"):
        return None
    operand = _Operand(
        plan=ctypes.addressof(plan),
        cast=_address_of(library.lp_cast if isinstance(plan, CastPlan) else library.lp_cast_table),
        scale=_address_of(library.lp_scale),
        max=filled_to(get_format(spec.format)),
        is_pow2=spec.scale is not None and spec.scale.rule == "pow2",
        scales=0 if spec.scale is None else _SCALES[spec.scale.granularity],
        is_summed_along_rows=along_rows,
    )
    return SmallCast(operand, plan)


def small_product(
    left: QuantSpec, right: QuantSpec, dtype: torch.dtype, function: object, along_rows: tuple[bool, bool]
) -> SmallProduct | None:
    """The product of a kernel with a C function for operands of `dtype`, bf16 or int8. `along_rows`: whether the sum
    runs down the rows of each operand's matrix. None where a cast has no small form, or a scale varies along the sum.
    """
    casts, epilogue = [small_cast(spec, each) for spec, each in zip((left, right), along_rows)], epilogue_library()
    if casts[0] is None or casts[1] is None or epilogue is None:
        return None
    for spec, each in zip((left, right), along_rows):
        if spec.scale is not None and spec.scale.granularity not in ("tensor", "column" if each else "row"):
            return None
    product = _Product(left=casts[0].operand, right=casts[1].operand, type=OUT_DTYPES.index(dtype))
    setattr(product, "int8" if dtype == torch.int8 else "bf16", _address_of(function))
    product.epilogue = _address_of(epilogue.lp_epilogue)
    return SmallProduct(product, (casts[0].plan, casts[1].plan), dtype == torch.int8)


def _address_of(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        matrix = (pointer, size, size)
        library.lp_small.argtypes = (ctypes.POINTER(_Product), *matrix, *matrix, pointer, pointer)
        library.lp_small.restype = ctypes.c_int
        library.lp_small_cast.argtypes = (ctypes.POINTER(_Operand), *matrix, pointer, pointer)
        library.lp_small_cast.restype = ctypes.c_int
    return library
