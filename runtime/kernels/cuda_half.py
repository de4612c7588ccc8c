"""Cuda half: what the kernels of a GPU's 16-bit units have in common; fp32 results, by mm(out_dtype=)."""

from abc import abstractmethod

from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.registry import AbstractKernel, Choice, Declined
from runtime.kernels.request import GemmRequest
from runtime.numerics.embedding import embeds
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import GemmSpec


class AbstractCudaHalf(AbstractKernel):
    """Operands embed in `unit`, the format of the units, bf16 or fp16."""

    backend, device = "cuda", "cuda"
    unit: str

    @abstractmethod
    def why_not(self, request: GemmRequest) -> str:
        """What else of the numbers keeps it from running them; empty if nothing does."""

    def consider(self, request: GemmRequest) -> Choice | Declined:
        found = cuda.found_for_floats(request)
        if isinstance(found, Declined):
            return found
        if not found.has_unit(self.unit) or not all(embeds(row, self.unit) for row in request.rows):
            return Declined(f"{found.device} has no {self.unit} unit that holds both operands")
        if reason := self.why_not(request):
            return Declined(reason)
        if not found.has_mm_out_dtype:
            return Declined(f"this torch rounds {self.unit} sums to {self.unit}: its mm has no out_dtype")
        how = f"both embed in {self.unit}, whose unit cuts sums, {cuda.product_bound(23)}"
        return self.accepts("bounded", how + found.casts_text)

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        return cuda.multiply_half(lhs, rhs)

    def num_units(self, request: GemmRequest, num_k: int) -> float:
        return 4 * (num_k + 1)
