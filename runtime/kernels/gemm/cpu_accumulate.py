"""cpu_accumulate: the emulation kernel, which rounds after every multiply-add, by kernels/cpu/accumulate.cpp."""

from torch import Tensor

from runtime.kernels.cpu import accumulate, accumulate_conv
from runtime.kernels.direct import AbstractDirect
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey, random_text
from runtime.numerics.specs import GemmSpec


class CpuAccumulate(AbstractKernel):
    name, backend, device = "cpu_accumulate", "cpu_emulation", "cpu"
    is_matrix_only = is_exact = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if reason := accumulate.declines(request.spec):
            return Declined(reason)
        how = f"{request.sum_rule}, bitwise the reference"
        return self.accepts("emulated", how + random_text(request.spec.accumulator))

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return accumulate.multiply(lhs, rhs, spec, key)

    def direct(self, spec: GemmSpec) -> AbstractDirect | None:
        return accumulate_conv.direct(spec)


register(CpuAccumulate(), 130)
