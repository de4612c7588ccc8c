"""Power: x^p by additions, multiplications and divisions of float64 alone.

torch's own differs by a bit between a vector's lanes and what is left over, so a shard would not have the bits of the
whole; here an element is computed alike wherever it lies.
"""

import math

import torch
from torch import Tensor


def power(x: Tensor, p: Tensor) -> Tensor:
    """x^p of float64 x >= 0 (0 of 0), relative error below 2^-44 for |p log2 x| < 64; NaN of NaN."""
    mantissa, exponent = torch.frexp(x)
    is_low = mantissa < math.sqrt(0.5)
    mantissa = torch.where(is_low, 2 * mantissa, mantissa)
    exponent = exponent.double() - is_low.double()
    t = (mantissa - 1) / (mantissa + 1)  # log m = 2 artanh t, |t| < 0.172
    square, total = t * t, torch.full_like(t, 1 / 23)
    for odd in range(21, 0, -2):
        total = total * square + 1 / odd
    logarithm = (exponent + 2 / math.log(2) * t * total) * p
    whole = logarithm.round().clamp(-1000, 1000).nan_to_num(0)
    rest, result = (logarithm - whole) * math.log(2), torch.ones_like(t)
    for number in range(14, 0, -1):
        result = result * rest / number + 1
    return torch.where(x == 0, 0.0, result * (whole.long() + 1023 << 52).view(torch.float64))
