"""Block formats: published blocks and scale exponents, exact arithmetic, and what holds for every block."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.errors import FormatError, NotSupported
from runtime.numerics import decode, encode, get_format, quantize
from runtime.numerics.block_casts import BlockCodes, decode_blocks, encode_blocks, quantize_blocks
from runtime.numerics.block_formats import BLOCK_FORMATS, get_block_format

RULES = ("floor", "ceil", "rceil", "even")
MX = [name for name in BLOCK_FORMATS if not name.startswith("nvfp4")]
ALL = [*(f"{name}:scale={rule}" for name in MX for rule in RULES), "nvfp4"]


def block(*values: float, size: int = 32) -> Tensor:
    return torch.tensor([*values, *[0.0] * (size - len(values))])


def decoded(coded: BlockCodes, name: str) -> Tensor:
    return decode_blocks(coded.codes, coded.scales, name, coded.tensor_scale)


def test_rows_are_what_their_sources_say() -> None:
    assert [row.bits_per_value for row in BLOCK_FORMATS.values()] == [8.25, 8.25, 6.25, 6.25, 4.25, 8.25, 4.5, 4.03125]
    assert [row.element_max for row in BLOCK_FORMATS.values()] == [448, 57344, 7.5, 28, 6, 127 / 64, 6, 6]


@pytest.mark.parametrize(
    ("name", "log2_scale", "values"),
    [
        ("mxfp4", -1, [1, 0, 0, 3]),
        ("mxfp4:scale=floor", -1, [1, 0, 0, 3]),
        ("mxfp4:scale=rceil", 0, [1, 0, 0, 4]),
        ("mxfp6", -1, [0.875, -0.125, 0, 3.5]),
        ("mxfp6-e3m2", -3, [0.875, -0.09375, 0.0234375, 3.5]),
        ("mxfp8", -7, [0.875, -0.1015625, 0.01953125, 3.5]),
        ("mxfp8-e5m2", -14, [0.875, -0.09375, 0.01953125, 3.5]),
        ("mxint8", 1, [0.90625, -0.09375, 0.03125, 3.5]),
    ],
)
def test_published_block(name: str, log2_scale: int, values: list[float]) -> None:
    x = block(0.9, -0.1, 0.02, 3.5)
    assert quantize(x, name).tolist() == block(*values).tolist()
    assert encode_blocks(x, name).scales.tolist() == [127 + log2_scale]


def test_published_codes_of_mxint8() -> None:
    codes = encode_blocks(block(0.9, -0.1, 0.02, 3.5), "mxint8").codes[:4]
    assert codes.view(torch.int8).tolist() == [29, -3, 1, 112]


def test_published_blocks_of_nvfp4() -> None:
    x = torch.cat([block(0.9, -0.1, 0.02, 3.5, size=16), block(0.05, 0.01, -0.03, 0.002, size=16)])
    coded = encode_blocks(x, "nvfp4")
    assert decode(coded.scales, "e4m3").tolist() == [448, 6.5]
    assert decode(coded.codes[:4], "e2m1").tolist() == [1.5, 0, 0, 6]
    got = quantize(x, "nvfp4")
    expected = [0.875, 0, 0, 3.5, 0.05078125, 0.00846354, -0.03385417, 0]
    assert got[[0, 1, 2, 3, 16, 17, 18, 19]].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("amax", "exponents"),
    [
        (3.2, (-1, 0, 0, -1)),
        (3.5, (-1, 0, 0, 0)),
        (3.9, (-1, 0, 0, 0)),
        (4.0, (0, 0, 0, 0)),
        (6.0, (0, 1, 0, 0)),
        (7.9, (0, 1, 1, 1)),
    ],
)
def test_published_scale_exponents(amax: float, exponents: tuple[int, ...]) -> None:
    got = [encode_blocks(block(-amax), f"mxfp4:scale={rule}").scales.item() - 127 for rule in RULES]
    assert tuple(got) == exponents


def test_rceil_is_exact_next_to_the_largest_element() -> None:
    """448 (1 + 2^-23) needs the next scale; its quotient by 448 in fp32 can round to 1."""
    x = torch.tensor([448.0, math.nextafter(448, 1000), 480.0], dtype=torch.float64)
    assert [encode_blocks(v[None], "mxfp8:scale=rceil").scales.item() for v in x] == [127, 128, 128]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([name for name in ALL if name != "nvfp4"]),
    st.lists(st.floats(-6, 6), min_size=1, max_size=40),
    st.integers(-60, 60),
    st.sampled_from(["nearest_even", "toward_zero"]),
)
def test_mx_equals_exact_arithmetic(name: str, numbers: list[float], shift: int, mode: str) -> None:
    x = torch.tensor(numbers, dtype=torch.float32) * 2.0**shift
    row = get_block_format(name)
    got, element = quantize(x, name, mode), get_format(row.element)  # type: ignore[arg-type]
    for start in range(0, len(x), row.block):
        part = [Fraction(v) for v in x[start : start + row.block].tolist()]
        scale = Fraction(2) ** _exponent(max(map(abs, part)), Fraction(row.element_max), row.rule)
        unit = Fraction(row.element_unit)
        for v, q in zip(part, got[start : start + row.block].tolist()):
            grid = quantize(torch.tensor(float(v / scale / unit), dtype=torch.float64), element, mode)  # type: ignore[arg-type]
            assert Fraction(q) == Fraction(grid.item()) * scale * unit


def _exponent(amax: Fraction, largest: Fraction, rule: str) -> int:
    """log2 of the scale from the definitions, by counting."""
    if amax == 0:
        return -127
    significand_bits = {448: 3, 57344: 2, Fraction(15, 2): 3, 28: 2, 6: 1, Fraction(127, 64): 6}[largest]
    low = next(k for k in range(-300, 300) if Fraction(2) ** (k + 1) > amax)
    emax = next(k for k in range(-300, 300) if Fraction(2) ** (k + 1) > largest)
    if rule == "ceil" and amax > Fraction(2) ** low:
        low += 1
    if rule == "even" and amax / Fraction(2) ** low + Fraction(1, 2 ** (significand_bits + 1)) >= 2:
        low += 1
    k = low - emax
    if rule == "rceil":
        k = next(k for k in range(-300, 300) if largest * Fraction(2) ** k >= amax)
    return min(max(k, -127), 127)


def rows(seed: int, shape: tuple[int, ...] = (50, 70)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-12, 12, shape, generator=generator).float())
    return torch.randn(shape, generator=generator) * spread


@pytest.mark.parametrize("name", ALL)
def test_what_holds_for_every_block_format(name: str) -> None:
    x, size = rows(1), get_block_format(name).block
    once = quantize(x, name)
    if name == "nvfp4":  # its values are rounded to fp32
        assert torch.allclose(quantize(once, name), once, rtol=1e-5, atol=0)
    else:
        assert torch.equal(quantize(once, name), once)
    assert torch.equal(quantize(-x, name), -once)
    coded = encode_blocks(x, name)
    assert coded.codes.shape == x.shape
    assert coded.scales.shape == (50, -(-70 // size))
    assert torch.equal(decoded(coded, name), once)
    amax = torch.nn.functional.pad(x, (0, -70 % size)).reshape(50, -1, size).abs().amax(-1)
    error = torch.nn.functional.pad(x - once, (0, -70 % size)).reshape(50, -1, size).abs().amax(-1)
    element = get_format(get_block_format(name).element)
    assert bool((error <= amax * (0.5 if element.bits == 4 else 0.25)).all())


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4:scale=rceil", "nvfp4"])
def test_blocks_run_along_the_last_dim_and_the_last_may_be_ragged(name: str) -> None:
    x = rows(2, (3, 4, 37))
    got = quantize(x, name)
    padded = torch.cat([x, torch.zeros(3, 4, 27)], dim=-1)
    assert torch.equal(quantize(padded, name)[..., :37], got)
    assert torch.equal(quantize(x.reshape(12, 37), name).reshape(3, 4, 37), got)
    if name != "nvfp4":  # no scale of the whole tensor
        assert torch.equal(quantize(x[1, 2, 32:], name), got[1, 2, 32:])
    assert torch.equal(quantize(x.transpose(0, 1), name), got.transpose(0, 1))
    assert not torch.equal(quantize(x.transpose(1, 2), name), got.transpose(1, 2))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spread_to_their_block_and_no_further(name: str, bad: float) -> None:
    size = get_block_format(name).block
    x = rows(3, (2, 3 * size)).clamp(-1, 1)
    clean = quantize(x, name)
    x[1, size + 2] = bad
    clean_amax_is_elsewhere = x[0].abs().max() == 1
    assert clean_amax_is_elsewhere
    got, coded = quantize(x, name), encode_blocks(x, name)
    assert got[1, size : 2 * size].isnan().all()
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[1, size : 2 * size] = False
    assert torch.equal(got[keep], clean[keep])
    assert coded.scales[1, 1].item() == (0x7F if name == "nvfp4" else 0xFF)
    assert torch.equal(decoded(coded, name).nan_to_num(-7), got.nan_to_num(-7))


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_the_ends_of_the_exponent(name: str) -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert quantize(zeros, name).tolist() == [0, 0]
    assert encode_blocks(zeros, name).scales.item() == 0  # 2^-127, and 0 in e4m3
    smallest, largest = quantize(torch.tensor([2.0**-149]), name), quantize(torch.tensor([3e38]), name)
    assert 0 <= smallest.item() <= 2.0**-140
    assert largest.item() > 2e38
    if name != "nvfp4":
        huge = torch.tensor([1e300], dtype=torch.float64)
        assert encode_blocks(huge, name).scales.item() == 254
        assert quantize(huge, name).item() == get_block_format(name).element_max * 2.0**127


def test_nvfp4_gives_a_block_far_below_the_largest_the_scale_0() -> None:
    x = torch.cat([block(1000.0, size=16), block(1e-5, size=16)])
    coded = encode_blocks(x, "nvfp4")
    assert coded.scales.tolist() == [0x7E, 0]
    assert quantize(x, "nvfp4")[16:].abs().max() == 0


@pytest.mark.parametrize("name", ["mxfp6", "mxint8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_shapes(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = quantize(x, name)
    assert got.dtype == dtype
    assert torch.equal(got.float(), quantize(x.float(), name).to(dtype).float())
    assert quantize(torch.tensor(0.3), name).shape == ()
    assert quantize(torch.zeros(0, 5), name).shape == (0, 5)
    assert quantize(torch.zeros(5, 0), name).shape == (5, 0)


@pytest.mark.parametrize(("name", "largest"), [("mxfp4", 6.0), ("mxint8", 127 / 64), ("nvfp4", 6.0)])
def test_roundings_are_those_of_the_elements(name: str, largest: float) -> None:
    """Under a scale of 1: the first element is the largest one."""
    x = torch.linspace(-0.9, 0.9, 16) * largest
    x[0] = largest
    unit, element = get_block_format(name).element_unit, get_format(get_block_format(name).element)
    for mode in ("nearest_even", "nearest_away", "toward_zero"):
        expected = quantize(x / unit, element, mode) * unit  # type: ignore[arg-type]
        assert torch.allclose(quantize(x, name, mode), expected, rtol=1e-6, atol=0)  # type: ignore[arg-type]
    many = x.repeat(20000, 2)
    drawn = quantize(many, name, "stochastic", seed=1).double()
    gap = drawn.amax(0) - drawn.amin(0)
    assert bool(((drawn.mean(0) - many[0]).abs() <= 2.5 * gap / math.sqrt(20000) + 1e-6).all())
    assert torch.equal(drawn, quantize(many, name, "stochastic", seed=1).double())
    assert not torch.equal(drawn, quantize(many, name, "stochastic", seed=2).double())


def test_a_slice_of_whole_blocks_gets_the_bits_of_its_base() -> None:
    x = rows(6, (256,))
    base = quantize(x, "mxfp4", "stochastic", seed=5)
    assert torch.equal(quantize(x[64:128], "mxfp4", "stochastic", seed=5, offset=64), base[64:128])


def test_wrong_arguments_say_so() -> None:
    x = torch.ones(32)
    with pytest.raises(FormatError, match="mxfp4 makes its own scales"):
        quantize(x, "mxfp4", scale=2.0)
    with pytest.raises(FormatError, match="the elements of mxfp4 saturate"):
        quantize(x, "mxfp4", overflow="ieee")
    with pytest.raises(FormatError, match=r'"scale=mean" is not an option of mxfp4. Expected scale=floor\|ceil'):
        quantize(x, "mxfp4:scale=mean")
    with pytest.raises(FormatError, match=r"Expected scale=headroom\|four-six\|eden"):
        quantize(x, "nvfp4:scale=floor")
    with pytest.raises(FormatError, match="Expected no option"):
        quantize(x, "nvfp4-2d:scale=eden")
    with pytest.raises(FormatError, match=r'"mxfp5" is not a block format\. Try "mxfp'):
        quantize_blocks(x, "mxfp5")
    with pytest.raises(FormatError, match="encode_blocks"):
        encode(x, "mxfp4")
    with pytest.raises(FormatError, match="decode_blocks"):
        decode(x.long(), "nvfp4")
    with pytest.raises(FormatError, match="floating-point"):
        quantize(x.long(), "mxfp4")
    with pytest.raises(FormatError, match=r"not the scales of \(32,\) codes of mxfp4. Expected \(1,\)"):
        decode_blocks(torch.zeros(32), torch.zeros(2), "mxfp4")
    with pytest.raises(NotSupported):
        get_format("mxfp4:scale=rceil")
