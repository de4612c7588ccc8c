"""cuda_int8: int8 products on a GPU's matrix units, from compute capability 7.5."""

import torch
from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.int8_product import as_int8, keeping_nan
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class CudaInt8(AbstractKernel):
    name, backend, device = "cuda_int8", "cuda", "cuda"
    dtype = torch.int8

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if not request.is_int8:
            return Declined()
        found = cuda.found_for(request)
        if isinstance(found, str):
            return Declined(found)
        if not found.has_int8:
            return Declined(f"{found.device} has no int8 units")
        return self.accepts("bitwise", f"int8 products add exactly in int32{found.casts_text}")

    def load(self, grid: Tensor) -> Tensor:
        return as_int8(grid)

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return keeping_nan(cuda.multiply_int8, lhs, rhs)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 0


register(CudaInt8(), 10)
