"""Quantizer: what casts one operand. It has an identity, its key, and where it needs it, state.

    carrier(x)         what the gradient flows through: x itself, or x with the derivatives of a clip
    scale(x)           the scale of a cast of x
    cast(x, draw)      QTensor: grid values and scale, detached
    key                identity and version: casts are shared, kept and left out by it, never by text
    observe(x)         what a quantizer learns by looking

Without state it is its spec (runtime/quantize/stateless.py). With state it is a module in the model
(runtime/quantize/learned/).
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from runtime.kernels.cast.block_grid import fast_block_cast, is_one_op
from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cast.rotate import rotated
from runtime.numerics.specs import QuantSpec
from runtime.quantize.qtensor import CastKey, QTensor
from runtime.quantize.storage import storage_dtype


class Draw(NamedTuple):
    """The key of a cast's random bits; what rounds to nearest reads none of it."""

    seed: int = 0
    step: int = 0
    stream: int = 0
    signs: int = 0
    """The stream of the signs of a transform, which is the same for both operands of a GEMM."""


NO_DRAW = Draw()


class AbstractQuantizer(ABC):
    """One cast. `spec` says format and rounding, and how the scale is chosen."""

    spec: QuantSpec

    @property
    @abstractmethod
    def key(self) -> CastKey:
        """Identity and version."""

    @abstractmethod
    def scale(self, x: Tensor) -> Tensor | None:
        """The scale of a cast of x, fp32, in the shapes of runtime/numerics/scaling.py; None where there is none."""

    def carrier(self, x: Tensor) -> Tensor:
        """x as the gradient sees it: the derivative of a cast is one, unless a quantizer says otherwise."""
        return x

    def observe(self, x: Tensor) -> None:  # noqa: B027
        """Look at x before it is cast. Nothing, unless a quantizer learns by it."""

    def cast(self, x: Tensor, draw: Draw = NO_DRAW) -> QTensor:
        """x on the grid, detached, turned first where the spec has a transform. Saturates; NaN stays NaN where the
        storage has one.
        """
        self.observe(x)
        if is_one_op(x, self.spec):
            grid, of_blocks, _ = fast_block_cast(
                x, self.spec, dtype=storage_dtype(self.spec.format), **draw._asdict()
            )  # fmt: skip
            return QTensor(grid, of_blocks, *self.key)
        x = turned(x, self.spec, draw)
        scale = self.scale(x)
        return QTensor(to_grid(x, scale, self.spec, draw), scale, *self.key)


def turned(x: Tensor, spec: QuantSpec, draw: Draw = NO_DRAW) -> Tensor:
    """x as its cast sees it: turned by the transform of the spec, detached, or x itself where it has none."""
    return rotated(x, spec, seed=draw.seed, step=draw.step, stream=draw.signs)


def to_grid(x: Tensor, scale: Tensor | None, spec: QuantSpec, draw: Draw = NO_DRAW) -> Tensor:
    """Grid values of x / scale in the storage dtype of the format; x is `turned`. An identity spec gives x itself,
    detached.
    """
    x = x.detach()
    if spec.is_identity:
        return x
    if scale is not None and scale.requires_grad:
        scale = scale.detach()
    seed, step, stream, _ = draw
    return fast_to_grid(x, spec, scale, dtype=storage_dtype(spec.format), seed=seed, step=step, stream=stream)
