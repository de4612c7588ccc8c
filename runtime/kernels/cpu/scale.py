"""Scale: the scales of runtime/numerics/scaling.py, the maximum and the arithmetic on it in one pass of C++."""

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cpu.cast_library import DTYPES, cast_library, is_readable, num_threads


def fast_scale(x: Tensor, tile: tuple[int, int], largest: float, is_pow2: bool) -> Tensor | None:
    """The scale of each `tile` of x's matrix view, fp32, [ceil(M / b0), ceil(K / b1)]; None if x is not served.

    `largest` is the format's largest value, `is_pow2` the rule. Equal bits to the torch path: a maximum is exact in any
    order, and what follows it is the same arithmetic in float64.
    """
    if not is_readable(x) or cast_library() is None:
        return None
    return torch.ops.lp.tile_scale(x.detach().contiguous(), *tile, largest, is_pow2)


def _tile_scale(x: Tensor, rows: int, columns: int, largest: float, is_pow2: bool) -> Tensor:
    library, out = cast_library(), _tile_scale_shape(x, rows, columns, largest, is_pow2)
    assert library is not None
    k = x.shape[-1] if x.ndim else 1
    m = x.numel() // k
    dtype, threads = DTYPES.index(x.dtype), num_threads(x.numel())
    library.lp_scale(x.data_ptr(), dtype, out.data_ptr(), m, k, rows, columns, largest, is_pow2, threads)
    return out


def _tile_scale_shape(x: Tensor, rows: int, columns: int, largest: float, is_pow2: bool) -> Tensor:
    k = x.shape[-1] if x.ndim else 1
    return x.new_empty((-(-(x.numel() // k) // rows), -(-k // columns)), dtype=torch.float32)


_OPS = Library("lp", "FRAGMENT")
_OPS.define("tile_scale(Tensor x, int rows, int columns, float largest, bool is_pow2) -> Tensor")
_OPS.impl("tile_scale", _tile_scale, "CPU")
register_fake("lp::tile_scale", _tile_scale_shape, lib=_OPS)
