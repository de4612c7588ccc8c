"""Contractions: the geometry of a layer's three GEMMs, with no number format in it.

    kind        FWD               BWD                GRAD               rhs is
    linear      y_MN = x_MK w_NK  dx_MK = dy_MN w    dw_NK = dy_MN x    torch.nn.Linear's weight
    linear_kn   y_MN = x_MK w_KN  dx_MK = dy_MN w    dw_KN = x_MK dy    the Conv1D of transformers
    matmul      y = a_MK b_KN     da = dy_MN b       db = a_MK dy       an activation, batched
    conv        y = x * w         dx                 dw                 a weight, 1-D to 3-D, transposed too

M is the product of the leading dims. Each kind also says along which axis of an operand's matrix view a scale may vary
and still come out of the sum: runtime/numerics/free_axes.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from runtime.numerics.free_axes import FREE_AXES, Axis, Side
from runtime.numerics.specs import Role

Multiply = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ConvGeometry:
    """stride, padding and dilation per spatial dim, and groups; `same` padding is resolved by the caller. A transposed
    convolution has an output padding per dim, if only of zeros.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    @property
    def is_transposed(self) -> bool:
        return bool(self.output_padding)


class AbstractContraction(ABC):
    """How one kind of layer lays out its three GEMMs. `multiply(a, b)` is a backend's product of (..., M, K) and
    (..., K, N).
    """

    kind: str
    """A row of runtime/numerics/free_axes.py."""
    grad_rows: Side = "rhs"
    """Which operand of GRAD, dy (lhs) or x (rhs), gives the rows of dw."""

    @property
    def free_axis(self) -> dict[tuple[Role, Side], Axis]:
        return FREE_AXES[self.kind]

    @abstractmethod
    def native(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        """FWD with torch's own op, in the operands' dtype: what the uncompiled model runs."""

    @abstractmethod
    def fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor: ...

    @abstractmethod
    def bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor: ...

    @abstractmethod
    def grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor: ...

    @abstractmethod
    def bias_grad(self, dy: Tensor) -> Tensor:
        """What sums to the gradient of the bias in the bias's shape (`sum_to_size`)."""


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh product in another shape, as no view of it."""
    shaped: Tensor = y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape)
    return shaped


@dataclass(frozen=True)
class Linear(AbstractContraction):
    """y = x w^T, w_NK (nn.Linear)."""

    kind = "linear"
    grad_rows = "lhs"

    def native(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        # the builtin, because DeepSpeed's ZeRO-3 replaces torch.nn.functional.linear in the whole process
        return torch._C._nn.linear(lhs, rhs, bias)

    def fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        return _shaped(multiply(_matrix(lhs), rhs.t()), (*lhs.shape[:-1], rhs.shape[0]))

    def bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _shaped(multiply(_matrix(dy), rhs), lhs_shape)

    def grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return multiply(_matrix(dy).t(), _matrix(lhs))

    def bias_grad(self, dy: Tensor) -> Tensor:
        return dy.sum(tuple(range(dy.dim() - 1))) if dy.dim() > 1 else dy


@dataclass(frozen=True)
class LinearKN(AbstractContraction):
    """y = x w, w_KN (transformers' Conv1D)."""

    kind = "linear_kn"

    def native(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        y_MN = _matrix(lhs) @ rhs if bias is None else torch.addmm(bias, _matrix(lhs), rhs)
        return y_MN.view(*lhs.shape[:-1], rhs.shape[1])

    def fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        return _shaped(multiply(_matrix(lhs), rhs), (*lhs.shape[:-1], rhs.shape[1]))

    def bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return _shaped(multiply(_matrix(dy), rhs.t()), lhs_shape)

    def grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return multiply(_matrix(lhs).t(), _matrix(dy))

    def bias_grad(self, dy: Tensor) -> Tensor:
        return _matrix(dy).sum(0)


@dataclass(frozen=True)
class Matmul(AbstractContraction):
    """y = a b with broadcast batch dims; both operands have at least two dims. With a bias, which is of any shape that
    broadcasts to y, they have two or three dims, equal ones.
    """

    kind = "matmul"

    def native(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.matmul(lhs, rhs)
        return torch.addmm(bias, lhs, rhs) if lhs.dim() == 2 else torch.baddbmm(bias, lhs, rhs)

    def fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        return multiply(lhs, rhs)

    def bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return multiply(dy, rhs.transpose(-1, -2)).sum_to_size(lhs_shape)

    def grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        if len(rhs_shape) == 2:  # one matrix for the whole batch: a single GEMM over all rows, as torch.matmul folds it
            return multiply(_matrix(lhs).t(), _matrix(dy))
        return multiply(lhs.transpose(-1, -2), dy).sum_to_size(rhs_shape)

    def bias_grad(self, dy: Tensor) -> Tensor:
        return dy


@dataclass(frozen=True)
class Conv(AbstractContraction):
    """y = x * w, 1-D to 3-D, grouped, depthwise and transposed; x is (B, C, ...), or (C, ...) for B = 1. A transposed
    one is the BWD of a convolution applied to x; its weight is (C_in, C_out / groups, ...).

    The direct kernels of torch compute it in the operands' dtype, so `multiply` is not called: a backend that cannot
    use them declines the kind.
    """

    geometry: ConvGeometry

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "conv_transposed" if self.geometry.is_transposed else "conv"

    @property
    def grad_rows(self) -> Side:  # type: ignore[override]
        return "rhs" if self.geometry.is_transposed else "lhs"

    def native(self, lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
        g = self.geometry
        y = torch.convolution(
            self._batch(lhs), rhs, bias, g.stride, g.padding, g.dilation, g.is_transposed, self._more, g.groups
        )
        return self._as_given(y, lhs.dim())

    def fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        return self._as_given(self._fwd(self._batch(lhs), rhs, multiply), lhs.dim())

    def bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        shape = lhs_shape if self._is_batched(len(lhs_shape)) else torch.Size((1, *lhs_shape))
        return self._as_given(self._bwd(self._batch(dy), rhs, shape, multiply), len(lhs_shape))

    def grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        return self._grad(self._batch(dy), self._batch(lhs), rhs_shape, multiply)

    def bias_grad(self, dy: Tensor) -> Tensor:
        dy = self._batch(dy)
        return dy.sum((0, *range(2, dy.dim())))

    def _fwd(self, lhs: Tensor, rhs: Tensor, multiply: Multiply) -> Tensor:
        return self.native(lhs, rhs, None)

    def _bwd(self, dy: Tensor, rhs: Tensor, lhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        lhs = dy.new_empty((1,)).expand(lhs_shape)
        return self._backward(dy, lhs, rhs, (True, False, False))[0]

    def _grad(self, dy: Tensor, lhs: Tensor, rhs_shape: torch.Size, multiply: Multiply) -> Tensor:
        rhs = dy.new_empty((1,)).expand(rhs_shape)
        return self._backward(dy, lhs, rhs, (False, True, False))[1]

    def _is_batched(self, num_dims: int) -> bool:
        return num_dims != 1 + len(self.geometry.stride)

    def _batch(self, x: Tensor) -> Tensor:
        """torch.nn.functional's convolutions take (C, ...) for a batch of one sample."""
        return x if self._is_batched(x.dim()) else x.unsqueeze(0)

    def _as_given(self, y: Tensor, num_dims: int) -> Tensor:
        return y if self._is_batched(num_dims) else y.squeeze(0)

    @property
    def _more(self) -> tuple[int, ...]:
        """The output padding, of zeros where there is none."""
        return self.geometry.output_padding or (0,) * len(self.geometry.stride)

    def _backward(
        self, dy: Tensor, lhs: Tensor, rhs: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = self.geometry
        return torch.ops.aten.convolution_backward(
            dy, lhs, rhs, [dy.shape[1]], g.stride, g.padding, g.dilation, g.is_transposed, self._more, g.groups, mask
        )


def linear_kn(x: Tensor, weight_KN: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x w + bias: the op of transformers' Conv1D, as one function that graphs can name."""
    return LinearKN().native(x, weight_KN, bias)
