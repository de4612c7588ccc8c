"""Rounding: map a nonnegative real to one of the two integers around it.

With f = floor(t) and r = t - f in [0, 1), both exact in float64:

    nearest_even   f + [r > 1/2 or (r == 1/2 and f odd)]      IEEE 754 roundTiesToEven
    nearest_away   f + [r >= 1/2]                             IEEE 754 roundTiesToAway
    toward_zero    f                                          IEEE 754 roundTowardZero
    stochastic     f + [r >= 1 - u],  u uniform in [0, 1)     up with probability r, so the mean is t

The sign is put back by the caller, so rounding is symmetric about zero in every mode.
"""

import torch
from torch import Tensor

from runtime.errors import FormatError, nearest_names
from runtime.numerics.specs import ROUNDINGS, Rounding


def round_to_integer(t: Tensor, mode: Rounding, u: Tensor | None = None) -> Tensor:
    """Round a float64 tensor t >= 0 to integers (float64, same shape); `u`, same shape, is what stochastic draws.

    Inf stays Inf, NaN stays NaN. No sum `t + 1/2` is formed: 0.49999999999999994 + 0.5 is 1.0 in float64, and that
    would round up a number below one half. For u = j 2^-32 stochastic goes up for exactly floor(r 2^32) of the 2^32
    values of j. (Two values without fraction bits, 2^k and 2^(k+1), are t = 1 and 2: a tie goes up, as IEEE 754 says.)
    """
    below = torch.floor(t)
    rest = t - below
    match mode:
        case "nearest_even":
            return torch.round(t)
        case "nearest_away":
            return below + (rest >= 0.5)
        case "toward_zero":
            return below
        case "stochastic":
            if u is None:
                raise FormatError("stochastic rounding has no random numbers", expected="u, one number in [0, 1) each")
            return below + (rest >= 1 - u)
    raise FormatError(f'"{mode}" is not a rounding', hint=nearest_names(mode, ROUNDINGS))


def goes_far(near: Tensor, far: Tensor, x: Tensor, mode: Rounding, u: Tensor | None = None) -> Tensor:
    """Whether x, between two values of a table, becomes `far`, the larger in magnitude; float64, bool of that shape.

    The two may be any distance apart, and x need be no multiple of anything: so nothing is divided but for `u`.
    """
    excess = torch.where(far <= 0, -1.0, 1.0) * (2 * x - (near + far))  # only its sign is used, and is exact
    match mode:
        case "nearest_even":
            return (excess > 0) | ((excess == 0) & (near != 0))
        case "nearest_away":
            return excess >= 0
        case "toward_zero":
            return x == far
        case "stochastic":
            assert u is not None
            return (x - near).abs() / (far - near).abs() >= 1 - u
