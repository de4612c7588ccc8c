"""Odd: float64 rounded to odd in fp32, so that rounding it again to few bits is rounding the float64 itself.

    odd(x) = x where fp32 has it, else x cut toward zero with the last bit set

A comparison with a number of at most 23 bits comes out as that of x, and so does rounding to nearest or toward zero on
a grid whose steps are at least four of fp32's there (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57, 2008). -0, NaN and Inf are themselves.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import num_threads

_SOURCE = Path(__file__).with_name("odd.cpp")
_LARGEST = 2.0**126
"""Finite values below it have a scale and a cast value in fp32 under every block format."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.lp_to_odd.argtypes = (pointer, pointer, size, ctypes.c_int)
        library.lp_to_odd.restype = ctypes.c_double
    return library


def odd_in_fp32(x: Tensor) -> Tensor | None:
    """odd(x) of float64, in C order; None off the CPU, without a compiler, and where a finite |x| is 2^126 or more."""
    is_plain = type(x) is Tensor and x.is_cpu and x.layout == torch.strided and not x.is_neg()
    library = _library() if is_plain and x.numel() else None
    if library is None:
        return None
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    largest = library.lp_to_odd(address(x), address(out), x.numel(), num_threads(x.numel()))
    return out if largest < _LARGEST else None
