"""bf16: torch's own bf16 products, for a policy whose output is bf16: fp32 sums, rounded to bf16 by the library. A bias
of more bits is added before that (runtime/ops/wide_bias.py).
"""

import torch

from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest
from runtime.numerics.embedding import embeds
from runtime.numerics.specs import FP32_SUMS


class Bf16(AbstractKernel):
    name, backend = "bf16", "torch_native"
    dtype, out = torch.bfloat16, "bf16"
    has_native = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        spec = request.spec
        if spec.out != "bf16" or spec.accumulator != FP32_SUMS or request.leaves_grid:
            return Declined()
        if spec.lhs.has_scale or spec.rhs.has_scale:
            return Declined("it rounds to bf16 before the scales")
        if not all(embeds(row, "bf16") for row in request.rows):
            return Declined(f"{request.operands} does not embed in bf16")
        parts = ", parts of a sum too where torch splits K (allow_bf16_reduced_precision_reduction)"
        return self.accepts(
            "bounded",
            f"bf16 GEMM, fp32 sums rounded once to bf16{parts if request.device == 'cuda' else ''}; subnormal bf16 "
            f"operands may count as 0; {request.order_bound}",
        )

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return num_k + 2.0**16 * (1 + num_k / 4 if request.device == "cuda" else 1)


register(Bf16(), 90)
