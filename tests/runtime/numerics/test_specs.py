"""Specs: what prints parses back, and what does not parse says why."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError
from runtime.numerics.block_formats import BLOCK_FORMATS
from runtime.numerics.formats import FORMATS
from runtime.numerics.specs import (
    ALONG,
    GRANULARITIES,
    ROUNDINGS,
    SAWB_FORMATS,
    SCALE_RULES,
    AccumulateSpec,
    GemmSpec,
    LayerSpec,
    QuantSpec,
    ScaleSpec,
)

formats = st.sampled_from([*FORMATS, "1-6-9", "1-4-3:bias=11,top=none", "int5", "int8:range=full", "pow2:bits=5,max=0"])
blocks = st.tuples(st.integers(1, 256), st.integers(1, 256))
rules = st.sampled_from([rule for rule in SCALE_RULES if rule != "sawb"])
scales = st.one_of(
    st.builds(ScaleSpec, st.just("block"), rules, blocks),
    st.builds(ScaleSpec, st.sampled_from([g for g in GRANULARITIES if g != "block"]), rules),
)
blocks_of = st.builds(
    QuantSpec,
    st.sampled_from([*BLOCK_FORMATS, "mxfp4:scale=rceil"]),
    st.sampled_from(ROUNDINGS),
    st.none(),
    st.sampled_from([None, *ALONG]),
)
scalars = st.builds(QuantSpec, formats, st.sampled_from(ROUNDINGS), st.one_of(st.none(), scales))
of_few_levels = st.builds(
    QuantSpec, st.sampled_from(SAWB_FORMATS), st.sampled_from(ROUNDINGS), st.just(ScaleSpec("tensor", "sawb"))
)
ranges = st.builds(QuantSpec, st.sampled_from(["ptq2", "psq5", "bhq8"]), st.sampled_from(ROUNDINGS))
casts = st.one_of(scalars, scalars, blocks_of, of_few_levels, ranges)
accumulators = st.builds(
    AccumulateSpec,
    st.sampled_from(["fp32", "fp16", "dlfloat16", "1-6-9", "int32"]),
    st.one_of(st.none(), st.integers(1, 4096)),
)
gemms = st.builds(GemmSpec, casts, casts, accumulators, formats)
layers = st.builds(LayerSpec, gemms, gemms, gemms)


@settings(max_examples=200, deadline=None)
@given(scales, casts, gemms, layers)
def test_what_prints_parses_back(scale: ScaleSpec, cast: QuantSpec, gemm: GemmSpec, layer: LayerSpec) -> None:
    assert ScaleSpec.parse(str(scale)) == scale
    assert QuantSpec.parse(str(cast)) == cast
    assert GemmSpec.parse(str(gemm)) == gemm
    assert LayerSpec.parse(str(layer)) == layer


def test_the_written_form() -> None:
    cast = QuantSpec("e4m3", "nearest_even", ScaleSpec("block", "pow2", (1, 128)))
    assert str(cast) == "e4m3 nearest_even block[1,128]/pow2"
    assert str(GemmSpec(cast, QuantSpec("e5m2"), AccumulateSpec("dlfloat16", 64))) == (
        "e4m3 nearest_even block[1,128]/pow2 * e5m2 nearest_even -> dlfloat16/64 -> fp32"
    )


def test_a_bare_name_takes_the_rounding_of_its_row() -> None:
    assert QuantSpec.parse("dlfloat16").rounding == "nearest_away"
    assert QuantSpec.parse("e4m3").rounding == "nearest_even"


def test_only_a_block_format_has_blocks_and_it_has_no_other_scale() -> None:
    assert str(QuantSpec("mxfp8")) == "mxfp8 nearest_even"
    assert str(QuantSpec("nvfp4", along="column")) == "nvfp4 nearest_even column"
    assert (QuantSpec("nvfp4").has_scale, QuantSpec("mxfp4").has_scale) == (True, False)
    with pytest.raises(FormatError, match="makes its own scales"):
        QuantSpec("mxfp8", scale=ScaleSpec())
    with pytest.raises(FormatError, match="e4m3 has no blocks"):
        QuantSpec("e4m3", along="column")


def test_identity_is_fp32_without_a_scale() -> None:
    assert QuantSpec().is_identity
    assert LayerSpec().is_identity
    assert not QuantSpec("fp32", scale=ScaleSpec()).is_identity
    assert not GemmSpec(accumulator=AccumulateSpec("dlfloat16")).is_identity


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (QuantSpec.parse, "e4m4", '"e4m4" is not a number format'),
        (QuantSpec.parse, "e4m3 nearest_even block[0,3]/amax", "not a block of a scale"),
        (QuantSpec.parse, "e4m3 nearest_even block[-1,3]/amax", "not a block of a scale"),
        (QuantSpec.parse, "e4m3 nearest_even block[2]/amax", "not a block of a scale"),
        (QuantSpec.parse, "e4m3 nearest", '"nearest" is not a rounding'),
        (QuantSpec.parse, "e4m3 nearest_even rows/amax", '"rows" is not a scale granularity'),
        (QuantSpec.parse, "e4m3 nearest_even row/max", '"max" is not a scale rule'),
        (QuantSpec.parse, "e4m3 nearest_even row/amax more", "is not a cast"),
        (QuantSpec.parse, "mxfp8 nearest_even rows", '"rows" is not a way for blocks to lie'),
        (QuantSpec.parse, "mxfp8:scale=mean", "is not an option of mxfp8"),
        (GemmSpec.parse, "e4m3 * e4m3", "is not a GEMM"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(parse, text: str, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError) as caught:
        parse(text)
    assert said in str(caught.value)
