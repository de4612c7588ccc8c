"""GEMMs on the bf16 units with fp32 results, by gemm_amx.cpp where there are AMX tiles, else gemm.cpp.

Only a CPU with AVX512-BF16 has such units, and only a compiler brings them; elsewhere `gemm_library()` is None.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address, check_product
from runtime.kernels.cpu.build import load_library
from runtime.kernels.int8_product import check_int8_sum

SOURCES = tuple(Path(__file__).with_name(name) for name in ("gemm_amx.cpp", "gemm.cpp"))
"""The fastest first."""
DTYPES = (torch.float32, torch.bfloat16)
"""The index is the number the kernel knows the dtype by."""


@lru_cache(maxsize=1)
def gemm_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler or without AVX512-BF16."""
    return next(filter(None, map(load_gemm, SOURCES)), None)


def load_gemm(source: Path) -> ctypes.CDLL | None:
    """The library of one source; None where it cannot be built or the CPU lacks its unit."""
    library = load_library(source)
    if library is None or not library.lp_gemm_is_supported():
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    operand = (pointer, integer, size, size)
    library.lp_gemm.argtypes = (*operand, *operand, pointer, pointer, size, size, size, integer)
    library.lp_gemm.restype = None
    return library


@lru_cache(maxsize=1)
def int8_library() -> ctypes.CDLL | None:
    """The library if this CPU multiplies int8 on AMX tiles. Elsewhere torch's own int8 GEMM is the faster one."""
    library = load_gemm(SOURCES[0])
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        operand = (pointer, size, size)
        library.lp_gemm_int8.argtypes = (*operand, *operand, pointer, size, size, size, ctypes.c_int)
        library.lp_gemm_int8.restype = None
    return library


def multiply(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b + bias, sums and result in fp32, of bf16 values in fp32 or bf16 tensors.

    Values that are not bf16 values are cut to bf16: the caller answers for exact embedding. K = 0 gives the bias, or 0.
    """
    library = gemm_library()
    assert library is not None
    a_MK, b_KN = _readable(a_MK), _readable(b_KN)
    bias_N = bias_N.expand(b_KN.shape[1]) if bias_N is not None and bias_N.numel() == 1 else bias_N
    check_product(a_MK, b_KN, bias_N)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device="cpu")
    bias = None if bias_N is None else bias_N.contiguous()
    library.lp_gemm(
        *(address(a_MK), DTYPES.index(a_MK.dtype), a_MK.stride(0), a_MK.stride(1)),
        *(address(b_KN), DTYPES.index(b_KN.dtype), b_KN.stride(1), b_KN.stride(0)),
        None if bias is None else address(bias),
        *(address(out), m, n, k),
        torch.get_num_threads() if m * n * k > _SERIAL else 1,
    )
    return out


def multiply_int8(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b of int8 matrices, summed exactly in int32, rounded once to fp32; NotSupported if a sum could leave int32."""
    check_int8_sum(a_MK.shape[1])
    library = int8_library()
    assert library is not None
    a_MK, b_KN = _readable(a_MK), _readable(b_KN)
    check_product(a_MK, b_KN)
    (m, k), n = a_MK.shape, b_KN.shape[1]
    out = torch.empty(m, n, dtype=torch.float32, device="cpu")
    library.lp_gemm_int8(
        *(address(a_MK), a_MK.stride(0), a_MK.stride(1)),
        *(address(b_KN), b_KN.stride(1), b_KN.stride(0)),
        *(address(out), m, n, k),
        torch.get_num_threads() if m * n * k > _SERIAL else 1,
    )
    return out


def _readable(x: Tensor) -> Tensor:
    """The kernel reads any strides, and is fast when one of them is 1."""
    return x if 1 in x.stride() else x.contiguous()


_SERIAL = 32**3
"""Multiply-adds below which waking the other threads costs more than they save."""
