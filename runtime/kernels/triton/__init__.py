"""Triton kernels for CUDA tensors. Nothing here imports triton until a kernel is asked for."""

from functools import lru_cache
from importlib.util import find_spec


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether triton is installed; says nothing of a GPU."""
    return find_spec("triton") is not None
