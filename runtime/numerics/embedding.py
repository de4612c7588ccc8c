"""Embedding: which values a format has, and whether another has them all. It is the rule of lowering."""

import math
from functools import lru_cache

from runtime.errors import FormatError
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.formats import get_format


@lru_cache(maxsize=4096)
def embeds(inner: Format | str, outer: Format | str) -> bool:
    """True if every finite value of `inner` is a value of `outer`; the sign of zero is not looked at.

    float in float: M_i <= M_o, max_i <= max_o, and the bottom fits: with subnormals in `outer` its quantum divides that
    of `inner`, 2^(emin_o - M_o) <= 2^(emin_i - M_i); without, tiny_o <= tiny_i.
    int in float: all integers up to max_i are values, so max_i <= 2^(M_o + 1), max_i <= max_o and 1 is a value.
    lookup: value by value.
    """
    inner = get_format(inner) if isinstance(inner, str) else inner
    outer = get_format(outer) if isinstance(outer, str) else outer
    if isinstance(inner, LookupFormat) or isinstance(outer, LookupFormat):
        if isinstance(outer, LookupFormat) and inner.codes > outer.codes + 1:  # + 1: inner may have a -0 more
            return False
        return all(has_value(outer, value) for value in finite_values(inner))
    if isinstance(outer, IntFormat):
        if isinstance(inner, FloatFormat) and inner.quantum < 1:
            return False
        return outer.min <= inner.min and inner.max <= outer.max
    if isinstance(inner, IntFormat):
        magnitude = max(inner.max, -inner.min)
        return magnitude <= min(2.0 ** (outer.mantissa + 1), outer.max) and outer.tiny <= 1
    bottom_fits = outer.quantum <= inner.quantum if outer.subnormals else outer.tiny <= inner.tiny
    return inner.mantissa <= outer.mantissa and inner.max <= outer.max and bottom_fits


def has_value(row: Format, value: float) -> bool:
    """True if the finite `value` is one of the row's; the sign of zero is not looked at."""
    if isinstance(row, LookupFormat):
        return value in row.grid
    if not row.min <= value <= row.max or 0 < abs(value) < row.tiny:
        return False
    if isinstance(row, IntFormat):
        return value.is_integer()
    exponent = max(math.frexp(value)[1] - 1, row.emin)
    return value == 0 or (value * 2.0 ** (row.mantissa - exponent)).is_integer()


@lru_cache(maxsize=64)
def finite_values(row: Format) -> tuple[float, ...]:
    """Every finite value in increasing order, zero once; for rows of up to 16 bits."""
    if row.bits > 16:
        raise FormatError(f"{row.name} has too many values to list", expected="up to 16 bits", got=f"{row.bits} bits")
    if isinstance(row, LookupFormat):
        return row.grid
    if isinstance(row, IntFormat):
        return tuple(float(n) for n in range(int(row.min), int(row.max) + 1))
    steps = range(2**row.mantissa)
    normal = (2.0**k * (1 + m * row.ulp_at_one) for k in range(row.emin, row.emax + 1) for m in steps)
    positive = {m * row.quantum for m in steps[1:] if row.subnormals}
    positive.update(value for value in normal if row.min_normal <= value <= row.max)
    return tuple(sorted({0.0} | positive | {-value for value in positive}))
