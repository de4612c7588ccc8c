"""Scaling: the number a tensor is divided by so that its largest magnitude lands on the format's largest value.

    amax   scale = fp32(amax / max)                    clamped to >= 2^-126
    pow2   scale = smallest 2^k >= amax / max          clamped to [2^-126, 2^127]
    sawb   scale = (c1 sqrt(E x^2) - c2 E|x|) / max    of a weight in few levels; clamped as amax

amax is the largest |x| of the group that shares the scale; an amax of 0, NaN or Inf gives scale 1, so that zeros stay
zeros and a NaN or Inf spreads to nothing but itself. Shapes, with the matrix view x_MK (M = product of leading dims):

    tensor  ()                      row    x.shape[:-1] + (1,)
    column  (1, ..., 1, K)          block  [ceil(M / b0), ceil(K / b1)], one per tile, ragged at the edges
    channel (C, 1, ..., 1)          of a weight (C, ...): the rows of the matrix view that a channel has
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from runtime.errors import FormatError
from runtime.numerics.block_formats import BlockFormat, get_block_format
from runtime.numerics.format_kinds import filled_to
from runtime.numerics.formats import get_format
from runtime.numerics.specs import Along, QuantSpec, ScaleSpec

MIN_SCALE, MAX_SCALE = 2.0**-126, torch.finfo(torch.float32).max


@torch.no_grad()
def compute_scale(x: Tensor, spec: QuantSpec) -> Tensor | None:
    """The fp32 scale of x under `spec`, in the shape above; None if the spec has no scale. nvfp4: 1 / S, fp32, ().

    Invariants: 2^-126 <= scale < Inf, and amax / scale <= max (1 + 2^-23) unless that clamp or a non-finite amax acted.
    One pass over x for the maximum and one for the minimum; no copy of x unless a block tile is ragged.
    """
    if not spec.has_scale:
        return None
    if not x.is_floating_point():
        raise FormatError("a scale is computed from real numbers", expected="a floating-point tensor", got=str(x.dtype))
    if spec.is_block:
        return 1.0 / two_level_divisor(x, spec.along, get_block_format(spec.format))
    assert spec.scale is not None
    assert spec.quantizer is None  # which has its scale
    largest, is_pow2 = filled_to(get_format(spec.format)), spec.scale.rule == "pow2"
    is_compiling = torch.compiler.is_compiling()  # then operations that fuse
    if spec.scale.rule == "sawb":
        return _sawb_scale(x, largest)
    amax = group_amax(x, spec.scale)
    if is_compiling and is_pow2:
        return _pow2_scale(amax if x.dtype == torch.float64 else amax.float(), largest)
    if is_compiling and not x.is_cuda and _is_fp32(largest):
        return _amax_scale(amax.float(), largest)
    # In float64: the quotient of two fp32 numbers rounded to 53 bits and then to 24 is the one rounded to 24 at once.
    scale = amax.double() / largest
    if is_pow2:
        fraction, exponent = torch.frexp(scale)  # scale = fraction 2^exponent, 1/2 <= fraction < 1
        scale = power_of_two((exponent - (fraction == 0.5).int()).clamp(-126, 127))
    scale = scale.clamp(MIN_SCALE, MAX_SCALE).float()
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


SAWB: dict[float, tuple[float, float]] = {1.0: (2.6, 1.71), 7.0: (12.035, 12.03)}
"""c1 and c2 by the largest level, of levels with a zero between: Choi et al., Accurate and Efficient 2-bit Quantized
Neural Networks, MLSys 2019, equation 3, with the numbers of IBM's fms-model-optimizer for 3 and for 15 levels."""


def _sawb_scale(x: Tensor, largest: float) -> Tensor:
    """The clip that is nearest to the best of six distributions, over the largest level. Sums are of pieces, so that
    no number of threads changes their order.
    """
    pieces = pad(x.detach().double().flatten(), (0, -x.numel() % 4096)).view(-1, 4096)
    root, mean = (sums.sum(dim=-1).sum(dim=-1) / max(x.numel(), 1) for sums in (pieces.square(), pieces.abs()))
    c1, c2 = SAWB[largest]
    clip = c1 * root.sqrt() - c2 * mean
    scale = (clip / largest).clamp(MIN_SCALE, MAX_SCALE).float()
    return torch.where(torch.isfinite(clip) & (clip > 0), scale, torch.ones_like(scale))


def _amax_scale(amax: Tensor, largest: float) -> Tensor:
    """The scale in few operations, since a compiler repeats them for every element. On the CPU alone, where compiled
    code divides as IEEE 754 says, and so rounds at once as float64 does in two steps.
    """
    scale = (amax / torch.full_like(amax, largest)).clamp(MIN_SCALE, MAX_SCALE)
    return torch.where((amax > 0) & (amax < math.inf), scale, 1.0)


def _pow2_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest 2^k >= amax / largest by comparing fractions, as bits: Inductor has no vector code for frexp.

    amax = m 2^a and largest = f 2^e with 1/2 <= m, f < 1: k = a - e, and one more where m > f.
    """
    is_wide = amax.dtype == torch.float64
    integers, digits, bias = (torch.int64, 52, 1022) if is_wide else (torch.int32, 23, 126)
    fraction, exponent = math.frexp(largest)
    is_small = amax < 2.0**-100  # of fp32 some have fewer bits
    bits = torch.where(is_small, amax * 2.0**100, amax).view(integers)
    k = (bits >> digits) - (bias + exponent) - 100 * is_small.to(integers)
    k = k + ((bits & ((1 << digits) - 1)) > math.floor((2 * fraction - 1) * 2.0**digits)).to(integers)
    scale = ((k.clamp(-126, 127).to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where((amax > 0) & (amax < math.inf), scale, 1.0)


def _is_fp32(value: float) -> bool:
    return math.frexp(value)[0] * 2.0**24 % 1 == 0


def expand_scale(scale: Tensor, x_shape: torch.Size, spec: QuantSpec) -> Tensor:
    """A scale as `compute_scale` shapes it, made to broadcast against x; only block makes a full-size tensor."""
    if spec.scale is None or spec.scale.granularity != "block" or not x_shape:
        return scale.reshape(()) if not x_shape else scale
    m, k = matrix_shape(x_shape)
    rows, columns = tile_shape(x_shape, spec.scale)
    wide = scale.repeat_interleave(rows, dim=0)[:m].repeat_interleave(columns, dim=1)[:, :k]
    return wide.reshape(x_shape)


def block_lanes(x: Tensor, along: Along | None) -> Tensor:
    """x with the blocks of a block format along its last dim, a view where strides allow; undone by `from_lanes`."""
    if along in (None, "row"):
        return x
    return x.transpose(-1, -2) if along == "batched-column" else x.reshape(matrix_shape(x.shape)).t()


def from_lanes(lanes: Tensor, x_shape: torch.Size, along: Along | None) -> Tensor:
    """What was computed on `block_lanes(x, along)`, in x's shape."""
    if along in (None, "row"):
        return lanes
    return lanes.transpose(-1, -2) if along == "batched-column" else lanes.t().view(x_shape)


def two_level_divisor(x: Tensor, along: Along | None, row: BlockFormat) -> Tensor:
    """S of nvfp4, fp32, (): by what every value is divided; blocks with NaN or Inf left out."""
    lanes = block_lanes(x, along).float()
    if row.is_square and lanes.dim() > 2:
        lanes = pad(lanes, (0, 0, 0, -lanes.shape[-2] % row.height))  # no tile reaches into the next matrix
    amax = group_amax(lanes, ScaleSpec("block", block=(row.height, row.block)))
    finite = torch.where(amax.isfinite(), amax, 0.0)
    return divisor_of_amax(finite.amax() if finite.numel() else finite.new_zeros(()), row)


def divisor_of_amax(amax: Tensor, row: BlockFormat) -> Tensor:
    """S = min(448 * 6 / amax, FLT_MAX) in fp32; 1 for an amax of 0."""
    quotient = torch.full_like(amax, row.block_max) / amax
    return torch.where(amax > 0, quotient.clamp(max=torch.finfo(torch.float32).max), torch.ones_like(amax))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for integers in [-1022, 1023]: the bits are written, no power is computed."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def matrix_shape(x_shape: torch.Size) -> tuple[int, int]:
    """(M, K) of the matrix view; a tensor without dims is 1 x 1."""
    return (math.prod(x_shape[:-1]), x_shape[-1]) if x_shape else (1, 1)


def tile_shape(x_shape: torch.Size, scale: ScaleSpec) -> tuple[int, int]:
    """The tile of the matrix view that shares one scale; at least 1 x 1, and no larger than the matrix."""
    m, k = matrix_shape(x_shape)
    channel = math.prod(x_shape[1:-1]), k
    tiles = {
        "tensor": (m, k),
        "row": (1, k),
        "column": (m, 1),
        "channel": channel,
        "block": (min(scale.block[0], m), min(scale.block[1], k)),
    }
    rows, columns = tiles[scale.granularity]
    return max(rows, 1), max(columns, 1)


def scale_shape(x_shape: torch.Size, scale: ScaleSpec) -> torch.Size:
    """The shape of the scale of x, as the head of this file lists them."""
    m, k = matrix_shape(x_shape)
    rows, columns = tile_shape(x_shape, scale)
    if scale.granularity == "block":
        return torch.Size((-(-m // rows), -(-k // columns)))
    ones = torch.Size((1,) * (len(x_shape) - 1))
    shapes = {"row": (*x_shape[:-1], 1), "column": (*ones, k), "channel": (*x_shape[:1], *ones)}
    return torch.Size(shapes.get(scale.granularity, ())) if x_shape else torch.Size(())


def group_amax(x: Tensor, scale: ScaleSpec) -> Tensor:
    """max |x| of each group, in the scale's shape and x's dtype; NaN if the group holds one, 0 if it is empty."""
    shape, (m, k), (rows, columns) = scale_shape(x.shape, scale), matrix_shape(x.shape), tile_shape(x.shape, scale)
    if not x.numel():
        return x.new_zeros(shape)
    x_MK = pad(x.reshape(m, k), (0, -k % columns, 0, -m % rows)) if m % rows or k % columns else x.reshape(m, k)
    tiles = x_MK.view(x_MK.shape[0] // rows, rows, x_MK.shape[1] // columns, columns)
    if torch.compiler.is_compiling():  # one sum to keep instead of two, and no copy of |x|
        return tiles.abs().amax(dim=(1, 3)).reshape(shape)
    return torch.maximum(tiles.amax(dim=(1, 3)), -tiles.amin(dim=(1, 3))).reshape(shape)
