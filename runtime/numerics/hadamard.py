"""Hadamard: the randomized Hadamard transform of an operand along the sum of its GEMM - the oracle.

    y = x diag(s) H_n / sqrt(n)        for each n elements that lie together along the sum; H_n in Sylvester's order

Orthogonal, so that (a T)(b T)^T = a b^T: where both operands of a GEMM are turned, the product is what it was, and an
outlier is spread over n elements before the cast. What n does not divide is turned too: the rest of the axis is taken
in the powers of two that it is made of, the largest first, so that 40 is 16 + 16 + 8 and 7 is 4 + 2 + 1. No element is
added, no size changes, and the product stays exact.

    fixed     s is Transformer Engine's vector of 16, again and again where n is more
    random    s_i = 1 - 2 (bit i mod 32 of word i div 32 of the stream (seed, step, stream))

Either way a part of the axis takes the first of the signs. In fp32, float64 for float64 x: the signs, then for h = 1,
2, 4, ... the pairs i and i + h become a + b and a - b, then times 1 / sqrt(n) rounded to the dtype (exact for 16 and
64); last, if asked, to bf16, nearest-even. A NaN or Inf reaches the n elements beside it.

Source: Tseng et al., QuIP#, arXiv 2402.04396; Transformer Engine's NVFP4 recipe (sign vector, bf16).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from runtime.numerics.random import random_bits
from runtime.numerics.scaling import block_lanes, from_lanes
from runtime.numerics.specs import QuantSpec
from runtime.numerics.transform_specs import TransformSpec

FIXED_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Transformer Engine's, of 16."""
_WORD = 32


def signs_of(
    transform: TransformSpec, *, seed: int = 0, step: int = 0, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """The signs of a transform, fp32, (size,): 1 or -1. Fixed ones do not read the key."""
    if not transform.is_random:
        return torch.tensor(FIXED_SIGNS * (transform.size // len(FIXED_SIGNS)), dtype=torch.float32, device=device)
    words = random_bits(-(-transform.size // _WORD), seed=seed, step=step, stream=stream, device=device)
    bits = words[:, None] >> torch.arange(_WORD, device=device) & 1
    return (1 - 2 * bits.flatten()[: transform.size]).float()


@torch.no_grad()
def rotate(x: Tensor, spec: QuantSpec, signs: Tensor) -> Tensor:
    """x turned by the transform of `spec` along its rows, columns or the columns of each matrix, as `spec.along` says.

    fp32 in x's shape, float64 for float64 x, bf16 where the transform rounds to that. signs: (size,), of `signs_of`.
    """
    assert spec.transform is not None
    lanes = block_lanes(x.reshape(1) if x.dim() == 0 else x, spec.along)
    wide = lanes if lanes.dtype == torch.float64 else lanes.float()
    pieces = [_turned(wide[..., at : at + count], n, signs) for at, count, n in parts(wide.shape[-1], len(signs))]
    turned = torch.cat(pieces, dim=-1) if pieces else wide
    turned = turned.to(torch.bfloat16) if spec.transform.round == "bf16" else turned
    return from_lanes(turned, x.shape, spec.along).reshape(x.shape)


@torch.no_grad()
def rotate_back(y: Tensor, spec: QuantSpec, signs: Tensor) -> Tensor:
    """What `rotate` turned, but for rounding: y H_n diag(s) / sqrt(n), fp32, float64 for float64 y."""
    lanes = block_lanes(y.reshape(1) if y.dim() == 0 else y, spec.along)
    wide, plain = lanes if lanes.dtype == torch.float64 else lanes.float(), torch.ones_like(signs)
    pieces = [
        _turned(wide[..., at : at + count], n, plain) * signs[:n].to(wide.dtype).repeat(count // n)
        for at, count, n in parts(wide.shape[-1], len(signs))
    ]
    back = torch.cat(pieces, dim=-1) if pieces else wide
    return from_lanes(back, y.shape, spec.along).reshape(y.shape)


def parts(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(where it begins, how long it is, elements turned together) of each part of an axis."""
    whole = length // size * size
    if whole:
        yield 0, whole, size
    at, n = whole, size // 2
    while n:
        if length - at >= n:
            yield at, n, n
            at += n
        n //= 2


def _turned(x: Tensor, n: int, signs: Tensor) -> Tensor:
    """(..., L), n dividing L."""
    y = x.unflatten(-1, (-1, n)) * signs[:n].to(x.dtype)
    h = 1
    while h < n:
        pairs = y.unflatten(-1, (-1, 2, h))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        h *= 2
    return (y * torch.full((), 1.0 / math.sqrt(n), dtype=x.dtype, device=x.device)).flatten(-2)
