"""Contiguous: torch's `contiguous()` for transposed and strided matrices, by tiles, which torch copies one by one."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library

SOURCE = Path(__file__).with_name("contiguous.cpp")
_FEW = 1 << 14
"""Elements that torch copies in less time than a call takes."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(SOURCE)
    if library is not None:
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.lp_contiguous.argtypes = [pointer, pointer, integer, *(size,) * 6, integer]
        library.lp_contiguous.restype = None
    return library


def contiguous(x: Tensor) -> Tensor:
    """x itself where it is contiguous, else a copy in C order; inside of a torch op."""
    if x.is_contiguous():
        return x
    if x.numel() < _FEW or not x.is_cpu or x.layout != torch.strided or x.element_size() not in (2, 4, 8):
        return x.contiguous()
    *lead, rows, columns = x.shape if x.dim() > 1 else (1, *x.shape)
    *lead_strides, row_stride, column_stride = x.stride() if x.dim() > 1 else (0, *x.stride())
    batch_stride = lead_strides[-1] if lead else 0
    is_one_batch = all(a == b * n for a, b, n in zip(lead_strides, lead_strides[1:], lead[1:]))
    is_plain = is_one_batch and rows > 1 and not (x.is_complex() or x.is_neg())
    library = _library() if is_plain else None
    if library is None:
        return x.contiguous()
    out, batch = torch.empty(x.shape, dtype=x.dtype, device="cpu"), x.numel() // (rows * columns)
    library.lp_contiguous(
        address(x), address(out), x.element_size(), batch, rows, columns, batch_stride, row_stride, column_stride,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
