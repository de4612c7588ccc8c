"""Scales: those of runtime/numerics/scaling.py, bit for bit, in one pass of a kernel where one serves."""

import torch
from torch import Tensor

from runtime.kernels.cpu.block_cast import fast_divisor
from runtime.kernels.cpu.scale import fast_scale
from runtime.numerics import scaling
from runtime.numerics.formats import get_format
from runtime.numerics.scaling import matrix_shape, scale_shape, tile_shape
from runtime.numerics.specs import QuantSpec


@torch.no_grad()
def compute_scale(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """`scaling.compute_scale`: the fp32 scale of x under `spec`, None if the spec has none."""
    fast = _by_kernel(x, spec) if spec.has_scale and x.is_floating_point() else None
    return scaling.compute_scale(x, spec) if fast is None else fast


def _by_kernel(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """None where no kernel serves x."""
    if spec.is_block:
        lanes = x.reshape(matrix_shape(x.shape)) if spec.along == "column" else x
        divisor = fast_divisor(lanes, spec.along not in (None, "row"))
        return None if divisor is None else 1.0 / divisor
    if torch.compiler.is_compiling():  # the oracle is operations that fuse
        return None
    assert spec.scale is not None
    tile, largest = tile_shape(x.shape, spec.scale), get_format(spec.format).max
    fast = fast_scale(x, tile, largest, spec.scale.rule == "pow2")
    return None if fast is None else fast.reshape(scale_shape(x.shape, spec.scale))
