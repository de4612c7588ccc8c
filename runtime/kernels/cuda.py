"""CUDA: products of grid values on a GPU's matrix units, fp32 results, for the kernels of this table.

    kernel     operands        returns  needs
    cuda_int8  int8            fp32     compute capability 7.5; exact
    cuda_fp8   e4m3, one e5m2  fp32     compute capability 8.9; both formats embed, after a shift if need be
    cuda_bf16  bf16            fp32     compute capability 8.0 and mm(out_dtype=); both formats embed in bf16
    cuda_fp16  fp16            fp32     compute capability 7.0 and mm(out_dtype=); both formats embed in fp16

The operands arrive as grid values without their scales, which the caller multiplies in afterwards, in fp32; so torch's
own scales are 1. (`_scaled_mm` with row scales returns bf16 before cuBLAS 12.9, one rounding more than the policy asks
for.) It reads a row-major A and a column-major B, both with K a multiple of 16, and N likewise; `_int_mm` wants M > 16,
K and N multiples of 8. Whatever is laid out otherwise (both operands of GRAD, the weight of BWD) is copied, and odd
sizes are padded with zeros, which add nothing.

Matrix units align the products of a step to the largest one and cut what falls off, and cut the sum (Fasi, Higham,
Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330, 2021: V100, T4, A100). With f fraction
bits kept, every product, and at most two more terms a step of 4 products or more, loses less than 2^-f of the largest:

    |error| <= (K + 1) 2^(1 - f) sum|a b|
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.kernels.int8_product import check_int8_sum
from runtime.kernels.registry import Declined
from runtime.kernels.request import GemmRequest
from runtime.kernels.triton import has_triton
from runtime.numerics.embedding import finite_values, has_value
from runtime.numerics.format_kinds import Format
from runtime.numerics.formats import get_format
from runtime.numerics.specs import FP32_SUMS

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Capability:
    """What a GPU and the torch that drives it can do, as facts."""

    device: str
    """Its name."""
    compute: tuple[int, int]
    """Compute capability: 7.0 Volta, 7.5 Turing, 8.0 Ampere, 8.9 Ada, 9.0 Hopper, 10.x and 12.x Blackwell."""
    has_mm_out_dtype: bool = True
    """Whether torch.mm takes `out_dtype`, without which it rounds the sums of bf16 and fp16 operands to their dtype."""
    has_triton: bool = True
    """Whether casts are single kernels; without triton they are torch ops, with the same bits."""
    allows_tf32: tuple[bool, bool] = (False, False)
    """Whether torch may round fp32 operands to tf32: in matrix products, in convolutions."""

    def has_unit(self, name: str) -> bool:
        """Whether it multiplies fp16, int8, bf16 or fp8 matrices."""
        return self.compute >= _UNITS[name]

    @property
    def casts_text(self) -> str:
        """What a reason says of how operands are cast."""
        return "" if self.has_triton else "; casts are torch ops: triton is not installed"

    @property
    def fp8_sum(self) -> str:
        """How FP8 products are added, with the bound.

        Hopper: about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Ada and Hopper: 13 fraction bits in the
        accumulator (SageAttention2, arXiv 2411.10958). Of Blackwell no vendor's document says it, so that the same
        bound is no more than an assumption there.
        """
        bound = product_bound(13)
        if self.compute < (10, 0):
            return f"{self.device} adds FP8 products in about 14 bits, {bound}"
        return f"how {self.device} adds FP8 products is not published; Hopper's bound is assumed, {bound}"


def product_bound(fraction: int) -> str:
    """The bound at the head of this file, for a reason."""
    return f"|error| <= (K+1) 2^{1 - fraction} sum|a b|"


def found_for(request: GemmRequest) -> Capability | Declined:
    """The device that may run a request, or why none does."""
    device = current_capability()
    if device is None:
        return Declined("no CUDA device is here")
    return device if request.is_plain else Declined(f"torch's own {request.kind} runs it")


def found_for_floats(request: GemmRequest) -> Capability | Declined:
    """The same of a request for fp32 sums."""
    if request.spec.accumulator.is_integer or request.spec.is_identity:
        return Declined()
    found = found_for(request)
    if isinstance(found, Capability) and request.spec.accumulator != FP32_SUMS:
        return Declined(f"it sums in fp32, not {request.sum_text}")
    return found


def current_capability() -> Capability | None:
    """Of the current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    return Capability(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        has_mm_out_dtype="dtype" in torch.ops.aten.mm.overloads(),
        has_triton=has_triton(),
        allows_tf32=(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
    )


@dataclass(frozen=True)
class Container:
    """A format's values times 2^shift are values of an FP8 format."""

    name: str
    shift: int = 0

    def hold(self, x: Tensor) -> Tensor:
        """x in the FP8 dtype; exact."""
        return (x.float() * 2.0**self.shift if self.shift else x.float()).to(FP8[self.name])


@lru_cache(maxsize=256)
def fp8_containers(lhs: Format, rhs: Format) -> tuple[Container, Container] | None:
    """What holds the values of both formats; None if nothing does. cuBLASLt multiplies e4m3 by e4m3 and e4m3 by e5m2,
    not e5m2 by e5m2 (cuBLAS documentation, cublasLtMatmul, table of FP8 types).
    """
    left, right = (_containers(row) for row in (lhs, rhs))
    pairs = (("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"))
    return next(((left[a], right[b]) for a, b in pairs if a in left and b in right), None)


@lru_cache(maxsize=256)
def _containers(row: Format) -> dict[str, Container]:
    """By enumeration of the values. A shift is the largest that keeps the maximum in range: a smaller one only takes
    bits from the smallest values. hfp8-143 (largest 30 = 1.875 2^4, smallest 2^-13) has none: shifted by 4, as its
    smallest value needs in e4m3, 30 becomes 480, where e4m3 ends at 448, and e5m2 has two fraction bits.
    """
    found: dict[str, Container] = {}
    if row.bits > 8:
        return found
    for name in FP8:
        outer, values = get_format(name), finite_values(row)
        for shift in (0, math.floor(math.log2(outer.max / max(map(abs, values))))):
            if name not in found and all(has_value(outer, value * 2.0**shift) for value in values):
                found[name] = Container(name, shift)
    return found


def multiply_fp8(
    a_MK: Tensor, b_KN: Tensor, containers: tuple[Container, Container] = (Container("e4m3"), Container("e4m3"))
) -> Tensor:
    """a b in fp32 of values, in any dtype, that `containers` hold; no fast accumulation. K = 0 gives 0."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    if 0 in (m, k, n):
        return a_MK.new_zeros((m, n), dtype=torch.float32)
    a = pad(containers[0].hold(a_MK).view(torch.uint8), (0, -k % 16)).contiguous()
    b = pad(containers[1].hold(b_KN.t()).view(torch.uint8), (0, -k % 16, 0, -n % 16)).contiguous()
    one = torch.ones((), device=a.device)
    left, right = (x.view(FP8[c.name]) for x, c in zip((a, b), containers))
    y = torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.float32, use_fast_accum=False).narrow(1, 0, n)
    shift = containers[0].shift + containers[1].shift
    return y * 2.0**-shift if shift else y.contiguous()


def multiply_half(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b in fp32 of bf16 or fp16 matrices."""
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)


def multiply_int8(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b of int8 matrices, summed exactly in int32, rounded once to fp32; NotSupported if a sum could leave int32."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    check_int8_sum(k)
    if 0 in (m, k, n):
        return a_MK.new_zeros((m, n), dtype=torch.float32)
    a = pad(a_MK, (0, -k % 8, 0, max(17 - m, 0))).contiguous()
    b = pad(b_KN.t(), (0, -k % 8, 0, -n % 8)).contiguous().t()
    return torch._int_mm(a, b).narrow(0, 0, m).narrow(1, 0, n).float()


_UNITS = {"fp16": (7, 0), "int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}
"""CUDA C++ Programming Guide, "Compute Capabilities", table of matrix units; int8 from 7.2, which no card has."""
