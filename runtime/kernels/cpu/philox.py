"""Philox on the CPU: key and counter as cast.cpp and accumulate.cpp take them."""

import ctypes

from runtime.kernels.cpu.cast_library import RandomPlan

_MASK = 0xFFFFFFFF


def random_plan(seed: int, step: int, stream: int, offset: int) -> RandomPlan:
    """Key and counter as runtime/numerics/random.py lays them out; the arguments are in its ranges."""
    key = (ctypes.c_uint32 * 2)(seed & _MASK, seed >> 32 & _MASK)
    return RandomPlan(key, stream >> 32 << 16, step, stream & _MASK, offset)
