"""sequential: the reference itself, runtime/numerics/reference_gemm.py, on any device."""

from torch import Tensor

from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics import reference_gemm
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class Sequential(AbstractKernel):
    name, backend = "sequential", "reference"
    is_matrix_only = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if reason := request.why_not_aligned or reference_gemm.declines(request.spec):
            return Declined(reason)
        return self.accepts("emulated", request.sum_rule + reference_gemm.random_text(request.spec.accumulator))

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return reference_gemm.multiply(lhs, rhs, spec, key)

    def num_units(self, request: GemmRequest, num_k: int) -> None:
        return None


register(Sequential(), 1000)
