"""Convolutions that round after every multiply-add, by accumulate_conv.cpp: groups and taps are loops of the kernel,
and images are read as they lie. The sums, and what they are exact by, are those of runtime/kernels/cpu/accumulate.py.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.cpu.accumulate import How, accumulate_library, accumulator_plan, declines, how_of, is_default_loop
from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library
from runtime.kernels.cpu.cast_library import CastPlan
from runtime.kernels.direct import AbstractDirect, Taps
from runtime.numerics.reference_gemm import NO_KEY
from runtime.numerics.specs import GemmSpec

SOURCE = Path(__file__).with_name("accumulate_conv.cpp")


class Conv(ctypes.Structure):
    """Sizes and strides, in elements; mirrors Conv of accumulate_conv.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "groups", "channels", "outputs", "positions", "taps", "all_taps", "chunk"),
            *("x_batch", "x_channel", "x_size", "w_group", "w_channel", "w_tap", "w_output", "y_batch", "y_channel"),
            "threads",
        )
    ]


@lru_cache(maxsize=1)
def conv_library() -> ctypes.CDLL | None:
    """The library, built at the first call; None without a compiler or without AVX-512."""
    library = load_library(SOURCE)
    if library is None or not library.lp_accumulate_conv_is_supported():
        return None
    heads = (ctypes.POINTER(CastPlan), ctypes.POINTER(How), ctypes.POINTER(Conv))
    for name, count in (("lp_accumulate_conv", 7), ("lp_accumulate_taps", 5), ("lp_accumulate_depth", 5)):
        function = getattr(library, name)
        function.argtypes, function.restype = (*heads, *[ctypes.c_void_p] * count), None
    return library


@lru_cache(maxsize=1024)
def direct(spec: GemmSpec) -> "DirectSums | None":
    """Direct convolutions with these sums; None where products of matrices serve: other roundings and models."""
    if declines(spec) is not None or not is_default_loop(spec) or spec.accumulator.product != "fma":
        return None
    return DirectSums(spec) if accumulate_library() and conv_library() else None


@dataclass(frozen=True)
class DirectSums(AbstractDirect):
    spec: GemmSpec

    def fits(self, x: Tensor, y_numel: int) -> bool:
        return x.device.type == "cpu" and x.numel() < 2**31 and y_numel < 2**31

    def convolve(self, x: Tensor, w_GCTN: Tensor, taps: Taps, y: Tensor) -> None:
        groups, channels, _, outputs = w_GCTN.shape
        conv = self._conv(x, y, taps, groups, channels, outputs)
        conv.chunk = self.spec.chunk or max(1, channels * taps.all_taps)
        conv.w_group, conv.w_channel, conv.w_tap, conv.w_output = w_GCTN.stride()
        self._call("lp_accumulate_conv", conv, x, taps.lane, taps.tap, taps.number, w_GCTN, y, taps.out)

    def correlate(self, dy: Tensor, x: Tensor, taps: Taps, groups: int) -> Tensor:
        outputs, channels = dy.shape[1] // groups, x.shape[1] // groups
        dw = torch.empty(dy.shape[1], channels, len(taps.tap), dtype=torch.float32, device="cpu")
        conv = self._conv(x, dy, taps, groups, channels, outputs)
        conv.chunk = self.spec.chunk or max(1, len(x) * len(taps.lane))
        if channels == outputs == 1 and groups > 1:  # channels side by side, of which sixteen are a vector
            conv.x_batch = x.shape[2:].numel()
            x, dy = (each.flatten(2).transpose(1, 2).contiguous() for each in (x, dy))
            self._call("lp_accumulate_depth", conv, x, taps.lane, taps.tap, dy, dw)
        else:
            self._call("lp_accumulate_taps", conv, x, taps.lane, taps.tap, dy, dw)
        return dw

    def _conv(self, x: Tensor, y: Tensor, taps: Taps, groups: int, channels: int, outputs: int) -> Conv:
        return Conv(
            batch=len(x),
            groups=groups,
            channels=channels,
            outputs=outputs,
            positions=len(taps.lane),
            taps=len(taps.tap),
            all_taps=taps.all_taps,
            x_batch=x.stride(0),
            x_channel=x.stride(1),
            x_size=x.numel(),
            y_batch=y.stride(0),
            y_channel=y.stride(1),
            threads=torch.get_num_threads(),
        )

    def _call(self, name: str, conv: Conv, *tensors: Tensor) -> None:
        plan, how = accumulator_plan(self.spec), how_of(self.spec, NO_KEY, 0, 0)
        how.a_bits = how.b_bits = max(how.a_bits, how.b_bits)  # which operand is the image differs by role
        getattr(conv_library(), name)(plan, how, conv, *map(address, tensors))
