"""Fingerprint: 16 bytes that change when the bytes of a tensor do, read once at the speed of memory.

Two contents of one shape, dtype and order in memory have the same fingerprint with chance below 2^-60 over a secret
that this process draws (fingerprint.cpp has the argument); no result depends on the secret otherwise. It costs 0.1 to
0.3 of a cast of the tensor and, unlike a version counter, sees every write: through `.data`, numpy, or a collective.
"""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import num_threads

SOURCE = Path(__file__).with_name("fingerprint.cpp")
WORDS, LANES, PRIME = 512, 2, 2**61 - 1


def fingerprint(x: Tensor) -> bytes | None:
    """16 bytes of the values of a CPU tensor as they lie in memory; None without a compiler.

    A tensor with gaps between its elements is copied first. Values count by their bits: 0.0 is not -0.0.
    """
    library = _library()
    if library is None:
        return None
    x = in_memory_order(x.detach())
    out = (ctypes.c_uint64 * LANES)()
    library.lp_fingerprint(_secret(), address(x), x.numel() * x.element_size(), out, num_threads(x.numel()))
    return bytes(out)


def in_memory_order(x: Tensor) -> Tensor:
    """x as a contiguous tensor: a permuted view where its elements lie side by side, else a copy."""
    if x.is_contiguous():
        return x
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).contiguous()


class Secret(ctypes.Structure):
    """The keys of both lanes; mirrors Secret of fingerprint.cpp."""

    _fields_ = [
        ("low", ctypes.c_uint32 * WORDS * LANES),
        ("high", ctypes.c_uint32 * WORDS * LANES),
        ("point", ctypes.c_uint64 * LANES),
    ]


@lru_cache(maxsize=1)
def _secret() -> Secret:
    secret = Secret.from_buffer_copy(os.urandom(ctypes.sizeof(Secret)))
    secret.point[:] = [point % PRIME for point in secret.point]
    return secret


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(SOURCE)
    if library is not None:
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.lp_fingerprint.argtypes = [ctypes.POINTER(Secret), pointer, size, pointer, integer]
        library.lp_fingerprint.restype = None
    return library
