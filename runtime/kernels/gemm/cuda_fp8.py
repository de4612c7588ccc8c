"""cuda_fp8: products on a GPU's FP8 units, from compute capability 8.9; formats embed, after a shift if need be."""

import torch
from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest
from runtime.numerics.block_formats import grid_format
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class CudaFp8(AbstractKernel):
    name, backend, device = "cuda_fp8", "cuda", "cuda"
    dtype = torch.bfloat16
    """Narrowed by `multiply`; exact in both."""

    def consider(self, request: GemmRequest) -> Choice | Declined:
        found = cuda.found_for_floats(request)
        if isinstance(found, Declined):
            return found
        containers = cuda.fp8_containers(*request.rows)
        if containers is None:
            return Declined(f"no FP8 pair holds {request.operands}")
        if not found.has_unit("fp8"):
            return Declined(f"{found.device} has no FP8 units")
        if request.has_scale_in_sum():
            return Declined(f"{SCALE_IN_SUM}, which leave FP8")
        held = " x ".join(f"{c.name} shifted by 2^{c.shift}" if c.shift else c.name for c in containers)
        return self.accepts("bounded", f"{request.operands} embeds in {held}; {found.fp8_sum}{found.casts_text}")

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        containers = cuda.fp8_containers(grid_format(spec.lhs.format), grid_format(spec.rhs.format))
        assert containers is not None
        return cuda.multiply_fp8(lhs, rhs, containers)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 2.0**12 * (num_k + 1)


register(CudaFp8(), 20)
