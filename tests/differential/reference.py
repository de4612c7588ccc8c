"""The reference: a plain model in which every product of two operands is a function of its own, in float64, written
without anything of the compiler: casts by the oracle of runtime.numerics, gradients by autograd of the product, which
is linear in each operand.

    y = f(Q(a), Q(b))      da = df/da(., Q(b)) . Q(dy)      db = df/db(Q(a), .) . Q(dy)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.numerics.casts import to_grid
from runtime.numerics.scaling import compute_scale, expand_scale
from runtime.numerics.specs import LayerSpec, QuantSpec


def cast(x: Tensor, spec: QuantSpec) -> Tensor:
    """The value of a cast, in float64."""
    if spec.is_identity:
        return x.double()
    scale = compute_scale(x.float(), spec)
    grid = to_grid(x.float(), spec, scale).double()
    return grid if scale is None else grid * expand_scale(scale, x.shape, spec).double()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, spec: LayerSpec) -> Tensor:
        ctx.f, ctx.spec = f, spec
        ctx.save_for_backward(a, b)
        return f(cast(a, spec.fwd.lhs), cast(b, spec.fwd.rhs)).float()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (a, b), spec = ctx.saved_tensors, ctx.spec
        with torch.enable_grad():
            a0 = torch.zeros_like(a, dtype=torch.float64, requires_grad=True)
            da = torch.autograd.grad(ctx.f(a0, cast(b, spec.bwd.rhs)), a0, cast(dy, spec.bwd.lhs))[0]
            b0 = torch.zeros_like(b, dtype=torch.float64, requires_grad=True)
            db = torch.autograd.grad(ctx.f(cast(a, spec.grad.rhs), b0), b0, cast(dy, spec.grad.lhs))[0]
        return None, da.float(), db.float(), None


class Reference(TorchFunctionMode):
    """Runs every product with two operands as `spec` says."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_products = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LAYERS:
            names = ("input", "weight", "bias")
            x, w, bias = (args[i] if i < len(args) else kwargs.pop(names[i], None) for i in range(3))
            y = self._product(lambda a, b: func(a, b, None, *args[3:], **kwargs), x, w)
            if bias is None:
                return y
            return y + (bias if func in _LINEAR else bias.view(-1, *(1,) * (x.dim() - 2)))
        if func in _MATMULS:
            return self._product(torch.matmul, args[0], args[1])
        if func is torch.einsum and len(args) == 3:
            equation = args[0]
            return self._product(lambda a, b: torch.einsum(equation, a, b), args[1], args[2])
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _product(self, f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        self.num_products += 1
        y: Tensor = _Product.apply(f, a, b, self.spec)
        return y

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """torch's math backend: both sides of the first product carry the root of the scale."""
        root = (q.shape[-1] ** -0.5) ** 0.5
        scores = self._product(torch.matmul, q * root, (k * root).transpose(-1, -2))
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril().logical_not(), float("-inf"))
        return self._product(torch.matmul, scores.softmax(-1), v)


_LINEAR = {F.linear, torch._C._nn.linear}
_LAYERS = _LINEAR | {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
