"""Types of what ops take and give, and how each op's result type follows from its operands and attributes.

    tensor<4x8xbf16>                                    shape and dtype are known
    !lp.quant<"e4m3", "row", 1, tensor<4x8xbf16>>       grid values: format, granularity, axis, storage
    !lp.state                                           the RunState
    index                                               a size
    !torch.value                                        anything: nothing says what it is before it runs

The axis of a quantized type is the axis of the matrix view (product of leading dims, last dim) along which lie the
values that share a scale or a block's scale: 1 for `row`, 0 for `column` and `batched-column`, else none. Granularity
`none` is scale 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, Literal

import torch

from runtime.numerics.scaling import scale_shape
from runtime.numerics.specs import QuantSpec
from runtime.ops.plan import contraction_of, parse_geometry
from runtime.quantize.storage import storage_dtype


@dataclass(frozen=True)
class TensorType:
    """A tensor of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"tensor<{''.join(f'{size}x' for size in self.shape)}{DTYPE_NAMES[self.dtype]}>"


class PlainType(Enum):
    """A type without parameters."""

    VALUE = "!torch.value"
    INDEX = "index"
    STATE = "!lp.state"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class QuantType:
    """Grid values of one cast, held in `storage`; its shape may be unknown."""

    format: str
    granularity: str
    axis: int | None
    storage: "TensorType | PlainType"

    def __str__(self) -> str:
        axis = "none" if self.axis is None else self.axis
        return f'!lp.quant<"{self.format}", "{self.granularity}", {axis}, {self.storage}>'

    @staticmethod
    def of(spec: QuantSpec, x: "OpType") -> "QuantType":
        """What a cast of x is: grid values in the format's storage dtype, in x's shape if that is known."""
        granularity = "none" if spec.scale is None else str(spec.scale).partition("/")[0]
        if spec.is_block:
            granularity = spec.along or "row"
        axis = {"row": 1, "column": 0, "batched-column": 0}.get(granularity)
        storage: TensorType | PlainType = PlainType.VALUE
        if isinstance(x, TensorType):
            storage = x if spec.is_identity else TensorType(x.shape, storage_dtype(spec.format))
        return QuantType(spec.format, granularity, axis, storage)


OpType = TensorType | QuantType | PlainType
Operands = dict[str, OpType | None]
"""Operand types by name; None for an operand that is not there."""
ResultRule = Callable[[Operands, dict[str, Any]], OpType]
"""The type of an op's result, from its operands and attributes, which are valid."""

VALUE = PlainType.VALUE
OperandKind = Literal["tensor", "grid", "scale", "state"]


def accepts(kind: OperandKind, given: OpType) -> bool:
    """Whether an operand of that kind may have that type."""
    if given is VALUE:
        return kind != "state"
    match kind:
        case "tensor":
            return isinstance(given, TensorType)
        case "grid":
            return isinstance(given, (QuantType, TensorType))
        case "scale":
            return isinstance(given, TensorType) and given.dtype == torch.float32
        case "state":
            return given is PlainType.STATE


def unknown_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    return VALUE


def scale_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """fp32, in the shape that runtime.numerics.scaling lists; one number where the format has two levels."""
    spec, x = QuantSpec.parse(attributes["spec"]), operands["x"]
    if spec.is_block or (spec.scale is not None and spec.scale.granularity == "tensor"):
        return TensorType((), torch.float32)
    if not isinstance(x, TensorType) or spec.scale is None:
        return VALUE
    return TensorType(tuple(scale_shape(torch.Size(x.shape), spec.scale)), torch.float32)


def rotate_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """x's shape; fp32, or what its transform rounds to; float64 for float64 x."""
    x, transform = operands["x"], QuantSpec.parse(attributes["spec"]).transform
    if not isinstance(x, TensorType) or transform is None:
        return VALUE
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return TensorType(x.shape, torch.bfloat16 if transform.round == "bf16" else wide)


def same_as_x(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """x's own."""
    return operands["x"] or VALUE


def quantize_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    return QuantType.of(QuantSpec.parse(attributes["spec"]), operands["x"] or VALUE)


def dequantize_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    q = operands["q"]
    storage = q.storage if isinstance(q, QuantType) else q
    return TensorType(storage.shape, torch.float32) if isinstance(storage, TensorType) else VALUE


def stand_in_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """The shape of q, in the dtype named."""
    q = operands["q"]
    storage = q.storage if isinstance(q, QuantType) else q
    return TensorType(storage.shape, getattr(torch, attributes["dtype"])) if isinstance(storage, TensorType) else VALUE


def gemm_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """The shape of lhs . rhs, in the dtype of lhs."""
    lhs, rhs = operands["lhs"], operands["rhs"]
    if not isinstance(lhs, TensorType) or not isinstance(rhs, TensorType):
        return VALUE
    return TensorType(_gemm_shape(attributes["kind"], attributes.get("geometry", ""), lhs.shape, rhs.shape), lhs.dtype)


def norm_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """One number per feature, fp32 at least."""
    statistic = operands["var"] if "var" in operands else operands["mean"]
    if not isinstance(statistic, TensorType):
        return VALUE
    return TensorType(statistic.shape, torch.promote_types(statistic.dtype, torch.float32))


def fold_weight_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    w = operands["w"]
    return w if isinstance(w, TensorType) else VALUE


def fold_bias_result(operands: Operands, attributes: dict[str, Any]) -> OpType:
    """One number per output, in the dtype of w; how many only b or, of the outputs, s says."""
    w, per_output = operands["w"], operands["b"] or operands.get("s")
    if not isinstance(w, TensorType) or not isinstance(per_output, TensorType):
        return VALUE
    return TensorType(per_output.shape, w.dtype)


@lru_cache(maxsize=4096)
def _gemm_shape(kind: str, geometry: str, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...]:
    """Of torch's own op, on tensors without data. Raises what torch raises where the sizes do not fit."""
    a, b = (torch.empty(shape, device="meta") for shape in (lhs, rhs))
    return tuple(contraction_of(kind, parse_geometry(geometry)).native(a, b, None).shape)


DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "ui8",
    torch.uint16: "ui16",
    torch.uint32: "ui32",
    torch.uint64: "ui64",
    torch.bool: "i1",
    torch.complex64: "complex<f32>",
    torch.complex128: "complex<f64>",
    torch.float8_e4m3fn: "f8E4M3FN",
    torch.float8_e5m2: "f8E5M2",
    torch.float8_e4m3fnuz: "f8E4M3FNUZ",
    torch.float8_e5m2fnuz: "f8E5M2FNUZ",
    torch.float8_e8m0fnu: "f8E8M0FNU",
}
"""Element types as MLIR writes them. A tensor of another dtype is a `!torch.value`."""
