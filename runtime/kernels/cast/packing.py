"""Packing as torch ops: by a kernel where one serves, else by the oracle, runtime/numerics/packing.py.

    lp::pack      grid values of a cast -> one buffer of bytes, their codes
    lp::unpack    the values again, in the dtype they had, contiguous

Neither is differentiable. On CUDA the oracle runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cpu.packing import fast_pack, fast_unpack
from runtime.kernels.torch_ops import declare
from runtime.numerics import packing as oracle
from runtime.numerics.packing import Packing, packing_of
from runtime.numerics.specs import QuantSpec


def packing_for(spec: QuantSpec, dtype: torch.dtype) -> Packing | None:
    """How grid values of a cast are packed that lie in `dtype`; None where codes take no less, or say not all."""
    if spec.is_identity or not dtype.is_floating_point:
        return None
    return packing_of(spec.format, spec.along, dtype.itemsize)


def pack(grid: Tensor, spec: QuantSpec) -> Tensor:
    """The codes of grid values, 1-D uint8. Only where there is a `packing_for` them."""
    buffer: Tensor = torch.ops.lp.pack(grid, spec.text)
    return buffer


def unpack(buffer: Tensor, shape: Sequence[int], spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """The grid values of a buffer, bit for bit; NaN all of them where a NaN that has no code is among them."""
    values: Tensor = torch.ops.lp.unpack(buffer, shape, spec.text, dtype)
    return values


def has_lost_nan(buffer: Tensor, packing: Packing) -> bool:
    """Whether a NaN without a code was among the values, by looking."""
    return packing.has_flag and bool(buffer[-1] != 0)


def _checked(text: str, dtype: torch.dtype) -> Packing:
    packing = packing_for(QuantSpec.parse(text), dtype)
    if packing is None:
        raise FormatError(f"values of `{text}` in {dtype} are not packed", where="lp::pack", hint="keep: grid")
    return packing


def _pack(grid: Tensor, spec: str) -> Tensor:
    packing = _checked(spec, grid.dtype)
    grid = grid.detach().contiguous()
    fast = fast_pack(grid, packing)
    return oracle.pack(grid, packing) if fast is None else fast


def _unpack(buffer: Tensor, shape: Sequence[int], spec: str, dtype: torch.dtype) -> Tensor:
    packing = _checked(spec, dtype)
    fast = fast_unpack(buffer, shape, packing, dtype)
    return oracle.unpack(buffer, shape, packing, dtype) if fast is None else fast


declare(
    "pack(Tensor grid, str spec) -> Tensor", _pack,
    fake=lambda grid, spec: grid.new_empty((_checked(spec, grid.dtype).nbytes(grid.shape),), dtype=torch.uint8),
)  # fmt: skip
declare(
    "unpack(Tensor buffer, SymInt[] shape, str spec, ScalarType dtype) -> Tensor", _unpack,
    fake=lambda buffer, shape, spec, dtype: buffer.new_empty(tuple(shape), dtype=dtype),
)  # fmt: skip
