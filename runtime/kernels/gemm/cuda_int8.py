"""cuda_int8: int8 products on a GPU's matrix units, from compute capability 7.5."""

from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.int8_product import AbstractInt8Kernel
from runtime.kernels.registry import Choice, Declined, register
from runtime.kernels.request import GemmRequest


class CudaInt8(AbstractInt8Kernel):
    name, backend, device = "cuda_int8", "cuda", "cuda"

    def consider_int8(self, request: GemmRequest) -> Choice | Declined:
        found = cuda.found_for(request)
        if isinstance(found, Declined):
            return found
        if not found.has_unit("int8"):
            return Declined(f"{found.device} has no int8 units")
        return self.accepts("bitwise", f"int8 products add exactly in int32{found.casts_text}")

    def product(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        return cuda.multiply_int8(a_MK, b_KN)


register(CudaInt8(), 10)
