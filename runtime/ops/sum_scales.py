"""Scales and sums: which scale of an operand leaves the sum of its GEMM, which is multiplied into the values before it.

y[m,n] = sum_k q_x[m,k] q_w[n,k] * s_x[m] s_w[n]       a scale per row of x and w: the same for all terms
y[m,n] = sum_k (q_x[m,k] s_x[m,k']) q_w[n,k]           a scale per block: exact if a power of two, else rounded once
                                                       to fp32, which only fp32 sums allow
"""

from runtime.numerics.free_axes import Side
from runtime.numerics.specs import FP32_SUMS, GemmSpec, QuantSpec, Role
from runtime.ops.contractions import AbstractContraction, Conv, Matmul


def varies_along_sum(plan_kind: AbstractContraction, role: Role, side: Side, spec: QuantSpec) -> bool:
    """True when the operand's scale changes along the reduction axis, so that it cannot be taken out of the sum."""
    granularity = spec.scale.granularity if spec.scale else "tensor"
    return granularity not in ("tensor", plan_kind.free_axis[role, side])


def why_not_scaled(kind: AbstractContraction, op: str, role: Role, side: Side, numbers: GemmSpec) -> str:
    """Why a scale of an operand can be neither taken out of its sum nor multiplied into the values before it; "" if it
    can. The sentence begins with the operand as a policy names it.
    """
    operand = numbers.lhs if side == "lhs" else numbers.rhs
    if operand.scale is None or not varies_along_sum(kind, role, side, operand):
        return ""
    granularity, free, name = operand.scale.granularity, kind.free_axis[role, side], slot_name(kind, role, side)
    if numbers.accumulator.model == "aligned":
        what = f"a scale per {granularity} varies along the sum, and an aligned sum takes values of {operand.format}"
        return f"{name}: {what}; use granularity tensor{'' if free == 'none' else f' or {free}'}, or accumulate fp32"
    is_conv = isinstance(kind, Conv)
    has_channels = not (isinstance(kind, Conv) and kind.geometry.is_transposed)
    if granularity == "channel" and not has_channels:
        return f"{name}: the weight of a {op} has no dim that is its output channels; use granularity tensor"
    is_line = is_conv and granularity != "channel"  # of the matrix of an image, which is no part of the convolution
    if operand.scale.rule == "pow2" and not is_line:
        return ""
    if granularity == "channel" or (granularity == "block" and not is_conv):
        if numbers.accumulator == FP32_SUMS:
            return ""
        how = "is multiplied into the values before it, which needs fp32 sums"
        return f"{name}: a scale per {granularity} varies along the sum and {how}; use accumulate fp32, or rule pow2"
    others = ["tensor"] if free == "none" else [free]
    if is_conv and side == "rhs" and role != "grad" and has_channels:
        others = ["channel", "tensor"]
    what, ways = f"a scale per {granularity} varies along the sum of a {op}", f"use granularity {' or '.join(others)}"
    return (
        f"{name}: {what}, whose rows are lines of pixels; {ways}"
        if is_line
        else f"{name}: {what}; {ways}, or rule pow2"
    )


def slot_name(kind: AbstractContraction, role: Role, side: Side) -> str:
    """What a policy calls an operand: x, w, dy; of a product of activations a, b, dy."""
    if side == "lhs" and role != "fwd":
        return "dy"
    names = ("a", "b") if isinstance(kind, Matmul) else ("x", "w")
    return names[side == "rhs" and role != "grad"]
