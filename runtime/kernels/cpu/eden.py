"""The C face of eden.cpp: block casts whose scales are corrected and rounded again (MS-EDEN)."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import BlockPlan, CastPlan, RandomPlan, TurnPlan

SOURCE = Path(__file__).with_name("eden.cpp")


@lru_cache(maxsize=1)
def eden_cast() -> Any:
    """lp_cast_eden, or None without a compiler."""
    library = load_library(SOURCE)
    if library is None:
        return None
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.lp_cast_eden.argtypes = [
        *(ctypes.POINTER(BlockPlan), ctypes.POINTER(CastPlan), pointer, integer, pointer, integer, size, size, size),
        *(integer, ctypes.c_float, integer, ctypes.POINTER(RandomPlan), ctypes.POINTER(TurnPlan), integer),
    ]
    return library.lp_cast_eden
