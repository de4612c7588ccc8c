"""Specs: what prints parses back, and what does not parse says why."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import FormatError
from runtime.numerics.formats import FORMATS
from runtime.numerics.specs import GRANULARITIES, ROUNDINGS, SCALE_RULES, GemmSpec, LayerSpec, QuantSpec, ScaleSpec

formats = st.sampled_from([*FORMATS, "1-6-9", "1-4-3:bias=11,top=none", "int5", "int8:range=full", "pow2:bits=5,max=0"])
blocks = st.tuples(st.integers(1, 256), st.integers(1, 256))
scales = st.one_of(
    st.builds(ScaleSpec, st.just("block"), st.sampled_from(SCALE_RULES), blocks),
    st.builds(ScaleSpec, st.sampled_from([g for g in GRANULARITIES if g != "block"]), st.sampled_from(SCALE_RULES)),
)
casts = st.builds(QuantSpec, formats, st.sampled_from(ROUNDINGS), st.one_of(st.none(), scales))
gemms = st.builds(GemmSpec, casts, casts, formats, st.one_of(st.none(), st.integers(1, 4096)), formats)
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
    assert str(GemmSpec(cast, QuantSpec("e5m2"), "dlfloat16", 64)) == (
        "e4m3 nearest_even block[1,128]/pow2 * e5m2 nearest_even -> dlfloat16/64 -> fp32"
    )


def test_a_bare_name_takes_the_rounding_of_its_row() -> None:
    assert QuantSpec.parse("dlfloat16").rounding == "nearest_away"
    assert QuantSpec.parse("e4m3").rounding == "nearest_even"


def test_identity_is_fp32_without_a_scale() -> None:
    assert QuantSpec().is_identity
    assert LayerSpec().is_identity
    assert not QuantSpec("fp32", scale=ScaleSpec()).is_identity
    assert not GemmSpec(accumulate="dlfloat16").is_identity


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (QuantSpec.parse, "e4m4", '"e4m4" is not a number format'),
        (QuantSpec.parse, "e4m3 nearest", '"nearest" is not a rounding'),
        (QuantSpec.parse, "e4m3 nearest_even rows/amax", '"rows" is not a scale granularity'),
        (QuantSpec.parse, "e4m3 nearest_even row/max", '"max" is not a scale rule'),
        (QuantSpec.parse, "e4m3 nearest_even row/amax more", "is not a cast"),
        (GemmSpec.parse, "e4m3 * e4m3", "is not a GEMM"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(parse, text: str, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FormatError) as caught:
        parse(text)
    assert said in str(caught.value)
