"""Formats: facts derived from each row against ml_dtypes and the published tables; the embedding rule by force."""

import math
from itertools import pairwise
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError, NotSupported
from runtime.numerics import decode
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.embedding import embeds, finite_values, has_value
from runtime.numerics.format_kinds import FloatFormat, Format, IntFormat, LookupFormat
from runtime.numerics.formats import FORMATS, get_format
from runtime.numerics.specs import QuantSpec

DTYPES = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "fp8-152": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3-fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2-fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3-ieee": ml_dtypes.float8_e4m3,
    "1-4-3": ml_dtypes.float8_e4m3,
    "1-3-4": ml_dtypes.float8_e3m4,
}
SMALL = [name for name, row in FORMATS.items() if row.bits <= 8]
SMALL += [
    "int8:range=full",
    "uint2",
    "uint4:zero=5",
    "uint1",
    "pow2:bits=5",
    "pow2:max=7",
    "1-3-0:top=none",
    "1-4-3:subnormals=no",
]


@pytest.mark.parametrize("name", DTYPES)
def test_derived_facts_equal_those_of_ml_dtypes(name: str) -> None:
    row, facts = get_format(name), ml_dtypes.finfo(DTYPES[name])
    assert isinstance(row, FloatFormat)
    assert row.max == float(facts.max)
    assert row.tiny == float(facts.smallest_subnormal)
    assert row.min_normal == float(facts.smallest_normal)
    assert (row.bits, row.ulp_at_one) == (facts.bits, float(facts.eps))


@pytest.mark.parametrize(
    ("name", "largest", "tiny", "codes"),
    [
        ("fp32", 3.4028234663852886e38, 2.0**-149, 2**32 - 2**24),
        ("fp16", 65504, 2.0**-24, 63488),
        ("bf16", 3.3895313892515355e38, 2.0**-133, 65280),
        ("dlfloat16", 8573157376, 2.0**-31 * 513 / 512, 65534),
        ("e4m3", 448, 2.0**-9, 254),
        ("e5m2", 57344, 2.0**-16, 248),
        ("fp8-152", 57344, 2.0**-16, 248),
        ("hfp8-143", 30, 2.0**-13, 256),
        ("1-4-3:bias=11,top=nan", 28, 2.0**-13, 254),
        ("1-4-3", 240, 2.0**-9, 240),
        ("1-4-3:subnormals=no", 240, 2.0**-6, 240 - 14),
        ("e2m1", 6, 0.5, 16),
        ("e3m2", 28, 0.0625, 64),
        ("e2m3", 7.5, 0.125, 64),
        ("e4m3-fnuz", 240, 2.0**-10, 255),
        ("e5m2-fnuz", 57344, 2.0**-17, 255),
        ("e4m3-ieee", 240, 2.0**-9, 240),
        ("fp4-radix4", 64, 2.0**-6, 16),
        ("pow2", 8, 2.0**-3, 16),
        ("pow2:bits=5,max=0", 1, 2.0**-14, 32),
        ("nf4", 1, 0.07958029955625534, 16),
        ("int1", 1, 1, 2),
        ("ternary", 1, 1, 3),
        ("dlfloat16:e0=zero", 8573157376, 2.0**-30, 65534 - 1022),
        ("int8", 127, 1, 255),
        ("int2", 1, 1, 3),
        ("int32", 2**31 - 1, 1, 2**32 - 1),
    ],
)
def test_range_and_number_of_codes(name: str, largest: float, tiny: float, codes: int) -> None:
    row = get_format(name)
    assert (row.max, row.min, row.tiny, row.codes) == (largest, -largest, tiny, codes)


def test_ranges_that_are_not_symmetric() -> None:
    rows = [get_format(name) for name in ("e8m0", "uint8", "uint4", "uint1", "int8:range=full", "int4:range=narrow")]
    assert [(row.min, row.max, row.codes, row.signed) for row in rows] == [
        (2.0**-127, 2.0**127, 255, False),
        (0, 255, 256, False),
        (0, 15, 16, False),
        (0, 1, 2, False),
        (-128, 127, 256, True),
        (-7, 7, 15, True),
    ]


def test_nf4_is_quantiles_of_a_normal_distribution() -> None:
    """The published construction; the offset is rounded to 7 digits, so the last digits of fp32 differ."""
    ppf, o = NormalDist().inv_cdf, 0.9677083
    above = [ppf(o + (0.5 - o) * i / 8) for i in range(8)]
    below = [-ppf(o + (0.5 - o) * i / 7) for i in range(7)]
    expected = np.array(sorted([*above, 0.0, *below])) / above[0]
    assert np.abs(np.array(get_format("nf4").grid) - expected).max() < 2e-7  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.bits <= 16])
def test_codes_counts_the_finite_ones(name: str) -> None:
    row = get_format(name)
    values = decode(torch.arange(2**row.bits), row)
    unused = 1 if isinstance(row, IntFormat) and row.signed else 0  # -2^(b-1), which a symmetric integer leaves out
    assert int(values.isfinite().sum()) - unused == row.codes


def test_a_written_float_is_ieee_like_and_has_options() -> None:
    plain = get_format("1-6-9")
    assert (plain.rounding, plain.max) == ("nearest_even", (2 - 2.0**-9) * 2.0**31)
    shifted = get_format("1-4-3:bias=11,top=none,subnormals=yes")
    assert [shifted.max, shifted.tiny] == [get_format("hfp8-143").max, get_format("hfp8-143").tiny]
    assert get_format("1-6-9:bias=30").max == 2 * plain.max
    assert get_format("dlfloat16").rounding == "nearest_away"
    assert get_format("int5").max == 15


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("e4m4", 'Try "e4m3"?'),
        ("mxfp5", 'Try "mxfp'),
        ("1-9-30", "this version has. Expected 2 to 8 exponent bits and 0 to 23 mantissa bits"),
        ("1-9-30", 'Got 9 and 30. Try "1-8-23"? It is the nearest.'),
        ("1-9-3", 'Got 9 and 3. Try "1-8-3"? It is the nearest.'),
        ("1-1-3", "2 to 8 exponent bits"),
        ("1-5-24", "0 to 23 mantissa bits"),
        ("1-5-0", "tell Inf from NaN"),
        ("1-4-3:bais=11", '"bais=11" is not a format option'),
        ("1-4-3:", "Got nothing"),
        ("1-4-3:top=inf", "ieee|nan|none|merged"),
        ("1-8-7:bias=200", "values that fp32 does not"),
        ("1-8-3:top=none", "values that fp32 does not"),
        ("int1024", "2 to 32 bits"),
        ("uint33", "1 to 32 bits"),
        ("int8:range=wide", '"range=wide" is not a format option. Expected range=full or range=narrow'),
        ("int1:range=full", "no range to choose"),
        ("uint8:range=full", "Expected zero=CODE"),
        ("uint8:zero=255", "0 <= zero < 2^bits - 1"),
        ("int8:zero=3", "Expected range=full or range=narrow"),
        ("pow2:bits=2", "bits=3 to 9 or max=INTEGER"),
        ("pow2:max=128", "values that fp32 does not"),
        ("dlfloat16:e0=none", "e0=normal or e0=zero"),
        ("1-3-0", "or top=none, pow2"),
        ("e4m3:top=ieee", "is not a number format"),
        ("", "is not a number format"),
        ("1-4-3:bias=11,bias=12", "an option stands twice"),
        ("dlfloat16:e0=zero,e0=normal", "an option stands twice"),
        ("1-04-03", "is not a number format"),
        ("1-\u0664-3", "is not a number format"),
        ("int\uff11\uff16", "is not a number format"),
        ("int08", "is not a number format"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        get_format(name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "mxfp4:scale=rceil"])
def test_a_block_format_is_an_operand_and_has_no_row_of_its_own(name: str) -> None:
    assert QuantSpec(format=name).is_block
    with pytest.raises(NotSupported, match=r"a block format: it is for the operands of a GEMM and for quantize\(\)"):
        get_format(name)


def test_a_minus_zero_does_not_make_an_embedding_fail() -> None:
    radix4 = get_format("fp4-radix4")
    assert isinstance(radix4, LookupFormat)
    without = LookupFormat("radix 4 without -0", (*radix4.grid, math.nan))
    assert (radix4.codes, without.codes) == (16, 15)
    assert embeds(radix4, without)
    assert embeds(without, radix4)


def test_known_embeddings() -> None:
    yes = [
        ("e4m3", "bf16"),
        ("e5m2", "bf16"),
        ("hfp8-143", "bf16"),
        ("int4", "int8"),
        ("int8", "bf16"),
        ("e5m2", "fp16"),
        ("fp4-radix4", "e5m2"),
        ("fp4-radix4", "e4m3"),
        ("pow2", "e4m3"),
        ("ternary", "int2"),
        ("int1", "ternary"),
        ("int8", "int8:range=full"),
        ("dlfloat16:e0=zero", "dlfloat16"),
        ("e8m0", "fp32"),
        ("nf4", "fp32"),
    ]
    no = [
        ("dlfloat16", "fp16"),
        ("fp16", "bf16"),
        ("bf16", "fp16"),
        ("int16", "bf16"),
        ("e2m1", "int8"),
        ("int8", "e4m3"),
        ("fp4-radix4", "pow2"),
        ("e8m0", "1-8-7:subnormals=no"),
        ("int8:range=full", "int8"),
        ("uint8", "int8"),
        ("dlfloat16", "dlfloat16:e0=zero"),
        ("nf4", "bf16"),
    ]
    assert [pair for pair in yes if not embeds(*pair)] == []
    assert [pair for pair in no if embeds(*pair)] == []
    assert all(embeds(row, "fp32") for row in FORMATS.values() if not isinstance(row, IntFormat))


small_floats = st.builds(
    lambda e, m, bias, top, low: FloatFormat("x", e, m, bias, top, low == 0, low == 2),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(-4, 12),
    st.sampled_from(["ieee", "nan", "none", "merged", "fnuz"]),
    st.integers(0, 2),
)
powers = st.builds(
    lambda e, bias, top: FloatFormat("p", e, 0, bias, top, False),
    st.integers(2, 4),
    st.integers(-4, 12),
    st.sampled_from(["nan", "none", "fnuz"]),
)
tables = st.builds(
    lambda numbers: LookupFormat("t", tuple(n / 8 for n in numbers)),
    st.lists(st.integers(-64, 64), min_size=8, max_size=8, unique=True).filter(lambda n: max(n) > 0),
)
small_ints = st.builds(lambda b, s, n: IntFormat("i", b, s, n), st.integers(2, 7), st.booleans(), st.booleans())
named = st.sampled_from([row for row in FORMATS.values() if row.bits <= 8])


@settings(max_examples=300, deadline=None)
@given(*[st.one_of(small_floats, powers, small_ints, tables, named)] * 2)
def test_embeds_is_inclusion_of_the_sets_of_values(inner: Format, outer: Format) -> None:
    assert embeds(inner, outer) == (_values(inner) <= _values(outer))


@pytest.mark.parametrize("outer", SMALL)
def test_embeds_is_inclusion_for_every_pair_of_rows_of_up_to_8_bits(outer: str) -> None:
    values = _values(get_format(outer))
    assert [inner for inner in SMALL if embeds(inner, outer) != (_values(get_format(inner)) <= values)] == []


@pytest.mark.parametrize("name", [*SMALL, "fp16", "bf16", "dlfloat16"])
def test_lists_its_values_and_knows_them(name: str) -> None:
    row = get_format(name)
    values = finite_values(row)
    assert list(values) == sorted(_values(row))
    assert all(has_value(row, value) for value in values)
    between = [(a + b) / 2 for a, b in pairwise(values)]
    assert not any(has_value(row, value) for value in between)
    assert not has_value(row, 2 * row.max + 1)


def _values(row: Format) -> set[float]:
    if isinstance(row, IntFormat):
        return {float(n) for n in range(int(row.min), int(row.max) + 1)}
    values = decode(torch.arange(2**row.bits), row)
    return set(values[values.isfinite()].tolist())


def test_binary_is_int1() -> None:
    assert get_format("binary") is get_format("int1")
