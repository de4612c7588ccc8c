"""Int8 products: how long an exact sum may be, what a NaN does to one, and what kernels of them have in common."""

from abc import abstractmethod

import torch
from torch import Tensor

from runtime.errors import NotSupported
from runtime.kernels.cast.grid import fast_to_grid_checked
from runtime.kernels.registry import AbstractKernel, Choice, Declined
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec, QuantSpec

LONGEST_INT8_SUM = (2**31 - 1) // (128 * 128)
"""131071, as -128 times itself is a product."""


def check_int8_sum(k: int) -> None:
    """NotSupported where a sum of k products of int8 values can leave int32."""
    if k > LONGEST_INT8_SUM:
        raise NotSupported(f"an int8 GEMM of K = {k} can overflow int32", expected=f"K <= {LONGEST_INT8_SUM}")


class AbstractInt8Kernel(AbstractKernel):
    """A kernel of int8 matrices into int32 sums. An operand with a NaN stays in floating point till it is multiplied;
    what its NaN reaches is NaN.
    """

    dtype = torch.int8
    is_exact = True

    @abstractmethod
    def product(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        """Of int8 matrices, summed exactly, rounded once to fp32."""

    @abstractmethod
    def consider_int8(self, request: GemmRequest) -> Choice | Declined:
        """`consider`, of a request that is for int8 sums."""

    def consider(self, request: GemmRequest) -> Choice | Declined:
        return self.consider_int8(request) if request.is_int8 else Declined()

    def load(self, grid: Tensor) -> Tensor:
        if grid.dtype == torch.int8 or grid.is_cuda:
            return grid
        narrow, is_beyond = fast_to_grid_checked(grid, _INT8, None, dtype=torch.int8)
        return grid if is_beyond else narrow

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        if lhs.dtype == rhs.dtype == torch.int8:
            return self.product(lhs, rhs)
        is_nan = lhs.isnan().any(-1, keepdim=True) | rhs.isnan().any(-2, keepdim=True)
        a, b = (x.nan_to_num(0.0).to(torch.int8) for x in (lhs, rhs))
        return self.product(a, b).masked_fill(is_nan, torch.nan)


_INT8 = QuantSpec.parse("int8 nearest_even")
