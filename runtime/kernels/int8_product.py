"""Int8 products: how long an exact sum may be, and what a NaN does to one."""

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels.cast.grid import fast_to_grid_checked
from runtime.numerics.specs import QuantSpec

LONGEST_INT8_SUM = (2**31 - 1) // (128 * 128)
"""131071, as -128 times itself is a product."""


def check_int8_sum(k: int) -> None:
    """NotSupported where a sum of k products of int8 values can leave int32."""
    if k > LONGEST_INT8_SUM:
        raise NotSupported(f"an int8 GEMM of K = {k} can overflow int32", expected=f"K <= {LONGEST_INT8_SUM}")


def as_int8(grid: Tensor) -> Tensor:
    """In int8, or in the floating-point dtype that holds a NaN too, which the product looks for."""
    if grid.dtype == torch.int8 or grid.is_cuda:
        return grid
    narrow, is_beyond = fast_to_grid_checked(grid, _INT8, None, dtype=torch.int8)
    return grid if is_beyond else narrow


def keeping_nan(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """An int8 product whose operand may be in floating point instead, because it holds a NaN: what that reaches is
    NaN.
    """
    if a.dtype == b.dtype == torch.int8:
        return multiply(a, b)
    is_nan = a.isnan().any(-1, keepdim=True) | b.isnan().any(-2, keepdim=True)
    a, b = (x.nan_to_num(0.0).to(torch.int8) for x in (a, b))
    return multiply(a, b).masked_fill(is_nan, torch.nan)


_INT8 = QuantSpec.parse("int8 nearest_even")
