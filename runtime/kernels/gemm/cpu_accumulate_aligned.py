"""cpu_accumulate_aligned: sums as the matrix units of GPUs make them, by kernels/cpu/accumulate_aligned.cpp."""

from torch import Tensor

from runtime.kernels.cpu import accumulate_aligned
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class CpuAccumulateAligned(AbstractKernel):
    name, backend, device = "cpu_accumulate_aligned", "cpu_emulation", "cpu"
    is_matrix_only = is_exact = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if request.spec.accumulator.model != "aligned":
            return Declined()
        if reason := request.why_not_aligned or accumulate_aligned.declines(request.spec):
            return Declined(reason)
        return self.accepts("emulated", f"{request.sum_rule}, bitwise the reference")

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return accumulate_aligned.multiply(lhs, rhs, spec, key)


register(CpuAccumulateAligned(), 110)
