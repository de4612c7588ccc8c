"""Block cast: the values of runtime/numerics/block_casts.py, bit for bit, in one pass of C++ (nvfp4: two).

The same ops run on CUDA as Triton kernels.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cpu.cast_library import DTYPES, OUT_DTYPES, BlockPlan, cast_library, is_readable, num_threads
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.triton import is_readable_by_triton
from runtime.numerics.random import signed_seed
from runtime.numerics.scaling import divisor_of_amax


class BlockValues(NamedTuple):
    """What a block cast gives."""

    values: Tensor
    """element * scale, divided by the tensor's S or not, as asked."""
    said: Tensor
    """uint8, (): 1 if a block holds NaN or Inf, plus 2 if a value may be too fine for bf16, below its subnormals."""


def fast_blocks(
    x: Tensor, plan: BlockPlan | None, *, is_divided: bool, is_stochastic: bool, dtype: torch.dtype = torch.float32,
    is_column: bool = False, out: Tensor | None = None, seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0,
) -> BlockValues | None:  # fmt: skip
    """x rounded by `plan`, blocks along the last dim, held in `dtype`; None if x is not served or there is no plan.

    is_column: along the last dim but one instead; the random words are then those of x.transpose(-1, -2), whose blocks
    they are. `out`: where to write, contiguous, of x's shape and of `dtype`, x itself or apart from it.
    The random counters are in their ranges: the caller has checked them.
    """
    if plan is None or not _is_served(x):
        return None
    x, is_two_level = x.detach().contiguous(), plan.rule == TWO_LEVEL
    divisor = torch.ops.lp.block_divisor(x, is_column) if is_two_level else torch.ones((), device=x.device)
    words = list((ctypes.c_int32 * (ctypes.sizeof(plan) // 4)).from_buffer_copy(plan))
    facts = (words, is_column, is_divided and is_two_level, is_stochastic)
    draw = (signed_seed(seed), step, stream, offset)
    if out is not None:
        return BlockValues(out, torch.ops.lp.cast_blocks_into(x, divisor, out, *facts, *draw))
    return BlockValues(*torch.ops.lp.cast_blocks(x, divisor, *facts, dtype, *draw))


def fast_divisor(x: Tensor, is_column: bool = False) -> Tensor | None:
    """S of nvfp4, fp32, (); None if x is not served. is_column: blocks along the last dim but one."""
    if not _is_served(x):
        return None
    return torch.ops.lp.block_divisor(x.detach().contiguous(), is_column)


def _is_served(x: Tensor) -> bool:
    return is_readable_by_triton(x) or (is_readable(x) and cast_library() is not None)


def _matrices(x: Tensor, is_column: bool) -> tuple[int, int, int]:
    """(matrices, rows, columns) of x; 1 matrix unless blocks lie along the rows of each."""
    columns = x.shape[-1] if x.ndim else 1
    rows = x.shape[-2] if is_column else x.numel() // columns
    return x.numel() // (rows * columns), rows, columns


def _block_divisor(x: Tensor, is_column: bool) -> Tensor:
    library = cast_library()
    assert library is not None
    shape, threads = _matrices(x, is_column), num_threads(x.numel())
    amax = library.lp_finite_amax(x.data_ptr(), DTYPES.index(x.dtype), *shape, is_column, threads)
    return divisor_of_amax(torch.tensor(amax, dtype=torch.float32))


def _cast_blocks_into(
    x: Tensor, divisor: Tensor, out: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    seed: int, step: int, stream: int, offset: int,
) -> Tensor:  # fmt: skip
    """`plan`: the 32-bit words of a BlockPlan."""
    library = cast_library()
    assert library is not None
    words = (ctypes.c_int32 * len(plan))(*plan)
    said = library.lp_cast_blocks(
        BlockPlan.from_buffer_copy(words), x.data_ptr(), DTYPES.index(x.dtype), out.data_ptr(),
        OUT_DTYPES.index(out.dtype), *_matrices(x, is_column), is_column, divisor.item(), is_divided,
        random_plan(seed, step, stream, offset) if is_stochastic else None, num_threads(x.numel()),
    )  # fmt: skip
    return torch.tensor(said, dtype=torch.uint8)


def _cast_blocks(
    x: Tensor, divisor: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    dtype: torch.dtype, seed: int, step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(x.shape, dtype=dtype)
    facts = (plan, is_column, is_divided, is_stochastic)
    return out, _cast_blocks_into(x, divisor, out, *facts, seed, step, stream, offset)


def _block_divisor_cuda(x: Tensor, is_column: bool) -> Tensor:
    from runtime.kernels.triton.block_cast import launch_finite_amax  # imports triton

    return divisor_of_amax(launch_finite_amax(_lanes(x, is_column).contiguous(), 16))


def _cast_blocks_cuda(
    x: Tensor, divisor: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    dtype: torch.dtype, seed: int, step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from runtime.kernels.triton.block_cast import launch_block_cast  # imports triton

    words = BlockPlan.from_buffer_copy((ctypes.c_int32 * len(plan))(*plan))
    draw = (seed, step, stream, offset) if is_stochastic else None
    lanes = _lanes(x, is_column).contiguous()
    values, said = launch_block_cast(lanes, words, divisor, is_divided, dtype, draw)
    return _lanes(values, is_column).contiguous(), said


def _cast_blocks_into_cuda(
    x: Tensor, divisor: Tensor, out: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    seed: int, step: int, stream: int, offset: int,
) -> Tensor:  # fmt: skip
    facts = (plan, is_column, is_divided, is_stochastic)
    values, said = _cast_blocks_cuda(x, divisor, *facts, out.dtype, seed, step, stream, offset)
    out.copy_(values)
    return said


def _lanes(x: Tensor, is_column: bool) -> Tensor:
    return x.transpose(-1, -2) if is_column else x


def _cast_blocks_shape(
    x: Tensor, divisor: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    dtype: torch.dtype, seed: int, step: int, stream: int, offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=torch.uint8)


def _cast_blocks_into_shape(
    x: Tensor, divisor: Tensor, out: Tensor, plan: list[int], is_column: bool, is_divided: bool, is_stochastic: bool,
    seed: int, step: int, stream: int, offset: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((), dtype=torch.uint8)


TWO_LEVEL = 4
"""BlockPlan.rule of nvfp4."""
_FACTS = "int[] plan, bool is_column, bool is_divided, bool is_stochastic"
_DRAW = "int seed, int step, int stream, int offset"
_OPS = Library("lp", "FRAGMENT")
_OPS.define("block_divisor(Tensor x, bool is_column) -> Tensor")
_OPS.impl("block_divisor", _block_divisor, "CPU")
_OPS.impl("block_divisor", _block_divisor_cuda, "CUDA")
register_fake("lp::block_divisor", lambda x, is_column: x.new_empty((), dtype=torch.float32), lib=_OPS)
_OPS.define(f"cast_blocks(Tensor x, Tensor divisor, {_FACTS}, ScalarType dtype, {_DRAW}) -> (Tensor, Tensor)")
_OPS.impl("cast_blocks", _cast_blocks, "CPU")
_OPS.impl("cast_blocks", _cast_blocks_cuda, "CUDA")
register_fake("lp::cast_blocks", _cast_blocks_shape, lib=_OPS)
_OPS.define(f"cast_blocks_into(Tensor x, Tensor divisor, Tensor(a!) out, {_FACTS}, {_DRAW}) -> Tensor")
_OPS.impl("cast_blocks_into", _cast_blocks_into, "CPU")
_OPS.impl("cast_blocks_into", _cast_blocks_into_cuda, "CUDA")
register_fake("lp::cast_blocks_into", _cast_blocks_into_shape, lib=_OPS)
