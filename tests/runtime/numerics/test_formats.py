"""Formats: facts derived from each row against ml_dtypes and the published tables; the embedding rule by force."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError, NotSupported
from runtime.numerics.casts import decode
from runtime.numerics.formats import FORMATS, FloatFormat, Format, IntFormat, embeds, get_format

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
    "1-4-3": ml_dtypes.float8_e4m3,
    "1-3-4": ml_dtypes.float8_e3m4,
}


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
        ("int8", 127, 1, 255),
        ("int2", 1, 1, 3),
        ("int32", 2**31 - 1, 1, 2**32 - 1),
    ],
)
def test_range_and_number_of_codes(name: str, largest: float, tiny: float, codes: int) -> None:
    row = get_format(name)
    assert (row.max, row.min, row.tiny, row.codes) == (largest, -largest, tiny, codes)


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.bits <= 16])
def test_codes_counts_the_finite_ones(name: str) -> None:
    row = get_format(name)
    values = decode(torch.arange(2**row.bits), row)
    unused = 1 if isinstance(row, IntFormat) else 0  # -2^(b-1), which a symmetric integer leaves out
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
        ("1-9-3", "2 to 8 exponent bits"),
        ("1-1-3", "2 to 8 exponent bits"),
        ("1-5-24", "0 to 23 mantissa bits"),
        ("1-5-0", "tell Inf from NaN"),
        ("1-4-3:bais=11", '"bais=11" is not a format option'),
        ("1-4-3:", "Got nothing"),
        ("1-4-3:top=inf", "ieee|nan|none|merged"),
        ("1-8-7:bias=200", "values that fp32 does not"),
        ("1-8-3:top=none", "values that fp32 does not"),
        ("int1024", "2 to 32 bits"),
        ("", "is not a number format"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        get_format(name)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "nf4", "pow2", "fp4-radix4", "e8m0", "uint8"])
def test_a_planned_format_is_refused_as_planned(name: str) -> None:
    with pytest.raises(NotSupported, match="planned and not in this version"):
        get_format(name)


def test_known_embeddings() -> None:
    yes = [
        ("e4m3", "bf16"),
        ("e5m2", "bf16"),
        ("hfp8-143", "bf16"),
        ("int4", "int8"),
        ("int8", "bf16"),
        ("e5m2", "fp16"),
    ]
    no = [
        ("dlfloat16", "fp16"),
        ("fp16", "bf16"),
        ("bf16", "fp16"),
        ("int16", "bf16"),
        ("e2m1", "int8"),
        ("int8", "e4m3"),
    ]
    assert [pair for pair in yes if not embeds(*pair)] == []
    assert [pair for pair in no if embeds(*pair)] == []
    assert all(embeds(row, "fp32") for row in FORMATS.values() if isinstance(row, FloatFormat))


small_floats = st.builds(
    lambda e, m, bias, top, low: FloatFormat("x", e, m, bias, top, low == 0, low == 2),
    st.integers(2, 4),
    st.integers(1, 4),
    st.integers(-4, 12),
    st.sampled_from(["ieee", "nan", "none", "merged"]),
    st.integers(0, 2),
)
small_ints = st.builds(lambda b, s, n: IntFormat("i", b, s, n), st.integers(2, 7), st.booleans(), st.booleans())
named = st.sampled_from([row for row in FORMATS.values() if row.bits <= 8])


@settings(max_examples=300, deadline=None)
@given(st.one_of(small_floats, small_ints, named), st.one_of(small_floats, small_ints, named))
def test_embeds_is_inclusion_of_the_sets_of_values(inner: Format, outer: Format) -> None:
    assert embeds(inner, outer) == (_values(inner) <= _values(outer))


def _values(row: Format) -> set[float]:
    if isinstance(row, IntFormat):
        return {float(n) for n in range(int(row.min), int(row.max) + 1)}
    values = decode(torch.arange(2**row.bits), row)
    return set(values[values.isfinite()].tolist())
