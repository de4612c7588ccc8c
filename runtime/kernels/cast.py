"""Cast kernels: the grid values of runtime/numerics/casts.py, bit for bit, at the speed of memory.

The C++ kernel serves fp32, bf16 and fp16 tensors on the CPU (a strided one is copied first), every format within
fp32's normal exponents, every rounding, every granularity of scale. All else takes the oracle, and so does a machine
without a compiler.
"""

import math
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.library import Library, register_fake

from runtime.kernels.cpu.cast_library import DTYPES, CastPlan, cast_library, is_readable, num_threads
from runtime.kernels.cpu.philox import random_plan, signed_seed
from runtime.numerics.casts import to_grid
from runtime.numerics.formats import FloatFormat, LookupFormat, get_format
from runtime.numerics.grid import int_range
from runtime.numerics.random import check_counter
from runtime.numerics.scaling import matrix_shape, tile_shape
from runtime.numerics.specs import QuantSpec, Rounding, ScaleSpec


def fast_to_grid(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0
) -> Tensor:
    """`casts.to_grid`, same arguments, same bits: float32 (float64 for float64 x), x itself for the identity spec."""
    if spec.is_identity:
        return x
    if not _is_served(x, spec, scale):
        return to_grid(x, spec, scale, seed=seed, step=step, stream=stream, offset=offset)
    out, _ = torch.ops.lp.cast_to_grid(
        x.detach().contiguous(), scale, str(spec), signed_seed(seed), step, stream, offset
    )
    return out


def fast_to_grid_checked(
    x: Tensor, spec: QuantSpec, scale: Tensor | None, *, seed: int = 0, step: int = 0, stream: int = 0, offset: int = 0
) -> tuple[Tensor, bool]:
    """`fast_to_grid` and whether any element overflowed: |x / scale| non-finite, or above max once rounded.

    Once rounded, as IEEE 754 defines overflow: under an amax scale the largest element is max (1 +- 2^-23) before
    rounding and would count as overflow half of the time. For the identity spec: whether x holds an Inf or NaN.
    """
    if spec.is_identity:
        return x, bool(x.numel()) and not bool(torch.stack(torch.aminmax(x)).isfinite().all())
    if not _is_served(x, spec, scale):
        cast = partial(to_grid, x, spec, scale, seed=seed, step=step, stream=stream, offset=offset)
        row = get_format(spec.format)
        unbounded = cast(overflow="unbounded")
        return cast(), not bool(((unbounded >= row.min) & (unbounded <= row.max)).all())
    out, beyond = torch.ops.lp.cast_to_grid(
        x.detach().contiguous(), scale, str(spec), signed_seed(seed), step, stream, offset
    )
    return out, bool(beyond)


@lru_cache(maxsize=4096)
def cast_plan(format: str, rounding: Rounding) -> CastPlan | None:
    """The plan of a cast; None if the loop cannot do it: a table, a constant that is no fp32, min not -max."""
    row = get_format(format)
    if isinstance(row, LookupFormat):
        return None
    if isinstance(row, FloatFormat):
        shift, smallest, largest = 23 - row.mantissa, row.tiny, row.max
        zero = -0.0 if row.has_negative_zero else 0.0
        low = 2.0**row.emin if row.subnormals else row.tiny
        magic = 2.0**23 * row.quantum if row.subnormals else 2.0 ** (row.emin + 26)
        is_gap = not row.subnormals  # below the smallest value: half of it is a tie, which goes to 0, the even one
    else:
        low, high = int_range(row, torch.float32)
        if low != -high:
            return None
        shift, smallest, largest, zero, low, magic, is_gap = 0, 1.0, high, 0.0, 2.0**23, 2.0**23, False
    half = smallest / 2
    up_at = half if rounding == "nearest_away" and half >= 2.0**-149 else math.inf
    if rounding == "nearest_even" and is_gap:
        up_at = float(np.nextafter(np.float32(half), np.float32(np.inf)))
    if low < 2.0**-126 or magic >= 2.0**128 or (half >= 2.0**-149 and float(np.float32(half)) != half):
        return None
    # With no fraction bits both neighbours are odd, and ties go up (IEEE 754-2019, 4.3.1: the larger in magnitude).
    is_even = rounding == "nearest_even" and 0 < shift < 23
    bias = (1 << shift >> 1) - is_even if rounding in ("nearest_even", "nearest_away") else 0
    return CastPlan(
        shift=shift,
        round_bias=bias,
        odd_mask=int(is_even),
        keep_mask=0xFFFFFFFF << shift & 0xFFFFFFFF,
        low=low,
        magic=magic,
        spacing=smallest,
        up_at=up_at,
        down_below=0.0 if rounding == "toward_zero" else -math.inf,
        max=largest,
        zero=zero,
    )


def _is_served(x: Tensor, spec: QuantSpec, scale: Tensor | None) -> bool:
    """Whether the C++ kernel takes this cast."""
    if not is_readable(x) or cast_plan(spec.format, spec.rounding) is None:
        return False
    if scale is not None:
        if spec.scale is None or scale.dtype != torch.float32 or not scale.is_cpu or not scale.is_contiguous():
            return False
        (rows, columns), (m, k) = tile_shape(x.shape, spec.scale), matrix_shape(x.shape)
        if scale.numel() != -(-m // rows) * -(-k // columns):
            return False
    return cast_library() is not None


def _cast_to_grid(
    x: Tensor, scale: Tensor | None, spec_text: str, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    library, spec = cast_library(), QuantSpec.parse(spec_text)
    plan = cast_plan(spec.format, spec.rounding)
    assert library is not None
    assert plan is not None
    out = torch.empty(x.shape, dtype=torch.float32)
    m, k = matrix_shape(x.shape)
    rows, columns = tile_shape(x.shape, spec.scale or _WHOLE)
    if scale is None:
        m, k = 1, m * k
    draw = None
    if spec.rounding == "stochastic":
        check_counter(step, stream, offset)
        draw = random_plan(seed, step, stream, offset)
    beyond = library.lp_cast(
        plan,
        x.data_ptr(),
        DTYPES.index(x.dtype),
        out.data_ptr(),
        *(m, k),
        None if scale is None else scale.data_ptr(),
        *(rows, columns),
        draw,
        num_threads(x.numel()),
    )
    return out, torch.tensor(beyond != 0)


def _cast_to_grid_shape(
    x: Tensor, scale: Tensor | None, spec_text: str, seed: int, step: int, stream: int, offset: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((), dtype=torch.bool)


_WHOLE = ScaleSpec()
_OPS = Library("lp", "FRAGMENT")
_OPS.define(
    "cast_to_grid(Tensor x, Tensor? scale, str spec, int seed, int step, int stream, int offset) -> (Tensor, Tensor)"
)
_OPS.impl("cast_to_grid", _cast_to_grid, "CPU")
register_fake("lp::cast_to_grid", _cast_to_grid_shape, lib=_OPS)
