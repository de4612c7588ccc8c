"""as_is: where no operand is cast, the op that the uncompiled model runs, in the tensors' dtype."""

from runtime.kernels.registry import AbstractKernel, Choice, Declined, register
from runtime.kernels.request import GemmRequest


class AsIs(AbstractKernel):
    name, backend = "as_is", "torch_native"
    dtype = None
    is_own_op = has_native = True

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if not request.spec.is_identity:
            return Declined()
        return self.accepts("format-exact", f"no operand is cast; {request.order_bound}")

    def num_units(self, request: GemmRequest, num_k: int) -> None:
        return None


register(AsIs(), 70)
