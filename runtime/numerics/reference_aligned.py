"""The aligned sum, as the matrix units of GPUs add: a chunk of products and the running sum at once, in fixed point.

    c = 0; for each chunk of products p_1 .. p_L:   E = max(e_c, e_1 .. e_L)
        c = T( 2^(E-F) (cut(c 2^(F-E)) + cut(p_1 2^(F-E)) + ... + cut(p_L 2^(F-E))) )

An operand is s 2^e with 1 <= |s| < 2, or where it is a subnormal of its own format |s| < 1 and e the format's lowest
exponent. A product has the significand s_a s_b, which may reach 4 and is not normalised, and the exponent e_a + e_b, so
that 1.5 * 1.5 has exponent 0. c is a value of fp32, with subnormals from 2^-126 down. What is 0 has exponent -126.
`cut` drops the fraction, toward zero: F is how many fraction bits a term of the largest exponent keeps. The terms are
added exactly. T normalises and cuts to the accumulator's fraction bits, below 2^-126 at the spacing of its subnormals;
2^128 and beyond is Inf. A sum that is exactly 0 is +0, and one that T cuts to 0 keeps its sign. A last chunk that is
shorter is as if filled with zeros. Where a term is Inf or NaN the sum is what ordinary addition gives.

Source: MMA-Sim, arXiv 2511.10909 and github.com/microsoft/MMA-Sim, whose models were compared with GPUs bit for bit.

Exactness, in float64: products have at most 22 significant bits and exponents from -298 to 256; the fixed-point sum is
below 2^(F + 2) (L + 1), 2^41 at most.
"""

import torch
from torch import Tensor

from runtime.numerics.block_formats import grid_format
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.grid import binade, round_to_grid
from runtime.numerics.scaling import power_of_two
from runtime.numerics.specs import GemmSpec

_LOWEST = -126
"""The exponent of a zero, and of the subnormals of the running sum."""


def multiply(a: Tensor, b: Tensor, spec: GemmSpec) -> Tensor:
    """(..., M, K) x (..., K, N) -> (..., M, N) in fp32. Values must be on the grids that `spec` names."""
    how, num_k = spec.accumulator, a.shape[-1]
    assert how.chunk is not None
    left, right = a.double(), b.double()
    left_e, right_e = (binade(x.abs(), _emin(each.format)) for x, each in ((left, spec.lhs), (right, spec.rhs)))
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    total = torch.zeros(shape, dtype=torch.float64, device=a.device)
    for start in range(0, num_k, how.chunk):
        places = range(start, min(start + how.chunk, num_k))
        top = binade(total.abs(), _LOWEST)
        for k in places:
            exponent = left_e[..., :, k : k + 1] + right_e[..., k : k + 1, :]
            product = left[..., :, k : k + 1] * right[..., k : k + 1, :]
            top = torch.maximum(top, torch.where(product == 0, _LOWEST, exponent))
        unit = power_of_two(top - how.align_bits)
        ordinary, fixed = total, torch.trunc(total / unit)
        for k in places:
            product = left[..., :, k : k + 1] * right[..., k : k + 1, :]
            ordinary, fixed = ordinary + product, fixed + torch.trunc(product / unit)
        total = torch.where(ordinary.isfinite(), _cut((fixed + 0.0) * unit, how.format), ordinary)
    return total.float()


def _cut(x: Tensor, format: str) -> Tensor:
    """T."""
    cut = round_to_grid(x, get_format(format), "toward_zero", overflow="unbounded")
    return torch.where(cut.abs() >= 2.0**128, torch.copysign(torch.full_like(cut, torch.inf), cut), cut)


def _emin(format: str) -> int:
    row = grid_format(format)
    assert isinstance(row, FloatFormat)
    return row.emin
