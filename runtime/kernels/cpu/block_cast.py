"""Block cast: the values and codes of runtime/numerics/block_casts.py, bit for bit, in one pass of C++ (nvfp4: two).

On CUDA Triton kernels give the same values.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.cast_library import (
    DTYPES,
    OUT_DTYPES,
    BlockPlan,
    CastPlan,
    RandomPlan,
    TurnPlan,
    cast_library,
    is_readable,
    num_threads,
)
from runtime.kernels.cpu.codes import CodePlan, code_plan, codes_library
from runtime.kernels.cpu.contiguous import contiguous
from runtime.kernels.cpu.eden import eden_cast
from runtime.kernels.cpu.philox import random_plan
from runtime.kernels.triton import is_readable_by_triton
from runtime.numerics.block_formats import BlockFormat
from runtime.numerics.random import signed_seed
from runtime.numerics.scaling import divisor_of_amax


class BlockValues(NamedTuple):
    """What a block cast gives."""

    values: Tensor
    """element * scale, divided by the tensor's S or not, as asked."""
    said: Tensor
    """uint8, (): 1 if a block holds NaN or Inf, plus 2 if a value may be too fine for bf16, below its subnormals."""
    divisor: Tensor
    """fp32, (): S of nvfp4, else 1."""


def fast_blocks(
    x: Tensor, row: BlockFormat, plan: BlockPlan | None, *, is_divided: bool, is_stochastic: bool,
    corrected: CastPlan | None = None, turn: TurnPlan | None = None,
    dtype: torch.dtype = torch.float32, is_column: bool = False, out: Tensor | None = None, seed: int = 0,
    step: int = 0, stream: int = 0, offset: int = 0,
) -> BlockValues | None:  # fmt: skip
    """x rounded by `plan`, that of `row`, blocks along the last dim, held in `dtype`; None if x is not served or there
    is no plan.

    is_column: along the last dim but one instead; the random words are then those of x.transpose(-1, -2), whose blocks
    they are. turn: what turns x along its blocks first, on the CPU alone, and of no tiles. corrected: under the rule
    eden, how its scales are rounded again. `out`: where to write, contiguous, of x's shape and of `dtype`, x itself or
    apart from it.
    The random counters are in their ranges: the caller has checked them.
    """
    if plan is None or not _is_served(x) or (row.is_square and x.dim() < 2):
        return None
    if row.rule == "eden" and (corrected is None or eden_cast() is None):
        return None
    if turn is not None and (x.is_cuda or row.is_square):
        return None
    if x.is_cuda and (row.is_square or (row.is_two_level and row.rule != "two_level")):
        return None
    x, is_two_level = contiguous(x), row.is_two_level
    divisor = _divisor(x, is_column, row, turn) if is_two_level else torch.ones((), device=x.device)
    draw = (signed_seed(seed), step, stream, offset) if is_stochastic else None
    if x.is_cuda:
        return _on_cuda(x, divisor, out, plan, is_column, is_divided and is_two_level, dtype, draw)
    out = torch.empty(x.shape, dtype=dtype, device="cpu") if out is None else out
    library = cast_library()
    assert library is not None
    is_banded = is_column or row.is_square
    call = (
        *(address(x), DTYPES.index(x.dtype), address(out), OUT_DTYPES.index(out.dtype), *_matrices(x, is_banded)),
        *(is_banded, divisor.item(), is_divided and is_two_level, random_plan(*draw) if draw else None),
        *(turn, num_threads(x.numel())),
    )
    if row.rule == "eden":
        said = eden_cast()(plan, corrected, *call)
    else:
        said = library.lp_cast_blocks(plan, *call)
    return BlockValues(out, torch.tensor(said, dtype=torch.uint8, device="cpu"), divisor)


class Encoded(NamedTuple):
    """What encoding into a block format gives, the scales not encoded yet."""

    codes: Tensor
    """uint8, the shape of x."""
    scales: Tensor
    """fp32, (..., B); NaN for a block that holds NaN or Inf."""
    divisor: Tensor
    """fp32, (): S of nvfp4, else 1."""


def fast_encode_blocks(
    x: Tensor, row: BlockFormat, plan: BlockPlan | None, *, is_stochastic: bool, seed: int, step: int, stream: int,
    offset: int,
) -> Encoded | None:  # fmt: skip
    """The codes of what fast_blocks rounds, on the CPU, along the last dim; None if x is not served."""
    codes, library = code_plan(row.element), cast_library()
    if plan is None or codes is None or library is None or not is_readable(x) or row.is_square or row.rule == "eden":
        return None
    x = contiguous(x)
    divisor = _divisor(x, False, row) if row.is_two_level else torch.ones(())
    _, rows, columns = _matrices(x, False)
    out = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
    scales = torch.empty((*x.shape[:-1], -(-columns // row.block)), dtype=torch.float32, device="cpu")
    _encoder(library)(
        plan, codes, address(x), DTYPES.index(x.dtype), address(out), address(scales), rows, columns, divisor.item(),
        random_plan(signed_seed(seed), step, stream, offset) if is_stochastic else None, num_threads(x.numel()),
    )  # fmt: skip
    return Encoded(out, scales, divisor)


def fast_decode_blocks(codes: Tensor, scales: Tensor, row: BlockFormat, divisor: Tensor) -> Tensor | None:
    """The fp32 values of uint8 codes under decoded scales; None if they are not served. FormatError for a number that
    is no code.
    """
    plan, library = code_plan(row.element), codes_library()
    is_served = codes.is_cpu and codes.dtype == torch.uint8 and codes.layout == torch.strided and codes.numel()
    if plan is None or library is None or not is_served or row.is_square:
        return None
    codes, scales = codes.contiguous(), scales.contiguous()
    _, rows, columns = _matrices(codes, False)
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    is_beyond = library.lp_decode_blocks(
        plan, address(codes), address(scales), address(out), rows, columns, row.block, row.element_unit,
        divisor.item(), row.is_two_level, num_threads(codes.numel()),
    )  # fmt: skip
    if is_beyond:
        raise FormatError(f"not codes of {row.element}", expected=f"0 <= code < 2^{plan.bits}")
    return out


def _encoder(casts: ctypes.CDLL) -> Any:
    """lp_encode_blocks of the library of casts, declared: a library that was loaded again knows no arguments."""
    if casts.lp_encode_blocks.argtypes is None:
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        casts.lp_encode_blocks.argtypes = [
            ctypes.POINTER(BlockPlan), ctypes.POINTER(CodePlan), pointer, integer, pointer, pointer, size, size,
            ctypes.c_float, ctypes.POINTER(RandomPlan), integer,
        ]  # fmt: skip
        casts.lp_encode_blocks.restype = None
    return casts.lp_encode_blocks


def fast_divisor(x: Tensor, row: BlockFormat, is_column: bool = False) -> Tensor | None:
    """S of nvfp4, fp32, (); None if x is not served. is_column: blocks along the last dim but one."""
    if not _is_served(x) or (row.is_square and (x.dim() < 2 or x.is_cuda)):
        return None
    return _divisor(contiguous(x), is_column, row)


def _is_served(x: Tensor) -> bool:
    return is_readable_by_triton(x) or (is_readable(x) and cast_library() is not None)


def _matrices(x: Tensor, is_column: bool) -> tuple[int, int, int]:
    """(matrices, rows, columns) of x; 1 matrix unless blocks lie along the rows of each."""
    columns = x.shape[-1] if x.ndim else 1
    rows = x.shape[-2] if is_column else x.numel() // columns
    return x.numel() // (rows * columns), rows, columns


def _divisor(x: Tensor, is_column: bool, row: BlockFormat, turn: TurnPlan | None = None) -> Tensor:
    if x.is_cuda:
        from runtime.kernels.triton.block_cast import launch_finite_amax  # imports triton

        return divisor_of_amax(launch_finite_amax(_lanes(x, is_column).contiguous(), row.block), row)
    library = cast_library()
    assert library is not None
    is_banded = is_column or row.is_square
    shape, threads = _matrices(x, is_banded), num_threads(x.numel())
    amax = library.lp_finite_amax(address(x), DTYPES.index(x.dtype), *shape, is_banded, row.is_square, turn, threads)
    return divisor_of_amax(torch.tensor(amax, dtype=torch.float32, device="cpu"), row)


def _on_cuda(
    x: Tensor, divisor: Tensor, out: Tensor | None, plan: BlockPlan, is_column: bool, is_divided: bool,
    dtype: torch.dtype, draw: tuple[int, int, int, int] | None,
) -> BlockValues:  # fmt: skip
    from runtime.kernels.triton.block_cast import launch_block_cast  # imports triton

    lanes = _lanes(x, is_column).contiguous()
    values, said = launch_block_cast(lanes, plan, divisor, is_divided, dtype if out is None else out.dtype, draw)
    values = _lanes(values, is_column)
    return BlockValues(values.contiguous() if out is None else out.copy_(values), said, divisor)


def _lanes(x: Tensor, is_column: bool) -> Tensor:
    return x.transpose(-1, -2) if is_column else x
