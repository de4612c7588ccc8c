"""Rotate on the CPU: the transform of runtime/numerics/hadamard.py, bit for bit, in one pass of C++."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import DTYPES, TurnPlan, is_readable, num_threads
from runtime.kernels.cpu.contiguous import contiguous
from runtime.numerics.scaling import matrix_shape
from runtime.numerics.specs import QuantSpec
from runtime.numerics.transform_specs import TransformSpec

SOURCE = Path(__file__).with_name("rotate.cpp")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(SOURCE)
    if library is not None:
        pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.lp_rotate.argtypes = (
            *(pointer, integer, pointer, integer, size, size, size, integer, integer, pointer, integer),
        )
        library.lp_rotate.restype = None
    return library


def turn_plan(transform: TransformSpec, signs: Tensor) -> TurnPlan:
    """What turns an operand inside of its cast. signs: (size,), fp32, on the CPU; they outlive the plan."""
    return TurnPlan(transform.size, transform.round == "bf16", address(signs))


def fast_rotate(x: Tensor, spec: QuantSpec, signs: Tensor) -> Tensor | None:
    """`hadamard.rotate`, contiguous; None if x is not served. signs: (size,), fp32, on the CPU."""
    library = _library() if is_readable(x) and x.dim() else None
    if library is None or spec.transform is None:
        return None
    x, is_bf16 = contiguous(x), spec.transform.round == "bf16"
    out = torch.empty(x.shape, dtype=torch.bfloat16 if is_bf16 else torch.float32, device="cpu")
    rows, columns = x.shape[-2:] if spec.along == "batched-column" else matrix_shape(x.shape)
    library.lp_rotate(
        *(address(x), DTYPES.index(x.dtype), address(out), is_bf16, x.numel() // (rows * columns), rows, columns),
        *(spec.along not in (None, "row"), spec.transform.size, address(signs), num_threads(x.numel())),
    )
    return out
