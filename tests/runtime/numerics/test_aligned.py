"""Aligned sums against Python's integers, bit for bit: no float is added, multiplied or rounded here."""

import math
from fractions import Fraction
from pathlib import Path
from struct import pack, unpack

import pytest
import torch
from torch import Tensor

from runtime.errors import FormatError
from runtime.numerics import get_format, quantize, reference_gemm
from runtime.numerics.accumulators import ACCUMULATORS, declines_aligned
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec

OPERANDS = [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("hfp8-143", "e5m2"), ("bf16", "bf16"), ("fp16", "fp16")]
LOWEST = -126


def _integer(x: float, emin: int) -> tuple[int, int]:
    """(n, e) with x = n 2^(e - 23), 2^23 <= |n| < 2^24 or e = emin: what a significand of 24 bits holds."""
    if not x:
        return 0, LOWEST
    exponent = max(math.frexp(x)[1] - 1, emin)
    n = Fraction(x) * Fraction(2) ** (23 - exponent)
    assert n.denominator == 1
    return int(n), exponent


def _shifted(n: int, places: int) -> int:
    """n 2^places without its fraction, toward zero."""
    size = abs(n) << places if places >= 0 else abs(n) >> -places
    return size if n >= 0 else -size


def dot(a: list[float], b: list[float], spec: GemmSpec) -> float:
    """One element of a product, of finite values."""
    how = spec.accumulator
    row = get_format(how.format)
    assert isinstance(row, FloatFormat)
    assert how.chunk is not None
    emins = [get_format(each.format).emin for each in (spec.lhs, spec.rhs)]  # type: ignore[union-attr]
    total = 0.0
    for start in range(0, len(a), how.chunk):
        terms = [(n, e, 23) for n, e in [_integer(total, LOWEST)]]  # n 2^(e - digits)
        for x, y in zip(a[start : start + how.chunk], b[start : start + how.chunk]):
            (n, e), (m, f) = _integer(x, emins[0]), _integer(y, emins[1])
            terms.append((n * m, e + f if n * m else LOWEST, 46))
        top = max(e for _, e, _ in terms)
        fixed = sum(_shifted(n, how.align_bits + e - top - digits) for n, e, digits in terms)
        total = _cut(fixed, top - how.align_bits, row.mantissa)
    return total


def _cut(fixed: int, exponent: int, mantissa: int) -> float:
    """fixed 2^exponent with `mantissa` fraction bits, as fp32."""
    if not fixed:
        return 0.0
    dropped = max(abs(fixed).bit_length() - 1 - mantissa, LOWEST - mantissa - exponent, 0)
    size = abs(fixed) >> dropped
    if size.bit_length() + dropped + exponent > 128:
        return math.copysign(math.inf, fixed)
    return math.copysign(math.ldexp(size, dropped + exponent), fixed)


def _values(shape: tuple[int, int], format: str, kind: str, source: torch.Generator) -> Tensor:
    """On the grid: of one size, of every size, mostly zero, or of few values so that sums cancel."""
    x = torch.randn(shape, generator=source)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-20, 12, shape, generator=source).float())
    if kind == "tiny":  # subnormals of the format, and of fp32 where it is bf16
        row = get_format(format)
        x = x * row.tiny * 2.0 ** torch.randint(-1, 5, shape, generator=source)
    if kind == "sparse":
        x = torch.where(torch.rand(shape, generator=source) < 0.8, 0.0, x)
    if kind == "cancelling":
        x = torch.randint(-2, 3, shape, generator=source) * 2.0 ** torch.randint(-6, 7, shape, generator=source)
    return quantize(x, format)


def _check(names: list[str], per_case: int) -> int:
    """How many dot products were compared; 16 x 16 of them have one K."""
    count = 0
    for index, name in enumerate(names):
        for lhs, rhs in OPERANDS:
            spec = GemmSpec(QuantSpec(lhs), QuantSpec(rhs), AccumulateSpec.parse(name))
            for number, kind in enumerate(("plain", "wide", "tiny", "sparse", "cancelling")):
                source = torch.Generator().manual_seed(1000 * index + number)
                num_k = int(torch.randint(1, 65, (), generator=source))
                a = _values((per_case, num_k), lhs, kind, source)
                b = _values((num_k, per_case), rhs, "wide" if kind == "plain" else kind, source)
                found = reference_gemm.multiply(a, b, spec)
                rows, columns = a.tolist(), b.t().tolist()
                want = torch.tensor([[dot(x, y, spec) for y in columns] for x in rows])
                assert torch.equal(found.view(torch.int32), want.view(torch.int32)), (str(spec), kind)
                count += found.numel()
    return count


def test_random_sums_are_those_of_integers() -> None:
    assert _check(list(ACCUMULATORS), 5) == 3125


@pytest.mark.slow
def test_a_hundred_thousand_sums_are_those_of_integers() -> None:
    others = ["1-8-5/8 toward_zero aligned[4]", "fp32/3 toward_zero aligned[1]", "1-8-10/16 toward_zero aligned[28]"]
    assert _check([*ACCUMULATORS, *others], 23) >= 10**5


def _sum(a: list[float], b: list[float], how: str, format: str = "e4m3") -> float:
    spec = GemmSpec(QuantSpec(format), QuantSpec(format), AccumulateSpec.parse(how))
    found = reference_gemm.multiply(torch.tensor([a]), torch.tensor([b]).t(), spec)
    assert found.item() == dot(a, b, spec)
    return found.item()


def test_thirteen_bits_of_a_hopper_accumulator_by_hand() -> None:
    """256 * 32 = 2^13, exponent 13: a term keeps what is a multiple of 2^(13 - 13) = 1."""
    big, one = 256.0, 32.0
    assert _sum([big, 1.0], [one, 1.0], "hopper-fp8") == 2**13 + 1  # 1 is the last bit that is kept
    assert _sum([big, 0.5], [one, 1.0], "hopper-fp8") == 2**13  # half of it is lost
    assert _sum([big, *[0.5] * 31], [one, *[1.0] * 31], "hopper-fp8") == 2**13  # each of 31 halves, before the sum
    assert _sum([big, 1.5], [one, -1.0], "hopper-fp8") == 2**13 - 1  # toward zero: -1.5 is -1
    assert _sum([big, *[0.5] * 31], [one, *[1.0] * 31], "blackwell-fp8") == 2**13 + 15.5  # 25 bits lose nothing
    # 1.5 * 1.5 = 2.25 has exponent 0, as its factors: not normalised, it keeps 2^-13, where 2.25 as 1.125 * 2 would not
    small = 2.0**-7 * 2.0**-6
    assert _sum([1.5, 2.0**-7], [1.5, 2.0**-6], "hopper-fp8") == 2.25  # T drops it: 14 bits of 2.25 end at 2^-12
    assert _sum([1.5, 2.0**-7, -1.5], [1.5, 2.0**-6, 1.5], "hopper-fp8") == small  # but it was in the sum
    # the sum of a chunk is a term of the next: 2^13 + 31 * 1 and then 2^13 more is 2^14 + 31, cut to a multiple of 2
    chunk = [big, *[1.0] * 31]
    assert _sum(chunk * 2, [one, *[1.0] * 31] * 2, "hopper-fp8") == 2**14 + 62
    assert _sum([*chunk, big], [one, *[1.0] * 31, one], "hopper-fp8") == 2**14 + 30
    # chunks of 16 see the running sum twice as often: 16 halves beside nothing large are 8, kept as a sum
    assert _sum([0.5] * 16 + [big], [1.0] * 16 + [one], "ada-fp8") == 2**13 + 8
    assert _sum([0.5] * 16 + [big], [1.0] * 16 + [one], "hopper-fp8") == 2**13


def test_a_subnormal_keeps_the_lowest_exponent_of_its_format() -> None:
    """2^-9 of e4m3 is 2^-3 2^-6; beside it a term keeps 13 bits below 2^-12 and not below 2^-18."""
    a = [2.0**-9, 2.0**-9]
    assert _sum(a, [2.0**-9, 2.0**-9], "1-8-3/2 toward_zero aligned") == 0
    assert _sum(a, [2.0**-6, 2.0**-6], "1-8-3/2 toward_zero aligned") == 2.0**-14
    assert _sum([2.0**-9], [2.0**-9], "hopper-fp8") == 2.0**-18


def test_zeros_keep_the_exponent_of_a_zero() -> None:
    """Of bf16, at the end of its range: 2^-151 is all that 25 bits below 2^-126 hold, and fp32 cuts it."""
    assert _sum([0.0, 1.0], [1.0, 0.0], "hopper-bf16", "bf16") == 0
    spec = GemmSpec(QuantSpec("bf16"), QuantSpec("bf16"), AccumulateSpec.parse("hopper-bf16"))
    tiny = torch.tensor([[2.0**-75, 2.0**-75]])
    found = reference_gemm.multiply(tiny, -tiny.t(), spec)  # -2^-149 in all
    assert found.item() == -(2.0**-149)
    lost = reference_gemm.multiply(tiny[:, :1], -tiny.t()[:1], spec)  # -2^-150: cut to 0, and the sign stays
    assert unpack("i", pack("f", lost.item()))[0] == -(2**31)
    assert reference_gemm.multiply(tiny[:, :0], tiny.t()[:0], spec).item() == 0


def test_inf_and_nan_are_those_of_ordinary_sums() -> None:
    spec = GemmSpec(QuantSpec("bf16"), QuantSpec("bf16"), AccumulateSpec.parse("ampere-bf16"))
    inf, nan = math.inf, math.nan
    a = torch.tensor([[inf, 1.0], [inf, inf], [nan, 1.0], [inf, 1.0], [2.0**100, 2.0**100], [2.0**100, 1.0]])
    b = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [0.0, 1.0], [2.0**27, 2.0**27], [2.0**27, 1.0]])
    found = [reference_gemm.multiply(x[None], y[:, None], spec).item() for x, y in zip(a, b)]
    assert found[0] == inf
    assert all(map(math.isnan, found[1:4]))
    assert found[4:] == [inf, 2.0**127]  # 2^127 + 2^127 is beyond fp32


@pytest.mark.parametrize("name", list(ACCUMULATORS))
def test_a_name_is_its_text(name: str) -> None:
    spec = AccumulateSpec.parse(name)
    assert str(spec) == ACCUMULATORS[name].text
    assert AccumulateSpec.parse(str(spec)) == spec
    assert ACCUMULATORS[name].source


def test_the_documentation_has_every_row() -> None:
    text = (Path(__file__).parents[3] / "docs" / "policies.md").read_text()
    for name in ACCUMULATORS:
        spec = AccumulateSpec.parse(name)
        assert f"| {name} | {spec.chunk} | {spec.align_bits} | {spec.format}" in text


def test_naming_the_own_bits_is_the_same_spec() -> None:
    named = AccumulateSpec("1-8-13", 32, "toward_zero", model="aligned", align=13)
    assert named == AccumulateSpec.parse("hopper-fp8")
    assert AccumulateSpec.parse("fp32/8 toward_zero aligned[24]").align_bits == 24


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1-6-9/8 toward_zero aligned", "fp32 or 1-8-M, with the exponents of fp32"),
        ("fp32/8 aligned", "rounding toward_zero"),
        ("fp32/8 toward_zero rounded aligned", "products that are not rounded first"),
        ("fp32 toward_zero aligned", "a chunk of 1 to 1024"),
        ("fp32/2000 toward_zero aligned", "a chunk of 1 to 1024"),
        ("fp32/8 toward_zero aligned[29]", "aligned to 1 to 28 fraction bits"),
        ("fp32/8 toward_zero aligned[0]", "does not describe an accumulator"),
        ("auto/8 toward_zero aligned", "a format that is stated"),
        ("int32/8 aligned", "integers add exactly"),
    ],
)
def test_what_is_no_aligned_sum(text: str, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence.replace("[", "\\[")):
        AccumulateSpec.parse(text)


@pytest.mark.parametrize("operand", ["fp32", "int8", "nf4", "mxfp8", "1-8-11"])
def test_operands_that_have_no_aligned_sum(operand: str) -> None:
    spec = GemmSpec(QuantSpec("e4m3"), QuantSpec(operand), AccumulateSpec.parse("hopper-fp8"))
    reason = declines_aligned(spec)
    assert reason is not None
    assert operand in reason
    assert reference_gemm.declines(spec) == reason
