"""Philox on the CPU: the words of runtime/numerics/random.py, sixteen counters at a time."""

import ctypes

import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cpu.cast_library import RandomPlan, cast_library, num_threads

_MASK = 0xFFFFFFFF


def fill_random_bits(words: Tensor, *, seed: int, step: int, stream: int, offset: int) -> bool:
    """Fill a contiguous int64 tensor with the words of elements offset ...; False, nothing done, if no kernel can."""
    if not words.is_cpu or not words.numel() or cast_library() is None:
        return False
    torch.ops.lp.fill_random_bits(words, signed_seed(seed), step, stream, offset)
    return True


def random_plan(seed: int, step: int, stream: int, offset: int) -> RandomPlan:
    """Key and counter as random.py lays them out; the arguments are in its ranges."""
    key = (ctypes.c_uint32 * 2)(seed & _MASK, seed >> 32 & _MASK)
    return RandomPlan(key, stream >> 32 << 16, step, stream & _MASK, offset)


def signed_seed(seed: int) -> int:
    """The seed modulo 2^64, as the signed 64-bit number an op's schema carries."""
    return (seed + 2**63) % 2**64 - 2**63


def _fill(words: Tensor, seed: int, step: int, stream: int, offset: int) -> None:
    library = cast_library()
    assert library is not None
    plan = random_plan(seed, step, stream, offset)
    library.lp_random_bits(ctypes.byref(plan), words.data_ptr(), words.numel(), num_threads(words.numel()))


def _fill_nothing(words: Tensor, seed: int, step: int, stream: int, offset: int) -> None:
    return None


_OPS = Library("lp", "FRAGMENT")
_OPS.define("fill_random_bits(Tensor(a!) words, int seed, int step, int stream, int offset) -> ()")
_OPS.impl("fill_random_bits", _fill, "CPU")
register_fake("lp::fill_random_bits", _fill_nothing, lib=_OPS)
