"""The casts, oracle and C++, against ml_dtypes and torch's own float8: every 16-bit input, and random fp32 patterns.

What overflows is Inf or NaN there and saturates here: the documented difference, and the only one.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.grid import fast_to_grid
from runtime.numerics import get_format, quantize
from runtime.numerics.specs import QuantSpec

LIBRARY = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "hfp8-143": ml_dtypes.float8_e4m3b11fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3-fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2-fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3-ieee": ml_dtypes.float8_e4m3,
    "1-3-4": ml_dtypes.float8_e3m4,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3-fnuz": torch.float8_e4m3fnuz,
    "e5m2-fnuz": torch.float8_e5m2fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def every_code(dtype: torch.dtype) -> Tensor:
    """All 2^16 values of a 16-bit dtype, NaN and Inf among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def patterns(count: int) -> Tensor:
    """Random fp32 patterns: every exponent, sign, NaN and Inf."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)


def in_range(count: int, name: str) -> Tensor:
    """Random fp32 within the binades of the format: patterns alone seldom hit the few that a small one has."""
    row, generator = get_format(name), torch.Generator().manual_seed(count)
    low, high = np.log2(row.tiny) - 2, np.log2(row.max) + 1
    size = torch.exp2(torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low)
    return (size * (1 - 2 * torch.randint(0, 2, (count,), generator=generator))).float()


def expected(x: Tensor, name: str) -> Tensor:
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(x.float().numpy().astype(LIBRARY[name]).astype(np.float32))
    return _saturated(x.float(), theirs, name)


def _saturated(x: Tensor, theirs: Tensor, name: str) -> Tensor:
    """Their result with our overflow, and our -0 where ml_dtypes has none (the row of the paper's 1-4-3 has)."""
    row = get_format(name)
    over = ~theirs.isfinite() & ~x.isnan()
    theirs = torch.where(over, torch.copysign(torch.tensor(row.max), x), theirs)
    theirs = torch.where(x.isnan(), x, theirs)
    zero = torch.copysign(theirs, x) if row.has_negative_zero else theirs + 0.0
    return torch.where(theirs == 0, zero, theirs)


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LIBRARY)
def test_every_16_bit_input_as_ml_dtypes(name: str, dtype: torch.dtype) -> None:
    x = every_code(dtype)
    want = expected(x, name)
    assert same(fast_to_grid(x, QuantSpec(name), None), want)
    assert same(quantize(x.float(), name), want)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_million_fp32_patterns_as_ml_dtypes(name: str) -> None:
    for x in (patterns(500_000), in_range(500_000, name)):
        assert same(fast_to_grid(x, QuantSpec(name), None), expected(x, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_ten_million_fp32_patterns_as_ml_dtypes(name: str) -> None:
    for x in (patterns(5_000_000), in_range(5_000_000, name)):
        want = expected(x, name)
        assert same(fast_to_grid(x, QuantSpec(name), None), want)
        assert same(quantize(x, name), want)


@pytest.mark.parametrize("name", TORCH)
def test_as_the_casts_of_torch(name: str) -> None:
    for x in (every_code(torch.bfloat16).float(), every_code(torch.float16).float(), patterns(300_000)):
        assert same(fast_to_grid(x, QuantSpec(name), None), _saturated(x, x.to(TORCH[name]).float(), name))
