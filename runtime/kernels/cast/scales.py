"""Scales: those of runtime/numerics/scaling.py, bit for bit, in one pass of a kernel where one serves, as a torch op.

lp::compute_scale    the fp32 scale of x under a cast
"""

import torch
from torch import Tensor

from runtime.kernels.cpu.block_cast import fast_divisor
from runtime.kernels.cpu.scale import fast_scale
from runtime.kernels.torch_ops import declare
from runtime.numerics import scaling
from runtime.numerics.block_formats import get_block_format
from runtime.numerics.format_kinds import filled_to
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import matrix_shape, scale_shape, tile_shape
from runtime.numerics.specs import QuantSpec


@torch.no_grad()
def compute_scale(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """`scaling.compute_scale`: the fp32 scale of x under `spec`, None if the spec has none."""
    if not spec.has_scale:
        return None
    is_traced = torch.compiler.is_compiling() and not spec.is_block  # the oracle is operations that fuse
    if is_traced or not x.is_floating_point():
        return scaling.compute_scale(x, spec)
    scale: Tensor = torch.ops.lp.compute_scale.default(x.detach(), spec.text)
    return scale


def _compute_scale(x: Tensor, spec: str) -> Tensor:
    parsed = QuantSpec.parse(spec)
    found = _by_kernel(x, parsed)
    if found is None:
        found = scaling.compute_scale(x, parsed)
    assert found is not None
    return found.contiguous()


def _by_kernel(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """None where no kernel serves x."""
    if spec.is_block:
        lanes = x.reshape(matrix_shape(x.shape)) if spec.along == "column" else x
        divisor = fast_divisor(lanes, get_block_format(spec.format), spec.along not in (None, "row"))
        return None if divisor is None else 1.0 / divisor
    assert spec.scale is not None
    if spec.scale.rule not in ("amax", "pow2"):
        return None
    tile, largest = tile_shape(x.shape, spec.scale), filled_to(get_format(spec.format))
    return fast_scale(x, tile, largest, spec.scale.rule == "pow2", scale_shape(x.shape, spec.scale))


def _shape(x: Tensor, spec: str) -> Tensor:
    parsed = QuantSpec.parse(spec)
    shape = () if parsed.scale is None else scale_shape(x.shape, parsed.scale)
    return x.new_empty(shape, dtype=torch.float32)


declare("compute_scale(Tensor x, str spec) -> Tensor", _compute_scale, fake=_shape)
