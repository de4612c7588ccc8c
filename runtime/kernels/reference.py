"""The reference backend: a GEMM that rounds after every add, written for the reader and not for speed.

    c = 0; for each chunk of `chunk` products: s = 0; for k in the chunk: s = Q(s + a_k b_k); c = Q(c + s)

Additions go in increasing k; Q rounds once to the accumulator's format (a fused multiply-add: the product is not
rounded first). With no chunk the whole of K is one chunk and the outer add is skipped.

Exactness: operands of at most 26 significant bits have products exact in float64. The sum s + p is rounded to odd in
float64 (the inexact bit is kept in the last place), and rounding that to any format of at most 51 significant bits
equals rounding the exact sum (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
"""

import torch
from torch import Tensor

from runtime.numerics.casts import quantize
from runtime.numerics.formats import get_format
from runtime.numerics.specs import GemmSpec

NAME = "reference"


def multiply(a: Tensor, b: Tensor, spec: GemmSpec) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32, accumulated as `spec` says. Overflow saturates; NaN
    propagates.
    """
    a64, b64 = a.double(), b.double()
    num_k = a.shape[-1]
    chunk = spec.chunk or max(num_k, 1)
    rounding = get_format(spec.accumulate).rounding
    total = a64.new_zeros((*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
    for start in range(0, num_k, chunk):
        part = torch.zeros_like(total)
        for k in range(start, min(start + chunk, num_k)):
            product = a64[..., :, k : k + 1] * b64[..., k : k + 1, :]
            part = quantize(add_to_odd(part, product), spec.accumulate, rounding)
        total = part if num_k <= chunk else quantize(add_to_odd(total, part), spec.accumulate, rounding)
    return total.float()


def add_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """x + y in float64, rounded to odd: toward zero, with the last bit set when anything was cut. Inf and NaN pass
    through.
    """
    s = x + y
    back = s - x
    error = (x - (s - back)) + (y - back)
    bits = s.view(torch.int64)
    # an even result with a remainder moves one ulp towards it; an odd one already carries the sticky bit
    step = torch.where((error > 0) == (s > 0), 1, -1)
    inexact = (error != 0) & torch.isfinite(error) & ((bits & 1) == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64)
