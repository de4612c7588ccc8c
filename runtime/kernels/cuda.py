"""The cuda backend: GEMMs of grid values on a GPU's FP8 and bf16 units, fp32 results.

    method     operands  returns  needs
    cuda_fp8   e4m3      fp32     compute capability 8.9 or more; both formats embed in e4m3
    cuda_bf16  bf16      fp32     compute capability 8.0 or more; both formats embed in bf16

The operands arrive as grid values without their scales, which the caller multiplies in afterwards, in fp32; so torch's
own scales are 1. `_scaled_mm` reads a row-major A and a column-major B, both with K a multiple of 16, and N likewise:
whatever is laid out otherwise (both operands of GRAD, the weight of BWD) is copied, and odd sizes padded with zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NAME = "cuda"


@dataclass(frozen=True)
class Capability:
    """What a GPU can do, as facts."""

    device: str
    compute: tuple[int, int]

    @property
    def has_fp8(self) -> bool:
        return self.compute >= (8, 9)

    @property
    def has_bf16(self) -> bool:
        return self.compute >= (8, 0)

    @property
    def is_short_sum(self) -> bool:
        """Whether FP8 products are added in about 14 bits: Ada and Hopper."""
        return self.compute < (10, 0)


def current_capability() -> Capability | None:
    """Of the current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    return Capability(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def multiply_fp8(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b in fp32 of e4m3 values held in any dtype; no fast accumulation. K = 0 gives 0."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    if 0 in (m, k, n):
        return a_MK.new_zeros((m, n), dtype=torch.float32)
    a = pad(a_MK.float(), (0, -k % 16)).to(torch.float8_e4m3fn)
    b = pad(b_KN.t().float(), (0, -k % 16, 0, -n % 16)).to(torch.float8_e4m3fn).contiguous().t()
    one = torch.ones((), device=a.device)
    y = torch._scaled_mm(a.contiguous(), b, one, one, out_dtype=torch.float32, use_fast_accum=False)
    return y[:, :n].contiguous()


def multiply_bf16(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b in fp32 of bf16 matrices."""
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
