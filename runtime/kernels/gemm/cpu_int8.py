"""cpu_int8: int8 products on AMX tiles, by kernels/cpu/gemm_amx.cpp."""

from torch import Tensor

from runtime.kernels.cpu import gemm
from runtime.kernels.int8_product import AbstractInt8Kernel
from runtime.kernels.registry import Choice, Declined, register
from runtime.kernels.request import GemmRequest


class CpuInt8(AbstractInt8Kernel):
    name, backend, device = "cpu_int8", "cpu", "cpu"

    def consider_int8(self, request: GemmRequest) -> Choice | Declined:
        if not request.is_plain:
            return Declined(f"it has no {request.kind}")
        if gemm.int8_library() is None:
            return Declined("no C++ compiler, or a CPU without AMX tiles")
        return self.accepts("bitwise", "int8 products add exactly in int32, on AMX tiles")

    def product(self, a_MK: Tensor, b_KN: Tensor) -> Tensor:
        return gemm.multiply_int8(a_MK, b_KN)

    def c_function(self) -> object | None:
        library = gemm.int8_library()
        return None if library is None else library.lp_gemm_int8


register(CpuInt8(), 50)
