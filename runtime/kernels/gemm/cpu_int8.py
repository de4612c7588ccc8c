"""cpu_int8: int8 products on AMX tiles, by kernels/cpu/gemm_amx.cpp."""

import torch
from torch import Tensor

from runtime.kernels.cpu import gemm
from runtime.kernels.int8_product import as_int8, keeping_nan
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class CpuInt8(AbstractKernel):
    name, backend, device = "cpu_int8", "cpu", "cpu"
    dtype = torch.int8

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if not request.is_int8:
            return Declined()
        if not request.is_plain:
            return Declined(f"it has no {request.kind}")
        if gemm.int8_library() is None:
            return Declined("no C++ compiler, or a CPU without AMX tiles")
        return self.accepts("bitwise", "int8 products add exactly in int32, on AMX tiles")

    def load(self, grid: Tensor) -> Tensor:
        return as_int8(grid)

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return keeping_nan(gemm.multiply_int8, lhs, rhs)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 0


register(CpuInt8(), 50)
