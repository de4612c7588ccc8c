"""Storage: the dtype that holds the grid values of a format."""

from functools import lru_cache

import torch

from runtime.numerics.block_formats import grid_format
from runtime.numerics.embedding import embeds


@lru_cache(maxsize=4096)
def storage_dtype(format: str) -> torch.dtype:
    """The dtype that holds the grid values of a format: bf16 where they embed there, which halves what a GEMM reads
    and what backward keeps; fp32 where there is no smaller exact one that is multiplied.
    """
    if format in _STORAGE:
        return _STORAGE[format]
    return torch.bfloat16 if embeds(grid_format(format), "bf16") else torch.float32


_STORAGE = {"fp16": torch.float16, "int8": torch.int8}
