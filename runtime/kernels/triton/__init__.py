"""Triton kernels for CUDA tensors. Nothing here imports triton until a kernel is asked for."""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from runtime.kernels.cpu.cast_library import DTYPES


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether triton is installed; says nothing of a GPU."""
    return find_spec("triton") is not None


def is_readable_by_triton(x: Tensor) -> bool:
    """Whether the kernels here can read x, once it is contiguous: on CUDA, one of their dtypes, not empty."""
    return x.is_cuda and x.dtype in DTYPES and x.layout == torch.strided and x.numel() > 0 and has_triton()
