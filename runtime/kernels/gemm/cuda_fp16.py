"""cuda_fp16: products on a GPU's fp16 units with fp32 results, from compute capability 7.0 and mm(out_dtype=)."""

import torch
from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest
from runtime.numerics.embedding import embeds
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import FP32_SUMS, GemmSpec


class CudaFp16(AbstractKernel):
    name, backend, device = "cuda_fp16", "cuda", "cuda"
    dtype = torch.float16

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if request.spec.accumulator.is_integer or request.spec.is_identity:
            return Declined()
        found = cuda.found_for(request)
        if isinstance(found, str):
            return Declined(found)
        if request.spec.accumulator != FP32_SUMS:
            return Declined(f"it sums in fp32, not {request.sum_text}")
        if not found.has_fp16 or not all(embeds(row, "fp16") for row in request.rows):
            return Declined(f"{found.device} has no fp16 unit that holds both operands")
        if request.has_scale_in_sum():
            return Declined(f"{SCALE_IN_SUM}, which leave fp16")
        if not found.has_mm_out_dtype:
            return Declined("this torch rounds fp16 sums to fp16: its mm has no out_dtype")
        how = f"both embed in fp16, whose unit cuts sums, {cuda.product_bound(23)}"
        return self.accepts("bounded", how + found.casts_text)

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return cuda.multiply_half(lhs, rhs)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 4 * (num_k + 1)


register(CudaFp16(), 40)
