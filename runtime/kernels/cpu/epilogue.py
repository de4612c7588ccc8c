"""Epilogue: scales, bias, residual and relu of a product in one pass over it and in place, with the bits of torch's
operations one after another.

    y = relu?(y * s * t + b + r)      y (M, N) fp32;  s (M, 1) or one number;  t, b along M, N or one number;  r (M, N)

Each operation is rounded once, in this order. NaN stays NaN, also through relu. The pure-torch path serves where there
is no compiler.
"""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library

_SOURCE = Path(__file__).with_name("epilogue.cpp")


@lru_cache(maxsize=1)
def epilogue_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler."""
    library = load_library(_SOURCE)
    if library is not None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.lp_epilogue.argtypes = (
            *(pointer, size, size),
            *(pointer, size),
            *(pointer, size, size),
            *(pointer, size, size),
            *(pointer, ctypes.c_int, ctypes.c_int),
        )
        library.lp_epilogue.restype = None
    return library


def finish(
    y_MN: Tensor,
    s: Tensor | None = None,
    t: Tensor | None = None,
    bias: Tensor | None = None,
    residual_MN: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The epilogue of y, which nothing else may hold; y itself where the kernel can write it, else a new tensor."""
    given = [each for each in (s, t, bias) if each is not None]
    if not given and residual_MN is None and not relu:
        return y_MN
    library = epilogue_library() if _is_served(y_MN, s, residual_MN, given) else None
    if library is None:
        return _finish_by_torch(y_MN, s, t, bias, residual_MN, relu)
    m, n = y_MN.shape
    s_kept, s_rows, _ = _strides(s, _ONE)
    t_kept, t_rows, t_columns = _strides(t, _ONE)
    b_kept, b_rows, b_columns = _strides(bias, _MINUS_ZERO)
    library.lp_epilogue(
        *(address(y_MN), m, n),
        *(address(s_kept), s_rows),
        *(address(t_kept), t_rows, t_columns),
        *(address(b_kept), b_rows, b_columns),
        None if residual_MN is None else address(residual_MN),
        *(int(relu), torch.get_num_threads() if m * n > _SERIAL else 1),
    )
    return y_MN


def _finish_by_torch(
    y: Tensor, s: Tensor | None, t: Tensor | None, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    for scale in (s, t):
        y = y if scale is None else y * scale
    for summand in (bias, residual):
        y = y if summand is None else y + summand
    return torch.relu(y) if relu else y


def _is_served(y: Tensor, s: Tensor | None, residual: Tensor | None, given: list[Tensor]) -> bool:
    if torch.compiler.is_compiling() or y.dim() != 2 or not y.is_contiguous():
        return False
    if residual is not None and not (residual.shape == y.shape and residual.is_contiguous()):
        return False
    tensors = [y, *given, *(() if residual is None else (residual,))]
    m, n = y.shape
    rows, columns = [(), (1,), (1, 1), (m, 1)], [(n,), (1, n)]
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors) and all(
        tuple(each.shape) in (rows if each is s else rows + columns) for each in given
    )


def _strides(value: Tensor | None, neutral: Tensor) -> tuple[Tensor, int, int]:
    """The tensor that holds it, and its strides along rows and columns, 0 where it does not vary."""
    if value is None or value.numel() == 1:
        return neutral if value is None else value, 0, 0
    is_column = value.dim() == 2 and value.shape[1] == 1
    return value.contiguous(), int(is_column), int(not is_column)


_ONE, _MINUS_ZERO = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (1.0, -0.0))
_SERIAL = 64**2
"""Elements below which waking the other threads costs more than they save."""
