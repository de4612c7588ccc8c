"""cuda_fp16: products on a GPU's fp16 units with fp32 results, from compute capability 7.0 and mm(out_dtype=)."""

import torch

from runtime.kernels.cuda_half import AbstractCudaHalf
from runtime.kernels.registry import register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest


class CudaFp16(AbstractCudaHalf):
    name, unit = "cuda_fp16", "fp16"
    dtype = torch.float16

    def why_not(self, request: GemmRequest) -> str:
        return f"{SCALE_IN_SUM}, which leave fp16" if request.has_scale_in_sum() else ""


register(CudaFp16(), 40)
