"""Scale: the scales of runtime/numerics/scaling.py, the maximum and the arithmetic on it in one pass of C++."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.cast_library import DTYPES, cast_library, is_readable, num_threads
from runtime.kernels.cpu.contiguous import contiguous


def fast_scale(x: Tensor, tile: tuple[int, int], largest: float, is_pow2: bool, shape: Sequence[int]) -> Tensor | None:
    """The scale of each `tile` of x's matrix view, fp32, as `shape` lays them; None if x is not served.

    `largest` is the format's largest value, `is_pow2` the rule. Equal bits to the torch path: a maximum is exact in any
    order, and what follows it is the same arithmetic in float64.
    """
    library = cast_library() if is_readable(x) else None
    if library is None:
        return None
    x, out = contiguous(x), torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    k = x.shape[-1] if x.ndim else 1
    dtype, threads = DTYPES.index(x.dtype), num_threads(x.numel())
    library.lp_scale(address(x), dtype, address(out), x.numel() // k, k, *tile, largest, is_pow2, threads)
    return out
