"""Block cast: the values of runtime/numerics/block_casts.py, bit for bit, in one pass of C++ (nvfp4: two).

The same ops run on CUDA as Triton kernels.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cpu.cast_library import DTYPES, OUT_DTYPES, BlockPlan, cast_library, is_readable, num_threads
from runtime.kernels.cpu.philox import random_plan, signed_seed
from runtime.kernels.triton import is_readable_by_triton


class BlockValues(NamedTuple):
    """What a block cast gives."""

    values: Tensor
    """element * scale, divided by the tensor's S or not, as asked."""
    said: Tensor
    """uint8, (): 1 if a block holds NaN or Inf, plus 2 if a value may be too fine for bf16, below its subnormals."""


def fast_blocks(
    x: Tensor, plan: BlockPlan | None, *, is_divided: bool, is_stochastic: bool, dtype: torch.dtype = torch.float32,
    seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> BlockValues | None:  # fmt: skip
    """x rounded by `plan`, blocks along the last dim, held in `dtype`; None if x is not served or there is no plan.

    The random counters are in their ranges: the caller has checked them.
    """
    if plan is None or not _is_served(x):
        return None
    x, is_two_level = x.detach().contiguous(), plan.rule == TWO_LEVEL
    divisor = torch.ops.lp.block_divisor(x) if is_two_level else torch.ones((), device=x.device)
    words = list((ctypes.c_int32 * (ctypes.sizeof(plan) // 4)).from_buffer_copy(plan))
    values, said = torch.ops.lp.cast_blocks(
        x, divisor, words, is_divided and is_two_level, is_stochastic, dtype, signed_seed(seed), step, stream, offset
    )
    return BlockValues(values, said)


def fast_divisor(x: Tensor) -> Tensor | None:
    """S of nvfp4, fp32, (); None if x is not served."""
    if not _is_served(x):
        return None
    return torch.ops.lp.block_divisor(x.detach().contiguous())


def _is_served(x: Tensor) -> bool:
    return is_readable_by_triton(x) or (is_readable(x) and cast_library() is not None)


def divisor_of_amax(amax: Tensor) -> Tensor:
    """S = min(448 * 6 / amax, FLT_MAX) in fp32; 1 for an amax of 0."""
    quotient = torch.full_like(amax, 448.0 * 6.0) / amax
    return torch.where(amax > 0, quotient.clamp(max=torch.finfo(torch.float32).max), torch.ones_like(amax))


def _matrix(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1] if x.ndim else 1
    return x.numel() // columns, columns


def _block_divisor(x: Tensor) -> Tensor:
    library = cast_library()
    assert library is not None
    amax = library.lp_finite_amax(x.data_ptr(), DTYPES.index(x.dtype), *_matrix(x), num_threads(x.numel()))
    return divisor_of_amax(torch.tensor(amax, dtype=torch.float32))


def _cast_blocks(
    x: Tensor, divisor: Tensor, plan: list[int], is_divided: bool, is_stochastic: bool, dtype: torch.dtype, seed: int,
    step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plan`: the 32-bit words of a BlockPlan."""
    library, out = cast_library(), torch.empty(x.shape, dtype=dtype)
    assert library is not None
    words = (ctypes.c_int32 * len(plan))(*plan)
    said = library.lp_cast_blocks(
        BlockPlan.from_buffer_copy(words), x.data_ptr(), DTYPES.index(x.dtype), out.data_ptr(), OUT_DTYPES.index(dtype),
        *_matrix(x), divisor.item(), is_divided, random_plan(seed, step, stream, offset) if is_stochastic else None,
        num_threads(x.numel()),
    )  # fmt: skip
    return out, torch.tensor(said, dtype=torch.uint8)


def _block_divisor_cuda(x: Tensor) -> Tensor:
    from runtime.kernels.triton.block_cast import launch_finite_amax  # imports triton

    return divisor_of_amax(launch_finite_amax(x, 16))


def _cast_blocks_cuda(
    x: Tensor, divisor: Tensor, plan: list[int], is_divided: bool, is_stochastic: bool, dtype: torch.dtype, seed: int,
    step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from runtime.kernels.triton.block_cast import launch_block_cast  # imports triton

    words = BlockPlan.from_buffer_copy((ctypes.c_int32 * len(plan))(*plan))
    draw = (seed, step, stream, offset) if is_stochastic else None
    return launch_block_cast(x, words, divisor, is_divided, dtype, draw)


def _cast_blocks_shape(
    x: Tensor, divisor: Tensor, plan: list[int], is_divided: bool, is_stochastic: bool, dtype: torch.dtype, seed: int,
    step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.uint8)


TWO_LEVEL = 4
"""BlockPlan.rule of nvfp4."""
_OPS = Library("lp", "FRAGMENT")
_OPS.define("block_divisor(Tensor x) -> Tensor")
_OPS.impl("block_divisor", _block_divisor, "CPU")
_OPS.impl("block_divisor", _block_divisor_cuda, "CUDA")
register_fake("lp::block_divisor", lambda x: x.new_empty((), dtype=torch.float32), lib=_OPS)
_OPS.define(
    "cast_blocks(Tensor x, Tensor divisor, int[] plan, bool is_divided, bool is_stochastic, ScalarType dtype, "
    "int seed, int step, int stream, int offset) -> (Tensor, Tensor)"
)
_OPS.impl("cast_blocks", _cast_blocks, "CPU")
_OPS.impl("cast_blocks", _cast_blocks_cuda, "CUDA")
register_fake("lp::cast_blocks", _cast_blocks_shape, lib=_OPS)
