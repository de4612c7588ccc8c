"""Packing on the CPU: the bytes of runtime/numerics/packing.py in one pass of C++, by packing.cpp.

Served are fp32 and bf16 tensors of every format that codes.h has arithmetic for.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import num_threads
from runtime.kernels.cpu.codes import CodePlan, code_plan
from runtime.numerics.packing import Packing

SOURCE = Path(__file__).with_name("packing.cpp")
DTYPES = (torch.float32, torch.bfloat16)
LOST_NAN = 1


class BlockPacking(ctypes.Structure):
    """How the values of blocks are made; mirrors BlockPacking of packing.cpp, which explains each."""

    _fields_ = [
        ("size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("is_down", "is_two_level")),
        *((name, ctypes.c_float) for name in ("unit", "largest", "scale_max")),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(SOURCE)
    if library is not None:
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        plan, block = ctypes.POINTER(CodePlan), ctypes.POINTER(BlockPacking)
        library.lp_pack.argtypes = [plan, pointer, integer, size, pointer, integer, integer]
        library.lp_unpack.argtypes = [plan, pointer, size, pointer, integer, integer]
        library.lp_pack_blocks.argtypes = [plan, plan, block, pointer, integer, *(size,) * 4, pointer, integer]
        library.lp_unpack_blocks.argtypes = [plan, plan, block, pointer, *(size,) * 4, pointer, integer, integer]
        library.lp_unpack.restype = library.lp_unpack_blocks.restype = None
    return library


@lru_cache(maxsize=256)
def _plans(packing: Packing) -> tuple[CodePlan, CodePlan | None, BlockPacking | None] | None:
    """Of the elements, of the scales, and of the blocks; None where codes.h does not serve."""
    element, block = code_plan(packing.element), packing.block
    if element is None or (element.kind == 2 and element.count == 0):
        return None
    if block is None:
        return element, None, None
    scales, is_down = code_plan(block.scale), packing.along not in (None, "row")
    is_two_level = block.rule == "two_level"
    if scales is None:
        return None
    largest = block.block_max / block.element_max
    return (
        element,
        scales,
        BlockPacking(block.block, is_down, is_two_level, block.element_unit, block.element_max, largest),
    )


def fast_pack(q: Tensor, packing: Packing) -> Tensor | None:
    """The buffer of q, contiguous; None if q is not served."""
    library, plans = _library(), _plans(packing)
    if library is None or plans is None or not q.is_cpu or q.dtype not in DTYPES or not q.numel():
        return None
    element, scales, block = plans
    out, threads = torch.empty(packing.nbytes(q.shape), dtype=torch.uint8, device="cpu"), num_threads(q.numel())
    dtype = DTYPES.index(q.dtype)
    if block is None:
        said = library.lp_pack(element, address(q), dtype, q.numel(), address(out), not packing.has_flag, threads)
        if packing.has_flag:
            out[-1] = said
        return out
    matrices, rows, columns = packing.matrices(q.shape)
    sizes = matrices, rows, columns, packing.code_bytes(rows, columns)
    said = library.lp_pack_blocks(element, scales, block, address(q), dtype, *sizes, address(out), threads)
    return None if said else out


def fast_unpack(buffer: Tensor, shape: Sequence[int], packing: Packing, dtype: torch.dtype) -> Tensor | None:
    """The values of a buffer; None if it is not served."""
    library, plans = _library(), _plans(packing)
    out_numel = 1
    for size in shape:
        out_numel *= size
    if library is None or plans is None or not buffer.is_cpu or dtype not in DTYPES or not out_numel:
        return None
    if packing.has_flag and bool(buffer[-1]):
        return torch.full(tuple(shape), torch.nan, dtype=dtype, device="cpu")
    buffer = buffer.contiguous()
    element, scales, block = plans
    out, number = torch.empty(tuple(shape), dtype=dtype, device="cpu"), DTYPES.index(dtype)
    threads = num_threads(out_numel)
    if block is None:
        library.lp_unpack(element, address(buffer), out_numel, address(out), number, threads)
        return out
    matrices, rows, columns = packing.matrices(shape)
    sizes = matrices, rows, columns, packing.code_bytes(rows, columns)
    library.lp_unpack_blocks(element, scales, block, address(buffer), *sizes, address(out), number, threads)
    return out
