"""The public GEMM: both operands quantized, summed as an AccumulateSpec says. No layer.

It is one op, lp::matrix_product, which fx, make_fx, export and torch.compile keep as a node. The op has the
straight-through gradient, da = dy q(b)^T and db = q(a)^T dy with fp32 sums; `gemm` itself gives none.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from runtime.compile_marks import constant_result
from runtime.errors import FormatError
from runtime.kernels.cast.public import quantize
from runtime.kernels.cpu import accumulate, accumulate_aligned, accumulate_wide
from runtime.kernels.torch_ops import declare
from runtime.numerics import reference_gemm as reference
from runtime.numerics.accumulators import ACCUMULATORS
from runtime.numerics.block_formats import default_rounding, grid_format, is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.random import check_counter, signed_seed
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import (
    IDENTITY,
    AccumulateModel,
    AccumulateSpec,
    GemmSpec,
    Product,
    QuantSpec,
    Rounding,
)


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
    their own scales, along K); fp32 is no cast. The sum is exact in every step but the roundings Q, each to the
    accumulator's format:

        c = 0; for each chunk of K: s = 0; for k in the chunk, increasing: s = Q(s + a_k b_k);  c = Q(c + s)

    With one chunk, or chunk None, c = s. product="rounded" is s = Q(s + Q(a_k b_k)). model="per_chunk" sums a chunk in
    fp32 (nearest-even after each fused multiply-add), rounds it once, s = Q(s), then c = Q(c + s). Q rounds by
    `rounding` (None: the accumulator row's own) and saturates, but fp32 overflows to Inf as torch's does; NaN
    propagates, and Inf times 0 is one. Stochastic bits are a function of (seed, step, place in the output, number of
    the rounding): runtime/numerics/reference_gemm.py says which.
    `accumulate` may be a text or an AccumulateSpec that says all of it: "1-6-9/64 stochastic", "int16 wrap". How a GPU
    adds has a name, "hopper-fp8" (runtime/numerics/accumulators.py), and its own rule: model="aligned". Integer
    accumulators need integer operands and saturate (row ends: int32 to +-(2^31 - 1)) or wrap (two's complement).
    An integer sum has no NaN of its own: where an operand has one in the row or column, the result is NaN.
    On the CPU C++ kernels run, with a compiler; a product left to the reference warns once (SlowPathWarning).
    Raises FormatError: operands that are no matrices, do not fit or are not real floating-point, unknown names, int
    sums of floats, integer sums that could leave int64 before they are cut.
    """
    for operand in (a, b):
        if not operand.is_floating_point():
            raise FormatError(
                "only real numbers are cast", where="gemm", expected="a floating-point tensor", got=str(operand.dtype),
                hint="operand.float(), if that is meant",
            )  # fmt: skip
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2] or not _broadcasts(a.shape[:-2], b.shape[:-2]):
        raise FormatError(
            "these matrices have no product",
            expected="(..., M, K) and (..., K, N)",
            got=f"{(*a.shape,)}, {(*b.shape,)}",
        )
    spec = _checked_spec(a_format, b_format, accumulate, chunk, rounding, product, model, step)
    result: Tensor = torch.ops.lp.matrix_product(a.detach(), b.detach(), spec, signed_seed(seed), step)
    return result


def _broadcasts(left: torch.Size, right: torch.Size) -> bool:
    return all(1 in (m, n) or m == n for m, n in zip(reversed(left), reversed(right)))


@constant_result
def _checked_spec(
    a_format: str,
    b_format: str,
    accumulate: str | AccumulateSpec,
    chunk: int | None,
    rounding: Rounding | None,
    product: Product,
    model: AccumulateModel,
    step: int,
) -> str:
    how = _accumulator(accumulate, chunk, rounding, product, model)
    spec = GemmSpec(_cast(a_format, "row"), _cast(b_format, "column"), how)
    if reason := reference.declines(spec):
        raise FormatError(reason, hint=_FITTING["integer" if how.is_integer else how.model])
    check_counter(step, 0, 0)
    return str(spec)


_FITTING = {
    "integer": 'a_format="int8", b_format="int8", or a float accumulator',
    "aligned": "e4m3, e5m2, bf16 or fp16 operands",
}


def _check_int64(spec: GemmSpec, num_k: int) -> None:
    """FormatError if what is added before the accumulator cuts it could leave int64, in which the sums are made."""
    how = spec.accumulator
    left, right = (max(row.max, -row.min) for row in map(grid_format, (spec.lhs.format, spec.rhs.format)))
    terms = 1 if how.model == "per_mac" else min(how.chunk or num_k, num_k)
    row = get_format(how.format)
    if terms * left * right + max(row.max, -row.min) >= 2.0**63:
        raise FormatError(
            f"{terms} products of {spec.lhs.format} and {spec.rhs.format} can leave int64", where="gemm",
            expected="sums below 2^63", hint="narrower operands, a shorter chunk, or model=\"per_mac\"",
        )  # fmt: skip


def _matrix_product(a: Tensor, b: Tensor, text: str, seed: int, step: int) -> Tensor:
    spec, key = GemmSpec.parse(text), RandomKey(seed, step)
    left, right = _quantized(a, b, spec)
    if spec.accumulator.is_integer:
        _check_int64(spec, a.shape[-1])
    # nvfp4's values are on its grid times its tensor's 1 / S, that is, anywhere in fp32
    lhs, rhs = (IDENTITY if operand.has_scale else operand for operand in (spec.lhs, spec.rhs))
    spec = replace(spec, lhs=lhs, rhs=rhs)
    for kernel in (accumulate, accumulate_wide, accumulate_aligned) if a.device.type == "cpu" else ():
        if kernel.declines(spec) is None:
            return kernel.multiply(left, right, spec, key)
    return reference.multiply(left, right, spec, key)


def _quantized(a: Tensor, b: Tensor, spec: GemmSpec) -> tuple[Tensor, Tensor]:
    """Both operands on their grids, fp32, blocks along the sum. float64 is rounded once, from all of its bits. fp32 is
    no cast: Inf stays.
    """
    left, right = _cast_to(a, spec.lhs), b
    return left, _cast_to(right.mT, spec.rhs).mT if spec.rhs.is_block else _cast_to(right, spec.rhs)


def _cast_to(x: Tensor, operand: QuantSpec) -> Tensor:
    if operand.is_identity:
        return x.float()
    wide = x if x.dtype == torch.float64 else x.float()
    return quantize(wide, operand.format, operand.rounding).float()


def _shape(a: Tensor, b: Tensor, text: str, seed: int, step: int) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.new_empty((*batch, a.shape[-2], b.shape[-1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.text = inputs[:3]
    ctx.save_for_backward(a, b)


def _straight_through(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    left, right = _quantized(a, b, GemmSpec.parse(ctx.text))
    da = (dy @ right.transpose(-1, -2)).sum_to_size(a.shape).to(a.dtype)
    db = (left.transpose(-1, -2) @ dy).sum_to_size(b.shape).to(b.dtype)
    return da, db, None, None, None


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
    is_bare = isinstance(accumulate, str) and not {"/", " "} & set(accumulate) and accumulate not in ACCUMULATORS
    if is_bare:
        return AccumulateSpec(str(accumulate), chunk, rounding, product, model)
    if (chunk, rounding, product, model) != (None, None, "fma", "per_mac"):
        raise FormatError("the accumulator is described twice", got=str(accumulate), hint="a bare format name")
    return AccumulateSpec.parse(accumulate) if isinstance(accumulate, str) else accumulate


def _flops(a: Sequence[int], *_: Any, out_shape: Sequence[int]) -> int:
    return 2 * math.prod(out_shape) * a[-1]


declare(
    "matrix_product(Tensor a, Tensor b, str spec, SymInt seed, SymInt step) -> Tensor",
    _matrix_product, fake=_shape, backward=_straight_through, setup_context=_save, flops=_flops,
)  # fmt: skip
