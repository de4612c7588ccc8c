"""What torch and our kernels can do on this machine, for tests of what is built on it: a CPU may lack it, or be told to
(ONEDNN_MAX_CPU_ISA), and there may be no compiler.
"""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runtime.kernels.cpu.build import COMPILERS, load_library
from runtime.kernels.cpu.cast_library import SOURCE


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


def _int8_is_exact() -> bool:
    """Units without VNNI add pairs of products in 16 bits, which saturate."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (64, 64), dtype=torch.int8, generator=generator) for _ in "ab")
    return torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())


def _fp8_product() -> None:
    a, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())
    torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.float32)


def _bf16_lstm() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        nn.LSTM(4, 4)(torch.ones(2, 1, 4))


INT8_IS_EXACT = _int8_is_exact()
needs_exact_int8 = pytest.mark.skipif(not INT8_IS_EXACT, reason="torch's int8 product saturates here: no VNNI")
needs_fp8_product = pytest.mark.skipif(not _runs(_fp8_product), reason="torch has no fp8 product here")
HAS_BF16_LSTM = _runs(_bf16_lstm)
HAS_COMPILER = any(map(shutil.which, COMPILERS))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
needs_kernels = pytest.mark.skipif(load_library(SOURCE) is None, reason="no C++ compiler, and no kernel that one built")
