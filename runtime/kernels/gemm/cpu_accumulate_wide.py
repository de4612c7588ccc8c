"""cpu_accumulate_wide: sums that no fp32 lane holds, integers among them, by kernels/cpu/accumulate_wide.cpp; on a CPU
without AVX-512 all sums of one product after another.
"""

from torch import Tensor

from runtime.kernels.cpu import accumulate_wide
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey, random_text
from runtime.numerics.specs import GemmSpec


class CpuAccumulateWide(AbstractKernel):
    name, backend, device = "cpu_accumulate_wide", "cpu_emulation", "cpu"
    is_matrix_only = is_exact = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if reason := accumulate_wide.declines(request.spec):
            return Declined(reason)
        how = f"{request.sum_rule}, bitwise the reference"
        return self.accepts("emulated", how + random_text(request.spec.accumulator))

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return accumulate_wide.multiply(lhs, rhs, spec, key)


register(CpuAccumulateWide(), 140)
