"""cpu_bf16: products on the CPU's bf16 units with fp32 results, by kernels/cpu/gemm_amx.cpp and gemm.cpp."""

import torch
from torch import Tensor

from runtime.kernels.cpu import gemm
from runtime.kernels.registry import AbstractKernel, Choice, Declined, Epilogue, register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest
from runtime.numerics.embedding import embeds
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import FP32_SUMS, GemmSpec


class CpuBf16(AbstractKernel):
    name, backend, device = "cpu_bf16", "cpu", "cpu"
    dtype = torch.bfloat16

    def consider(self, request: GemmRequest) -> Choice | Declined:
        spec = request.spec
        if spec.accumulator.is_integer or spec.is_identity:
            return Declined()
        if not request.is_plain:
            return Declined(f"it has no {request.kind}")
        if spec.accumulator != FP32_SUMS:
            return Declined(f"it sums in fp32, not {request.sum_text}")
        if not all(embeds(row, "bf16") for row in request.rows):
            return Declined(f"{request.operands} does not embed in bf16")
        if request.leaves_grid:
            return Declined(f"{SCALE_IN_SUM}, which leave bf16")
        if spec.out == "bf16" and not (spec.lhs.has_scale or spec.rhs.has_scale):
            return Declined("torch's own bf16 GEMM has this output")
        if gemm.gemm_library() is None:
            return Declined("no C++ compiler, or a CPU without AVX512-BF16")
        how = f"{spec.lhs.format} and {spec.rhs.format} embed in bf16, fp32 sums; {request.order_bound}"
        if request.can_underflow:
            return self.accepts("bounded", f"{how}; operands, products and sums below 2^-126 count as 0")
        return self.accepts("format-exact", how)

    def c_function(self) -> object | None:
        library = gemm.gemm_library()
        return None if library is None else library.lp_gemm

    def load(self, grid: Tensor) -> Tensor:
        """It reads fp32 too: block values below bf16's range."""
        return grid if grid.dtype in gemm.DTYPES else grid.bfloat16()

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return gemm.multiply(lhs, rhs)

    def run(self, lhs: Tensor, rhs: Tensor, epilogue: Epilogue, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        """A bias alone is added as the sum is written."""
        if epilogue.bias is None or not epilogue.is_bias:
            return super().run(lhs, rhs, epilogue, spec, key)
        y = gemm.multiply(lhs, rhs, epilogue.bias.float())
        return Epilogue(residual=epilogue.residual, relu=epilogue.relu).after(y)


register(CpuBf16(), 60)
