"""Room: whether a sum of what scales have made as large as their formats hold fits its accumulator.

    sqrt(n) max(a) max(b) <= max(accumulator)      n products of random signs, each as large as can be
          n max(a) max(b) <= max(fp32)             no sum may become Inf

max(a) is the largest value of a format whose scale fills it, and 1 for an operand without a scale, whose values are as
they come. A sum whose length is not known is taken to have 256 products.
"""

import math

from runtime.numerics.block_formats import is_block_format
from runtime.numerics.formats import get_format
from runtime.numerics.specs import GemmSpec, QuantSpec, Role

_USUAL_LENGTH = 256


def why_no_room(role: Role, spec: GemmSpec, length: int | None) -> str:
    """Why a sum of `length` products leaves its accumulator; "" if it does not, or of integers, which saturate or
    wrap as the policy says.
    """
    scaled = [operand for operand in (spec.lhs, spec.rhs) if operand.scale is not None]
    if not scaled or spec.accumulator.is_integer or spec.accumulator.is_open:
        return ""
    largest, most = _largest(spec.lhs) * _largest(spec.rhs), get_format(spec.accumulate).max
    num = length or _USUAL_LENGTH
    if math.sqrt(num) * largest <= most and num * largest <= get_format("fp32").max:
        return ""
    names = " and ".join(dict.fromkeys(each.format for each in scaled))
    wide = dict.fromkeys(each.format for each in scaled if get_format(each.format).max > _WIDE)
    way = f"no scale for {' and '.join(wide)}, whose range is that of fp32" if wide else "accumulate: fp32, or no scale"
    return (
        f"{role}: scales fill {names}, and a sum has no room: products reach {largest:.3g}, {num} of them more, and "
        f"{spec.accumulate} holds {most:.3g}; use {way}"
    )


def why_it_may_saturate(spec: GemmSpec, length: int) -> str:
    """Why a sum of `length` products may leave its accumulator if all have one sign; "" if none can."""
    scaled = [operand for operand in (spec.lhs, spec.rhs) if operand.scale is not None]
    if not scaled or spec.accumulate in ("fp32", "auto"):
        return ""
    largest, most = _largest(spec.lhs) * _largest(spec.rhs), get_format(spec.accumulate).max
    if length * largest <= most:
        return ""
    does = "wraps" if spec.accumulator.overflow == "wrap" else "saturates"
    return (
        f"{spec.accumulate} {does} at {most:.6g}: scales fill the formats, products reach {largest:.3g}, and "
        f"{length} of one sign add up to {length * largest:.3g}"
    )


def _largest(operand: QuantSpec) -> float:
    if operand.scale is None or is_block_format(operand.format):
        return 1.0
    row = get_format(operand.format)
    return max(row.max, -row.min)


_WIDE = 2.0**120
