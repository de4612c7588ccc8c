"""Casts: against ml_dtypes code by code, exact rational arithmetic in every mode, and published values."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError
from runtime.numerics import FORMATS, decode, encode, get_format, quantize
from runtime.numerics.casts import to_grid
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.random import random_bits
from runtime.numerics.scaling import compute_scale
from runtime.numerics.specs import ROUNDINGS, QuantSpec, Rounding

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "hfp8-143": ml_dtypes.float8_e4m3b11fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3-fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2-fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3-ieee": ml_dtypes.float8_e4m3,
    "1-4-3": ml_dtypes.float8_e4m3,
    "1-3-4": ml_dtypes.float8_e3m4,
}
WRITTEN = [
    "int8:range=full",
    "uint5",
    "uint8:zero=64",
    "uint12:zero=3000",
    "pow2:bits=5,max=2",
    "dlfloat16:e0=zero",
    "1-6-9",
    "1-5-2:subnormals=no",
    "1-3-0:top=none",
    "1-2-3:bias=-3,top=nan",
    "int5",
]
NARROW = [name for name, row in FORMATS.items() if row.bits <= 16] + WRITTEN


@pytest.mark.parametrize("name", DTYPES)
def test_nearest_even_equals_ml_dtypes_in_range(name: str) -> None:
    """All 16-bit patterns as the top half of an fp32, with low halves that make ties, near-ties and neither."""
    row = get_format(name)
    high = np.arange(2**16, dtype=np.uint32) << 16
    x = np.concatenate([(high | low).view(np.float32) for low in (0, 1, 0x8000, 0xFFFF)])
    x = x[np.abs(x) <= row.max]
    with np.errstate(all="ignore"):
        expected = x.astype(DTYPES[name]).astype(np.float32)
    got = quantize(torch.from_numpy(x), name).numpy()
    if name == "hfp8-143":  # ml_dtypes has no -0 there
        expected = np.where(expected == 0, np.copysign(expected, x), expected)
    assert np.array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "hfp8-143"])
def test_codes_equal_those_of_ml_dtypes(name: str) -> None:
    row, dtype = get_format(name), DTYPES[name]
    width = np.uint16 if row.bits == 16 else np.uint8
    codes = np.arange(2**row.bits, dtype=width)
    expected = codes.view(dtype).astype(np.float32)
    got = decode(torch.from_numpy(codes.astype(np.int32)), name).numpy()
    assert np.array_equal(got, expected, equal_nan=True)
    real = ~np.isnan(expected)
    assert np.array_equal(encode(torch.from_numpy(expected[real]), name, overflow="ieee").numpy(), codes[real])


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3-fnuz", "e5m2-fnuz", "1-4-3", "fp16", "bf16"])
def test_overflow_ieee_equals_ml_dtypes_everywhere(name: str) -> None:
    x = np.array([464, 465, 480, 1e9, 240, 248, 61439, 61440, 65519, 65520, 3.4e38, np.inf, np.nan], np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(all="ignore"):
        expected = x.astype(DTYPES[name]).astype(np.float32)
    assert np.array_equal(quantize(torch.from_numpy(x), name, overflow="ieee").numpy(), expected, equal_nan=True)


VECTORS = [  # algorithm notes, 1.10: format, x, nearest_even, nearest_away, toward_zero (None: not given there)
    ("e4m3", 0.3, 0.3125, 0.3125, 0.28125),
    ("e4m3", 1.0625, 1.0, 1.125, 1.0),
    ("e4m3", 1.1875, 1.25, 1.25, 1.125),
    ("e4m3", 17.5, 18, 18, 16),
    ("e4m3", 19, 20, 20, 18),
    ("e4m3", 464, 448, 448, 448),
    ("e4m3", 465, 448, 448, 448),
    ("e4m3", 1000, 448, 448, 448),
    ("e4m3", 2.0**-10, 0, 2.0**-9, 0),
    ("e4m3", 1.5 * 2.0**-9, 2.0**-8, 2.0**-8, 2.0**-9),
    ("e5m2", 1.125, 1.0, 1.25, None),
    ("e5m2", 1.375, 1.5, None, None),
    ("e5m2", 61439, 57344, None, None),
    ("e5m2", 61440, 57344, None, None),
    ("e5m2", 65536, 57344, 57344, 57344),
    ("e5m2", 2.0**-17, 0, 2.0**-16, 0),
    ("hfp8-143", 1.0625, 1.0, 1.125, None),
    ("hfp8-143", 29, 28, 30, None),
    ("hfp8-143", 31, 30, 30, 30),
    ("hfp8-143", 40, 30, 30, 30),
    ("hfp8-143", 2.0**-14, 0, 2.0**-13, 0),
    ("hfp8-143", 1.5 * 2.0**-13, 2.0**-12, None, None),
    ("dlfloat16", 1.0, 1.0, 1.0, 1.0),
    ("dlfloat16", 1 + 2.0**-10, 1.0, 1.001953125, 1.0),
    ("dlfloat16", 0.1, 0.0999755859375, 0.0999755859375, 0.0999755859375),
    ("dlfloat16", math.pi, 3.140625, 3.140625, 3.140625),
    ("dlfloat16", 65504, 65536, 65536, 65472),
    ("dlfloat16", 1e30, 8573157376, 8573157376, 8573157376),
    ("dlfloat16", 2.0**33, 8573157376, 8573157376, 8573157376),
    # as IBM's converter has it: the code below the smallest value is that of 2^-31, and means 0
    ("dlfloat16", 2.0**-31, 0, 0, 0),
    ("dlfloat16", 2.4e-10, 0, 0, 0),
    ("dlfloat16", 3e-10, 0, 0, 0),
    ("dlfloat16", 2.0**-31 * (1 - 2.0**-11), 0, 0, 0),
    ("dlfloat16", 2.0**-31 * (1 + 2.0**-10), 0, 2.0**-31 * 513 / 512, 0),  # half a spacing below the smallest
    ("dlfloat16", 2.0**-31 * 513 / 512, *[2.0**-31 * 513 / 512] * 3),
    ("dlfloat16", 2.0**-32, 0, 0, 0),
    ("dlfloat16:e0=zero", 2.0**-31, 0, 2.0**-30, 0),
]


@pytest.mark.parametrize(("name", "x", "even", "away", "zero"), VECTORS)
def test_published_values(name: str, x: float, even: float, away: float | None, zero: float | None) -> None:
    modes: tuple[Rounding, ...] = ("nearest_even", "nearest_away", "toward_zero")
    for mode, expected in zip(modes, (even, away, zero)):
        if expected is not None:
            assert quantize(torch.tensor([x, -x], dtype=torch.float32), name, mode).tolist() == [expected, -expected]


def test_next_to_the_tie_below_a_smallest_value_that_is_no_power_of_two() -> None:
    """In float64, one step to either side of it."""
    tiny, tie = 2.0**-31 * 513 / 512, 2.0**-31 * (1 + 2.0**-10)
    x = [math.nextafter(tie, 0), tie, math.nextafter(tie, 1)]
    got = {m: quantize(torch.tensor(x, dtype=torch.float64), "dlfloat16", m).tolist() for m in ROUNDINGS[:2]}
    assert got == {"nearest_even": [0, 0, tiny], "nearest_away": [0, tiny, tiny]}


def test_dlfloat_codes_and_its_own_rounding() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-10, -(1 + 2.0**-10), 0.1, math.pi, 65504, 1e30, 2.0**33, 2.0**-31, 2.0**-32])
    codes = [0x3E00, 0x3E01, 0xBE01, 0x3733, 0x4124, 0x5E00, 0x7FFE, 0x7FFE, 0x0000, 0x0000]
    assert encode(x, "dlfloat16").tolist() == codes
    assert encode(torch.tensor([math.inf, math.nan]), "dlfloat16", overflow="ieee").tolist() == [0x7FFF, 0x7FFF]


@pytest.mark.parametrize("name", NARROW)
def test_every_code_survives_decode_and_encode(name: str) -> None:
    row = get_format(name)
    codes = torch.arange(2**row.bits)
    values = decode(codes, name)
    used = values.isfinite() & (values.abs() <= row.max)
    if isinstance(row, FloatFormat) and not row.subnormals and not row.zero_exponent_is_normal:
        used &= (values != 0) | (codes & (2 ** (row.bits - 1) - 1) == 0)
    back = encode(values[used], name)
    assert back.dtype == (torch.uint8 if row.bits <= 8 else torch.int32)
    assert torch.equal(back.long(), codes[used])
    grid = values[used][:: max(1, 2 ** (row.bits - 13))]
    for mode in (mode for mode in ROUNDINGS if (name, mode) != ("int1", "toward_zero")):  # what is on the grid stays
        assert torch.equal(quantize(grid, name, mode), grid)


@settings(max_examples=400, deadline=None)
@example("dlfloat16", "nearest_even", 0.0, 0, 0.75)
@example("dlfloat16", "nearest_away", 0.0, 0, 0.9995)
@given(
    st.sampled_from([*FORMATS, *WRITTEN]),
    st.sampled_from(ROUNDINGS),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.integers(0, 2**32),
    st.floats(-1, 1),
)
def test_every_mode_equals_exact_arithmetic(name: str, mode: Rounding, wild: float, seed: int, near: float) -> None:
    row = get_format(name)
    pattern = wild if seed % 2 else near * row.tiny * 2.0 ** (seed % 40)
    if (name, mode) == ("int1", "toward_zero"):
        return
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([pattern], dtype=dtype)
        word = int(random_bits(1, seed=seed))
        expected = _exactly(Fraction(x.item()), row, mode, Fraction(word, 2**32))
        if mode == "stochastic" and isinstance(row, LookupFormat) and dtype == torch.float64:
            continue  # the quotient is rounded
        if isinstance(row, IntFormat) and row.bits > 24 and dtype == torch.float32 and abs(expected) > 2**24:
            continue  # saturates to the largest fp32 below the largest integer
        assert Fraction(quantize(x, name, mode, seed=seed).item()) == expected


def _exactly(x: Fraction, row: Format, mode: Rounding, u: Fraction) -> Fraction:
    """The oracle's oracle: one number, no floating point."""
    if isinstance(row, LookupFormat):
        return _exactly_in_table(x, row, mode, u)
    a, spacing, half = abs(x), Fraction(1), Fraction(1, 2)
    if isinstance(row, FloatFormat):
        k = row.emin
        while a >= Fraction(2) ** (k + 1):
            k += 1
        spacing = Fraction(2) ** (k - row.mantissa)
        if not row.subnormals and a < Fraction(row.tiny):
            spacing = Fraction(row.tiny)
            if row.zero_exponent_is_normal:  # the code before the smallest value, of 2^emin, is that of 0
                half = 1 - Fraction(2) ** (row.emin - row.mantissa) / 2 / spacing
    t = a / spacing
    below, rest = math.floor(t), t - math.floor(t)
    up = {
        "nearest_even": rest > half or (rest == half and below % 2 == 1),
        "nearest_away": rest >= half,
        "toward_zero": False,
        "stochastic": rest + u >= 1,
    }[mode]
    q = (below + up) * spacing
    return min(max(-q if x < 0 else q, Fraction(row.min)), Fraction(row.max))


def _exactly_in_table(x: Fraction, row: LookupFormat, mode: Rounding, u: Fraction) -> Fraction:
    table = sorted({Fraction(value) for value in row.values if math.isfinite(value)})
    x = min(max(x, table[0]), table[-1])
    if x in table:
        return x
    above = min(value for value in table if value > x)
    below = max(value for value in table if value < x)
    near, far = (above, below) if above <= 0 else (below, above)
    share = (x - near) / (far - near)
    half = Fraction(1, 2)
    is_far = {
        "nearest_even": share > half or (share == half and near != 0),
        "nearest_away": share >= half,
        "toward_zero": False,
        "stochastic": share + u >= 1,
    }[mode]
    return far if is_far else near


@pytest.mark.parametrize(("name", "x", "low", "high"), [
    ("e4m3", 0.3, 0.28125, 0.3125),
    ("e4m3", -17.5, -16.0, -18.0),
    ("e4m3", 0.7 * 2.0**-9, 0.0, 2.0**-9),
    ("dlfloat16", 2.0**-33, 0.0, 2.0**-31 * 513 / 512),
    ("int4", 2.125, 2.0, 3.0),
])  # fmt: skip
def test_stochastic_gives_the_two_neighbours_with_the_right_odds(name: str, x: float, low: float, high: float) -> None:
    draws = 100_000
    got = quantize(torch.full((draws,), x), name, "stochastic", seed=7)
    assert set(got.tolist()) == {low, high}
    share = (float(np.float32(x)) - low) / (high - low)
    assert abs((got == high).double().mean().item() - share) < 5 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("offset", [0, 1, 4, 777])
def test_a_slice_with_its_offset_gets_the_bits_of_its_base(offset: int) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    base = quantize(x, "e4m3", "stochastic", seed=5, step=9, stream=2)
    part = quantize(x[offset : offset + 500], "e4m3", "stochastic", seed=5, step=9, stream=2, offset=offset)
    assert torch.equal(part, base[offset : offset + 500])
    assert not torch.equal(base, quantize(x, "e4m3", "stochastic", seed=5, step=10, stream=2))


def test_special_values() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, -1e-30])
    got = quantize(x, "e4m3")
    assert got[:2].tolist() == [448, -448]
    assert math.isnan(got[2])
    assert torch.signbit(got[3:]).tolist() == [True, False, True]
    assert quantize(x, "fp32")[0].item() == torch.finfo(torch.float32).max
    assert not bool(torch.signbit(quantize(x[3:], "int8")).any())
    assert quantize(x[:2], "e2m1", overflow="ieee").tolist() == [6, -6]  # no code for Inf or NaN
    assert encode(torch.tensor([math.nan, -math.nan]), "e4m3").tolist() == [0x7F, 0xFF]
    for name in ("e2m1", "int8"):
        with pytest.raises(FormatError, match="no code for NaN"):
            encode(x, name)


def test_integers_that_are_not_symmetric() -> None:
    x = torch.tensor([-200.0, -128.4, -3.5, 2.5, 127.6, 300.0])
    assert quantize(x, IntFormat("i8", 8, narrow=False)).tolist() == [-128, -128, -4, 2, 127, 127]
    assert quantize(x, IntFormat("u8", 8, signed=False)).tolist() == [0, 0, 0, 2, 128, 255]
    assert encode(x, IntFormat("i8", 8, narrow=False)).tolist() == [0x80, 0x80, 0xFC, 2, 127, 127]
    assert decode(encode(x, "int8"), "int8").tolist() == [-127, -127, -4, 2, 127, 127]
    assert quantize(torch.tensor([1e20, -1e20]), "int32").tolist() == [2**31 - 128, -(2**31) + 128]


def test_affine_int8_of_a_range() -> None:
    """The worked example of the algorithm notes, A5: [-1, 3] has zero point 64, and both ends move to the grid."""
    scale, name = 4 / 255, "uint8:zero=64"
    x = torch.tensor([-1.0, -0.3, 0.0, 0.2, 1.5, 2.9])
    assert encode(x, name, scale=scale).tolist() == [0, 45, 64, 77, 160, 249]
    expected = torch.tensor([-1.003922, -0.298039, 0.0, 0.203922, 1.505882, 2.901961])
    assert torch.allclose(quantize(x, name, scale=scale), expected, atol=1e-6)
    assert torch.equal(decode(encode(x, name, scale=scale), name) * torch.tensor(scale), quantize(x, name, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_scale_divides_and_multiplies_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(5)) + 0.1
    working = torch.float64 if dtype == torch.float64 else torch.float32
    grid = quantize(x.to(working) / scale.to(working), "e4m3")
    got = quantize(x, "e4m3", scale=scale)
    assert got.dtype == dtype
    assert torch.equal(got, (grid * scale.to(working)).to(dtype))
    assert torch.equal(quantize(x, "e4m3", scale=0.3), quantize(x, "e4m3", scale=torch.tensor(0.3, dtype=working)))


@pytest.mark.parametrize("granularity", ["tensor", "row", "column", "block[3,5]"])
def test_to_grid_leaves_the_scale_out(granularity: str) -> None:
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(6))
    spec = QuantSpec.parse(f"e4m3 nearest_even {granularity}/amax")
    scale = compute_scale(x, spec)
    assert scale is not None
    grid = to_grid(x, spec, scale)
    assert grid.dtype == torch.float32
    assert grid.abs().max().item() == 448
    assert torch.equal(quantize(grid, "e4m3"), grid)
    assert to_grid(x.double(), spec, scale).dtype == torch.float64


def test_the_identity_spec_returns_its_argument() -> None:
    x = torch.tensor([math.inf, 1.0], dtype=torch.bfloat16)
    assert to_grid(x, QuantSpec(), None) is x


def test_shapes_of_no_dims_and_no_elements_and_strides() -> None:
    assert quantize(torch.tensor(0.3), "e4m3").item() == 0.3125
    assert quantize(torch.empty(0, 3), "e4m3", "stochastic").shape == (0, 3)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(quantize(x.t(), "e4m3"), quantize(x, "e4m3").t())
    flat = quantize(x.t().contiguous(), "e4m3", "stochastic", seed=1)
    assert torch.equal(quantize(x.t(), "e4m3", "stochastic", seed=1), flat)


def test_no_gradient_passes() -> None:
    assert not quantize(torch.ones(3, requires_grad=True), "e4m3").requires_grad


def test_wrong_arguments_say_so() -> None:
    x = torch.ones(3)
    for scale in (0.0, -1.0, math.inf, math.nan, torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(FormatError, match="0 < scale < Inf"):
            quantize(x, "e4m3", scale=scale)
    for wrong in (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.complex64)):
        with pytest.raises(FormatError, match="floating-point"):
            quantize(wrong, "e4m3")
    with pytest.raises(FormatError, match='"nearest" is not a rounding'):
        quantize(x, "e4m3", "nearest")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="overflow rule"):
        quantize(x, "e4m3", overflow="wrap")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=r"0 <= code < 2\^8"):
        decode(torch.tensor([256]), "e4m3")


@pytest.mark.parametrize(
    ("name", "top"), [("fp16", math.inf), ("e5m2", math.inf), ("e4m3", math.nan), ("e4m3-fnuz", math.nan)]
)
def test_toward_zero_only_the_infinite_overflows(name: str, top: float) -> None:
    """IEEE 754-2019, 7.4: roundTowardZero carries every overflow to the largest finite value; Inf is none."""
    largest = get_format(name).max
    x = torch.tensor([1e6, -1e6, largest, math.inf, -math.inf, math.nan])
    found = quantize(x, name, "toward_zero", overflow="ieee")
    assert found[:3].tolist() == [largest, -largest, largest]
    assert str(found[3:].abs().tolist()) == str([top, top, math.nan])
    assert torch.equal(decode(encode(x[:3], name, "toward_zero", overflow="ieee"), name), found[:3])
