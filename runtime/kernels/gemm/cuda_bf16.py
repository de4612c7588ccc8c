"""cuda_bf16: products on a GPU's bf16 units with fp32 results, from compute capability 8.0 and mm(out_dtype=)."""

import torch

from runtime.kernels.cuda_half import AbstractCudaHalf
from runtime.kernels.registry import register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest


class CudaBf16(AbstractCudaHalf):
    name, unit = "cuda_bf16", "bf16"
    dtype = torch.bfloat16

    def why_not(self, request: GemmRequest) -> str:
        if request.leaves_grid:
            return f"{SCALE_IN_SUM}, which leave bf16"
        is_bare = request.spec.out == "bf16" and not (request.spec.lhs.has_scale or request.spec.rhs.has_scale)
        return "torch's own bf16 GEMM has this output" if is_bare else ""


register(CudaBf16(), 30)
