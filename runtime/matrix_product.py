"""The public GEMM: both operands quantized, summed as an AccumulateSpec says. No layer, no gradient."""

import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.kernels import reference
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.reference import RandomKey
from runtime.numerics.block_formats import default_rounding, is_block_format
from runtime.numerics.casts import quantize
from runtime.numerics.random import check_counter
from runtime.numerics.specs import AccumulateModel, AccumulateSpec, GemmSpec, Product, QuantSpec, Rounding


@torch.no_grad()
def gemm(
    a: Tensor,
    b: Tensor,
    *,
    a_format: str = "fp32",
    b_format: str = "fp32",
    accumulate: str | AccumulateSpec = "fp32",
    chunk: int | None = None,
    rounding: Rounding | None = None,
    product: Product = "fma",
    model: AccumulateModel = "per_mac",
    seed: int = 0,
    step: int = 0,
) -> Tensor:
    """a (..., M, K) times b (..., K, N), batch dims broadcast -> (..., M, N) in fp32.

    Both operands are cast to their formats first: the row's own rounding, scale 1, saturating (block formats make
    their own scales, along K). The sum is exact in every step but the roundings Q, each to the accumulator's format:

        c = 0; for each chunk of K: s = 0; for k in the chunk, increasing: s = Q(s + a_k b_k);  c = Q(c + s)

    With one chunk, or chunk None, c = s. product="rounded" is s = Q(s + Q(a_k b_k)). model="per_chunk" sums a chunk in
    fp32 (nearest-even after each fused multiply-add), rounds it once, s = Q(s), then c = Q(c + s). Q rounds by
    `rounding` (None: the accumulator row's own) and saturates; NaN propagates. Stochastic bits are a function of (seed,
    step, place in the output, number of the rounding): runtime/kernels/reference.py says which.
    `accumulate` may be a text or an AccumulateSpec that says all of it: "1-6-9/64 stochastic", "int16 wrap". Integer
    accumulators need integer operands and saturate (row ends: int32 to +-(2^31 - 1)) or wrap (two's complement).
    Raises FormatError: operands that are no matrices or do not fit, unknown names, int sums of floats.
    """
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise FormatError(
            "these matrices have no product",
            expected="(..., M, K) and (..., K, N)",
            got=f"{(*a.shape,)}, {(*b.shape,)}",
        )
    how = _accumulator(accumulate, chunk, rounding, product, model)
    spec = GemmSpec(_cast(a_format, "row"), _cast(b_format, "column"), how)
    if reason := reference.declines(spec):
        raise FormatError(reason, hint='a_format="int8", b_format="int8", or a float accumulator')
    check_counter(step, 0, 0)
    left = quantize(a.float(), a_format)
    right = quantize(b.float().transpose(-1, -2), b_format).transpose(-1, -2)
    if a.device.type == "cpu" and cpu_accumulate.declines(spec) is None:
        return cpu_accumulate.multiply(left, right, spec, RandomKey(seed, step))
    return reference.multiply(left, right, spec, RandomKey(seed, step))


def _cast(name: str, along: str) -> QuantSpec:
    if is_block_format(name):
        return QuantSpec(name, default_rounding(name), along=along)  # type: ignore[arg-type]
    return QuantSpec(name, default_rounding(name))


def _accumulator(
    accumulate: str | AccumulateSpec,
    chunk: int | None,
    rounding: Rounding | None,
    product: Product,
    model: AccumulateModel,
) -> AccumulateSpec:
    is_bare = isinstance(accumulate, str) and "/" not in accumulate and " " not in accumulate
    if is_bare:
        return AccumulateSpec(str(accumulate), chunk, rounding, product, model)
    if (chunk, rounding, product, model) != (None, None, "fma", "per_mac"):
        raise FormatError("the accumulator is described twice", got=str(accumulate), hint="a bare format name")
    return AccumulateSpec.parse(accumulate) if isinstance(accumulate, str) else accumulate
