"""fp32: torch's own fp32 products, of operands whose formats embed in fp32.

On a GPU torch may be told to round operands to tf32 (allow_tf32); what embeds there runs so, with the unit's bound.
"""

from runtime.kernels import cuda
from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import SCALE_IN_SUM, GemmRequest
from runtime.numerics.embedding import embeds
from runtime.numerics.specs import FP32_SUMS


class Fp32(AbstractKernel):
    name, backend = "fp32", "torch_native"
    has_native = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        spec = request.spec
        if spec.accumulator.is_integer:
            return Declined()
        if spec.accumulator != FP32_SUMS:
            return Declined(f"hardware sums in fp32, not {request.sum_text}")
        if _may_use_tf32(request):
            if not all(embeds(row, "tf32") for row in request.rows):
                return Declined("torch may round fp32 operands to tf32: torch.backends has allow_tf32 set")
            how = "embed in tf32, which torch may use and whose unit cuts sums"
            operands = f"{spec.lhs.format} and {spec.rhs.format}"
            return self.accepts("bounded", f"{operands} {how}, {cuda.product_bound(23)}")
        if not all(embeds(row, "fp32") for row in request.rows):
            return Declined(f"{request.operands} does not embed in fp32")
        if request.leaves_grid:
            return self.accepts(
                "bounded", f"{SCALE_IN_SUM}, each rounded once to fp32: 2^-24 of it; {request.order_bound}"
            )
        return self.accepts(
            "format-exact", f"{spec.lhs.format} and {spec.rhs.format} embed in fp32; {request.order_bound}"
        )

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 4 * (num_k + 1) if _may_use_tf32(request) else num_k


def _may_use_tf32(request: GemmRequest) -> bool:
    device = cuda.current_capability() if request.device == "cuda" else None
    return device is not None and device.allows_tf32[request.kind == "conv"]


register(Fp32(), 100)
