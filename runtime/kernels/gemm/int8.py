"""int8: torch's own int8 products on the CPU, summed in int32: right where oneDNN has VNNI units, which is tested."""

import torch
from torch import Tensor

from runtime.kernels.int8_product import as_int8, check_int8_sum, keeping_nan
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class Int8(AbstractKernel):
    name, backend, device = "int8", "torch_native", "cpu"
    dtype = torch.int8

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if not request.is_int8:
            return Declined()
        if not request.is_plain:
            return Declined(f"torch has no int8 {request.kind} of any size")
        return self.accepts("bitwise", "int8 products add exactly in int32")

    def load(self, grid: Tensor) -> Tensor:
        return as_int8(grid)

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return keeping_nan(_multiply, lhs, rhs)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 0


def _multiply(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b, summed exactly in int32, rounded once to fp32; NotSupported if a sum could leave int32."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    check_int8_sum(k)
    if 0 in (m, k, n):
        return torch.zeros(m, n, dtype=torch.float32, device=a_MK.device)
    return torch._int_mm(_by_rows(a_MK), b_KN if _is_by_columns(b_KN) else _by_rows(b_KN)).float()


def _by_rows(x: Tensor) -> Tensor:
    """x in memory by rows, with the strides that say so: of a side of 1 torch takes any stride for contiguous, and
    _int_mm then takes a column for a row.
    """
    return x.contiguous().view(-1).view(x.shape)


def _is_by_columns(x: Tensor) -> bool:
    return x.stride(0) == 1 and x.stride(1) == x.shape[0] and 1 not in x.shape


register(Int8(), 80)
