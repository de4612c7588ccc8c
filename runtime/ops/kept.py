"""Kept: what forward leaves for backward of a cast operand, as `keep` of its LayerSpec says.

    grid     the values that are multiplied, in the dtype that the GEMM reads
    codes    one buffer with the bits of their codes (runtime/numerics/packing.py), which becomes those values again

Codes change no bit of any result. The values stay as they are where codes take no less (bf16, int8), where they say not
all (a range format), and in eager code where a NaN is among them that has no code; compiled code does not look, and
gives NaN for all values then. Who keeps the codes of one tensor alike shares them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from runtime.kernels.cast.packing import has_lost_nan, pack, packing_for, unpack
from runtime.kernels.fake import has_values
from runtime.numerics.specs import Keep, QuantSpec
from runtime.quantize.cast_memo import MEMO
from runtime.quantize.qtensor import CastKey


class Form(NamedTuple):
    """What a buffer of codes was made of."""

    shape: torch.Size
    spec: QuantSpec
    dtype: torch.dtype
    layout: torch.memory_format


class KeptOperand(NamedTuple):
    """What is saved, and what to make of it; `form` None: it is the values."""

    saved: Tensor | None
    form: Form | None = None


def keep_operand(grid: Tensor | None, spec: QuantSpec, keep: Keep, of: Tensor) -> KeptOperand:
    """What to save of a cast of `of`; of None nothing."""
    if grid is None or keep == "grid" or packing_for(spec, grid.dtype) is None:
        return KeptOperand(grid)
    if (
        torch.compiler.is_compiling() or spec.is_stochastic or spec.quantizer is not None
    ):  # other values from one tensor
        return _packed(grid, spec)
    return MEMO.find_or_make(of, (CastKey(spec), "codes"), lambda: _packed(grid, spec))


def restore_operand(saved: Tensor | None, form: Form | None) -> Tensor | None:
    """The grid values of what was saved."""
    if saved is None or form is None:
        return saved
    return unpack(saved, form.shape, form.spec, form.dtype).contiguous(memory_format=form.layout)


def _packed(grid: Tensor, spec: QuantSpec) -> KeptOperand:
    packing = packing_for(spec, grid.dtype)
    assert packing is not None
    buffer = pack(grid, spec)
    if not torch.compiler.is_compiling() and has_values(buffer) and not grid.is_cuda and has_lost_nan(buffer, packing):
        return KeptOperand(grid)
    return KeptOperand(buffer, Form(grid.shape, spec, grid.dtype, suggest_memory_format(grid)))
