"""Wide lanes are the reference, bit for bit: every rounding of every accumulator, and integers."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.kernels.cpu import accumulate_wide
from runtime.kernels.cpu.accumulate_wide import declines, multiply, wide_library
from runtime.numerics import get_format, quantize
from runtime.numerics import reference_gemm as reference
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import PRODUCTS, ROUNDINGS, AccumulateModel, AccumulateSpec, GemmSpec, QuantSpec, Rounding

pytestmark = pytest.mark.skipif(wide_library() is None, reason="needs a C++ compiler")

ONE_BY_ONE: tuple[AccumulateModel, ...] = ("per_mac", "per_chunk")
ACCUMULATORS = ["fp32", "1-8-22", "1-5-16", "bf16", "dlfloat16", "1-8-2", "1-6-9:top=fnuz", "1-6-9:subnormals=no"]
KEY = RandomKey(2**40 + 5, 3, (7 << 33) + 11)


def _check(a: Tensor, b: Tensor, spec: GemmSpec) -> None:
    assert declines(spec) is None
    found, expected = multiply(a, b, spec, KEY), reference.multiply(a, b, spec, KEY)
    assert torch.equal(found.isnan(), expected.isnan()), spec
    is_number = ~expected.isnan()
    assert torch.equal(found[is_number].view(torch.int32), expected[is_number].view(torch.int32)), spec


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_equals_the_reference(mode: Rounding, accumulate: str) -> None:
    """K crosses groups of eight draws and chunks, N panels; NaN, Inf times 0, products below 2^-149 and past fp32."""
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=generator) for shape in ((3, 20), (20, 37)))
    wild = a * torch.exp2(torch.randint(-140, 120, a.shape, generator=generator).float())
    wild[0, 3], wild[1, 5], b[5, 3] = float("nan"), float("inf"), 0
    for product, model in itertools.product(PRODUCTS, ONE_BY_ONE):
        how = AccumulateSpec(accumulate, 7, mode, product, model)
        for left in (wild, a * 2.0**-16, a * 2.0**62):
            _check(left, b, GemmSpec(accumulator=how))
        _check(quantize(a, "e4m3"), quantize(b, "e5m2"), GemmSpec(QuantSpec("e4m3"), QuantSpec("e5m2"), how))


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
@pytest.mark.parametrize(
    ("name", "num_k"), [("int8", 300), ("int8", 1), ("int4", 77), ("uint8", 90), ("int8:range=full", 50)]
)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_sums_that_cannot_leave_the_accumulator_take_no_lane(
    batch: tuple[int, ...], name: str, num_k: int, overflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the int8 unit or float64, to the bit, past 2^24 too, where the result is rounded to fp32."""
    row, generator = get_format(name), torch.Generator().manual_seed(num_k)
    low, high = int(row.min), int(row.max)
    a = torch.randint(low, high + 1, (*batch, 9, num_k), generator=generator).float()
    b = torch.randint(low, high + 1, (num_k, 35), generator=generator).float()
    a[..., 0, :], b[:, 0], a[..., 1, 0] = high, high, float("nan")
    monkeypatch.setattr(accumulate_wide, "_multiply", None)
    how = AccumulateSpec("int32", overflow=overflow)  # type: ignore[arg-type]
    _check(a, b, GemmSpec(QuantSpec(name), QuantSpec(name), how))
    with pytest.raises(TypeError):  # int16 can be left, and goes addition by addition
        _check(a, b, GemmSpec(QuantSpec(name), QuantSpec(name), AccumulateSpec("int8")))


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_integers_equal_the_reference(bits: int, overflow: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    a, b = (torch.randint(-127, 128, shape, generator=generator).float() for shape in ((2, 3, 50), (50, 36)))
    a[1, 0, 3] = float("nan")
    for product, model, chunk in itertools.product(PRODUCTS, ONE_BY_ONE, (None, 16)):
        how = AccumulateSpec(f"int{bits}", chunk, None, product, model, overflow)  # type: ignore[arg-type]
        _check(a.mT.contiguous().mT, b, GemmSpec(QuantSpec("int8"), QuantSpec("int8"), how))
