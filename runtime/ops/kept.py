"""Kept: what forward leaves for backward of a cast operand, as `keep` of its LayerSpec says.

    grid     the values that are multiplied, in the dtype that the GEMM reads
    codes    one buffer with the bits of their codes (runtime/numerics/packing.py), which becomes those values again

Codes change no bit of any result. The values stay as they are where codes take no less (bf16, int8), where they say not
all (a range format), and in eager code where a NaN is among them that has no code; compiled code does not look, and
gives NaN for all values then. Who keeps the codes of one tensor alike shares them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from runtime.kernels.cast.packing import has_lost_nan, pack, packing_for, unpack
from runtime.kernels.cast.scales import compute_scale
from runtime.kernels.fake import has_values
from runtime.numerics.specs import Keep, QuantSpec, Role
from runtime.quantize.cast_memo import MEMO
from runtime.quantize.qtensor import CastKey
from runtime.quantize.storage import storage_dtype
from runtime.state import RunState


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


def kept_nbytes(spec: QuantSpec, keep: Keep, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """What forward keeps of an operand of this shape and dtype, its scale included, before any call: blocks with values
    below bf16's range, and what holds a NaN without a code, take more.
    """
    if spec.is_identity:
        return math.prod(shape) * dtype.itemsize
    stored = storage_dtype(spec.format)
    packing = packing_for(spec, stored) if keep == "codes" else None
    grid = math.prod(shape) * stored.itemsize if packing is None else packing.nbytes(shape)
    if not spec.has_scale:
        return grid
    if spec.quantizer is not None:
        return grid + 4
    scale = compute_scale(torch.empty(tuple(shape), device="meta"), spec)
    assert scale is not None
    return grid + 4 * scale.numel()


def note_kept(state: RunState, name: str | None, role: Role, *saved: Tensor | None) -> None:
    """Count the bytes that a call of a site keeps for a role. What another site keeps already, of this model or of
    another, counts there.
    """
    if name is None or torch.compiler.is_compiling():
        return
    total = 0
    for each in saved:
        if type(each) is Tensor and not each.is_meta:
            storage = each.untyped_storage()
            if _KEPT_BY.setdefault(storage, (state.key, name, role)) == (state.key, name, role):
                total += each.numel() * each.element_size()
    state.calls.sites[name].kept[role] = total


_KEPT_BY: WeakKeyDictionary[torch.UntypedStorage, tuple[int, str, Role]] = WeakKeyDictionary()
"""Which site was the first to keep what lies in a storage."""


def _packed(grid: Tensor, spec: QuantSpec) -> KeptOperand:
    packing = packing_for(spec, grid.dtype)
    assert packing is not None
    buffer = pack(grid, spec)
    if not torch.compiler.is_compiling() and has_values(buffer) and not grid.is_cuda and has_lost_nan(buffer, packing):
        return KeptOperand(grid)
    return KeptOperand(buffer, Form(grid.shape, spec, grid.dtype, suggest_memory_format(grid)))
