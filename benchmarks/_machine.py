"""Machine: what the figures of a table are to be read against, measured in the same run.

    round trip     a cache line to another core and back
    read           bytes a second that all threads read together
    peaks          operations a second of the fp32, bf16 and int8 units, on registers
    products       torch's own fp32 product, and oneDNN's of the same operands: MKL takes a generic path on some CPUs,
                   and every ratio over fp32 is flattered by it

The best of several turns, since another process can only slow one down.
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from runtime.kernels.cpu.address import address
from runtime.kernels.cpu.build import load_library

SOURCE = Path(__file__).with_name("_machine.cpp")
_UNITS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Machine:
    """Of so many threads; 0 or None where there is nothing to measure."""

    threads: int
    round_trip_ns: float
    read_gb_s: float
    peaks: dict[str, float]
    """GFLOP/s (Gop/s) by unit."""
    fp32_gflops: float
    onednn_gflops: float | None

    def __str__(self) -> str:
        state = f"core to core and back {self.round_trip_ns:.0f} ns, read {self.read_gb_s:.0f} GB/s"
        if not self.peaks:
            state = "its state was not measured, without a C++ compiler"
        peaks = ", ".join(f"{name} {rate:.0f}" if rate else f"{name} none" for name, rate in self.peaks.items())
        onednn = "none" if self.onednn_gflops is None else f"{self.onednn_gflops:.0f}"
        return (
            f"machine, {self.threads} threads: {state}\n"
            f"units' peaks, GFLOP/s: {peaks or 'not measured'}\n"
            f"fp32 product of 1024: torch.mm {self.fp32_gflops:.0f}, oneDNN {onednn}"
        )


@lru_cache(maxsize=8)
def machine(threads: int, turns: int = 5) -> Machine:
    """Measured at the first call, in about a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        library, trip, read, peaks = _library(), 0.0, 0.0, {}
        if library is not None:
            data = torch.zeros(1 << 25, dtype=torch.int64)
            if len(os.sched_getaffinity(0)) > 1:  # on one core each turn would wait for the scheduler
                trip = 1e9 * min(library.lp_round_trip(5000) for _ in range(turns))
            read = 1e-9 * max(library.lp_read_bandwidth(address(data), data.numel(), threads) for _ in range(turns))
            for unit, name in enumerate(_UNITS):
                peaks[name] = 1e-9 * max(library.lp_peak(unit, threads) for _ in range(turns))
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        return Machine(threads, trip, read, peaks, _rate(lambda: a @ b, turns), _onednn(a, b, turns))
    finally:
        torch.set_num_threads(before)


def _rate(run: Callable[[], object], turns: int) -> float:
    run()
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * 1024**3 / best


def _onednn(a: torch.Tensor, b: torch.Tensor, turns: int) -> float | None:
    """The rate of oneDNN's fp32 product; None in a torch without it."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        return _rate(lambda: linear(a, b, None, "none", [], ""), turns)
    except (AttributeError, RuntimeError):
        return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_library(SOURCE)
    if library is not None:
        library.lp_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        library.lp_round_trip.argtypes = [ctypes.c_int64]
        library.lp_peak.argtypes = [ctypes.c_int, ctypes.c_int]
        for function in (library.lp_read_bandwidth, library.lp_round_trip, library.lp_peak):
            function.restype = ctypes.c_double
    return library
