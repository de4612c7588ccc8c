"""exact_int: products of integers whose int32 sums float64 has exactly, in any order of additions.

It serves where no int8 unit does: without VNNI, for convolutions and batches, for int4, and on any device. What could
leave int32, where the accumulator saturates, runs in the reference.
"""

import torch
from torch import Tensor

from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import INT32, GemmRequest
from runtime.numerics import reference_gemm
from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import IntFormat
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class ExactInt(AbstractKernel):
    name, backend = "exact_int", "torch_native"
    dtype = torch.float64
    is_matrix_only = is_exact = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if request.spec.accumulator != INT32:
            return Declined()
        if not all(isinstance(row, IntFormat) for row in request.rows):
            return Declined(f"int32 sums need integer operands, not {request.operands}")
        if request.has_scale_in_sum():
            return Declined("a scale inside the sum leaves the integers")
        return self.accepts("bitwise", "integer products add exactly in float64")

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        rows = [grid_format(operand.format) for operand in (spec.lhs, spec.rhs)]
        left, right = (max(row.max, -row.min) for row in rows)
        if lhs.shape[-1] * left * right >= 2.0**31:
            return reference_gemm.multiply(lhs, rhs, spec, key)
        return torch.matmul(lhs, rhs).float()


register(ExactInt(), 110)
