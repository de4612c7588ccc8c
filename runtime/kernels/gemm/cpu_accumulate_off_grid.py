"""cpu_accumulate_off_grid: the emulation kernel for operands that a scale inside the sum took off their grids: any fp32
values.
"""

from dataclasses import replace

from torch import Tensor

from runtime.kernels.cpu import accumulate, accumulate_conv
from runtime.kernels.direct import AbstractDirect
from runtime.kernels.gemm.cpu_accumulate import CpuAccumulate
from runtime.kernels.registry import Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import IDENTITY, GemmSpec


class CpuAccumulateOffGrid(CpuAccumulate):
    name = "cpu_accumulate_off_grid"

    def consider(self, request: GemmRequest) -> Choice | Declined:
        return super().consider(request) if request.has_scale_in_sum() else Declined()

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return accumulate.multiply(lhs, rhs, replace(spec, lhs=IDENTITY, rhs=IDENTITY), key)

    def direct(self, spec: GemmSpec) -> AbstractDirect | None:
        return accumulate_conv.direct(replace(spec, lhs=IDENTITY, rhs=IDENTITY))


register(CpuAccumulateOffGrid(), 120)
