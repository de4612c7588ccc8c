"""int8: torch's own int8 products on the CPU, summed in int32: right where oneDNN has VNNI units, which is tested."""

import torch
from torch import Tensor

from runtime.kernels.int8_product import AbstractInt8Kernel, check_int8_sum
from runtime.kernels.registry import Choice, Declined, register
from runtime.kernels.request import GemmRequest


class Int8(AbstractInt8Kernel):
    name, backend, device = "int8", "torch_native", "cpu"

    def consider_int8(self, request: GemmRequest) -> Choice | Declined:
        if not request.is_plain:
            return Declined(f"torch has no int8 {request.kind} of any size")
        return self.accepts("bitwise", "int8 products add exactly in int32")

    def product(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
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
