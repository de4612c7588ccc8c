"""gemm() against fractions.Fraction: every add exact, then rounded once; integers against Python's."""

import itertools
import math
import warnings
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from runtime import gemm
from runtime.errors import FormatError, SlowPathWarning
from runtime.kernels.cpu.accumulate_wide import wide_library
from runtime.numerics import encode, quantize
from runtime.numerics import reference_gemm as reference
from runtime.numerics.format_kinds import FloatFormat
from runtime.numerics.formats import get_format
from runtime.numerics.random import random_bits
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import PRODUCTS, ROUNDINGS, AccumulateModel, AccumulateSpec, GemmSpec, QuantSpec
from tests.machine_facts import needs_compiler

ONE_BY_ONE: tuple[AccumulateModel, ...] = ("per_mac", "per_chunk")
OPERANDS = [("e4m3", "e5m2"), ("dlfloat16", "hfp8-143"), ("bf16", "int8"), ("fp32", "fp16")]
ACCUMULATORS = ["dlfloat16", "1-6-9", "fp16", "bf16", "e5m2", "1-8-14", "tf32", "fp32"]
SHAPES = [(2, 0, 3, None), (2, 1, 1, 1), (2, 13, 3, 5), (3, 12, 2, 4), (1, 9, 2, None)]


def _neighbours(size: Fraction, row: FloatFormat) -> tuple[Fraction, Fraction]:
    """The grid value not above `size` >= 0, and the spacing to the next."""
    exponent = row.emin
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    ulp = Fraction(2) ** (exponent - row.mantissa)
    if not row.subnormals and size < Fraction(row.tiny):
        ulp = Fraction(row.tiny)
    return floor(size / ulp) * ulp, ulp


def _tie(below: Fraction, ulp: Fraction, row: FloatFormat) -> Fraction:
    """What rounds away from zero from: halfway, and in dlfloat16 halfway from 2^-31, whose code is that of 0."""
    if below == 0 and row.zero_exponent_is_normal:
        return (Fraction(2) ** row.emin + ulp) / 2
    return below + ulp / 2


def _round(x: Fraction, row: FloatFormat, mode: str, u: Fraction = Fraction(0)) -> Fraction:
    below, ulp = _neighbours(abs(x), row)
    rest, tie = (abs(x) - below) / ulp, _tie(below, ulp, row)
    up = {
        "nearest_even": abs(x) > tie or (abs(x) == tie and (below / ulp) % 2 == 1),
        "nearest_away": abs(x) >= tie,
        "toward_zero": False,
        "stochastic": rest >= 1 - u,
    }[mode]
    rounded = min(below + up * ulp, Fraction(row.max))
    return rounded if x > 0 else -rounded


class _Draws:
    """The random numbers of one output, from the words of one stream: 16 bits per rounding, cut to b."""

    def __init__(self, row: FloatFormat, seed: int, step: int, element: int, elements: int) -> None:
        self.digits = 23 - row.mantissa if 7 <= row.mantissa <= 15 else 16
        self.seed, self.step, self.element, self.elements = seed, step, element, elements

    def __call__(self, number: int) -> Fraction:
        counter = number // 8 * self.elements + self.element
        words = random_bits(4, seed=self.seed, step=self.step, offset=4 * counter).tolist()
        half = words[number % 8 // 2] >> (16 * (number % 2)) & 0xFFFF
        return Fraction(half >> (16 - self.digits), 2**self.digits)


def exact_sums(a: Tensor, b: Tensor, how: AccumulateSpec, seed: int = 0, step: int = 0) -> Tensor:
    """One matrix product; a and b hold grid values."""
    row, fp32 = get_format(how.format), get_format("fp32")
    assert isinstance(row, FloatFormat)
    assert isinstance(fp32, FloatFormat)
    (m, num_k), n = a.shape, b.shape[1]
    chunk = how.chunk or max(num_k, 1)
    num_chunks = -(-num_k // chunk)
    outer = num_chunks if how.model == "per_chunk" else num_k
    out = torch.zeros(m, n)
    for i, j in itertools.product(range(m), range(n)):
        draw = _Draws(row, seed, step, i * n + j, m * n) if how.mode == "stochastic" else lambda number: Fraction(0)
        total = Fraction(0)
        for c in range(num_chunks):
            part = Fraction(0)
            for k in range(c * chunk, min((c + 1) * chunk, num_k)):
                product = Fraction(a[i, k].item()) * Fraction(b[k, j].item())
                if how.product == "rounded":
                    product = _round(product, row, how.mode, draw(outer + num_chunks + k))
                if how.model == "per_mac":
                    part = _round(part + product, row, how.mode, draw(k))
                else:
                    part = _round(part + product, fp32, "nearest_even")
            if how.model == "per_chunk":
                part = _round(part, row, how.mode, draw(c))
            total = part if num_chunks == 1 else _round(total + part, row, how.mode, draw(outer + c))
        out[i, j] = float(total)
    return out


def _values(m: int, k: int, size: float, seed: int) -> Tensor:
    """Not contiguous."""
    return (torch.randn(k, m, generator=torch.Generator().manual_seed(seed)) * size).t()


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_every_add_is_rounded_once(mode: str, accumulate: str) -> None:
    for (lhs, rhs), product, model in itertools.product(OPERANDS, PRODUCTS, ONE_BY_ONE):
        for m, k, n, chunk in SHAPES:
            how = AccumulateSpec(accumulate, chunk, mode, product, model)  # type: ignore[arg-type]
            a, b = _values(m, k, 3.0, k), _values(k, n, 0.1, n)
            result = gemm(a, b, a_format=lhs, b_format=rhs, accumulate=how, seed=2**40 + 1, step=5)
            expected = exact_sums(quantize(a, lhs), quantize(b, rhs), how, 2**40 + 1, 5)
            assert torch.equal(result, expected), (lhs, rhs, how, m, k, n)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ACCUMULATORS),
    st.sampled_from(ROUNDINGS),
    st.integers(0, 20),
    st.integers(1, 9) | st.none(),
    st.sampled_from([2.0**-12, 1.0, 40.0]),
    st.integers(0, 2**64 - 1),
)
def test_any_shape_and_size(accumulate: str, mode: str, k: int, chunk: int | None, size: float, seed: int) -> None:
    a, b = quantize(_values(2, k, size, k), "e4m3"), quantize(_values(k, 3, 1.0, 7), "e5m2")
    how = AccumulateSpec(accumulate, chunk, mode)  # type: ignore[arg-type]
    result = gemm(a, b, a_format="e4m3", b_format="e5m2", accumulate=how, seed=seed)
    assert torch.equal(result, exact_sums(a, b, how, seed))


@pytest.mark.parametrize(
    ("a", "b", "accumulate", "rounding", "expected"),
    [
        ([1.0, 1 + 2.0**-9], [1.0, (1 + 510 / 512) * 2.0**-11], "1-6-9", "nearest_away", 1.0),
        ([1.0, 1 + 2.0**-9], [1.0, (1 + 510 / 512) * 2.0**-11], "dlfloat16", None, 1.0),
        ([1024.0, 1.0], [1.0, -(2.0**-18)], "1-6-9", "toward_zero", 1023.0),
    ],
)
def test_rounding_once_is_not_rounding_twice(
    a: list[float], b: list[float], accumulate: str, rounding: str | None, expected: float
) -> None:
    """The cases of design.md section 3."""
    result = gemm(
        torch.tensor([a]), torch.tensor([b]).t(), a_format="dlfloat16", b_format="dlfloat16",
        accumulate=accumulate, rounding=rounding,  # type: ignore[arg-type]
    )  # fmt: skip
    assert result.item() == expected


def test_batches_are_matrices_with_their_own_bits() -> None:
    a, b = torch.randn(2, 1, 4, 40), torch.randn(3, 40, 5)
    nearest = gemm(a, b, a_format="e4m3", b_format="e4m3", accumulate="1-6-9", chunk=16)
    one = gemm(a[1, 0], b[2], a_format="e4m3", b_format="e4m3", accumulate="1-6-9", chunk=16)
    assert nearest.shape == (2, 3, 4, 5)
    assert torch.equal(nearest[1, 2], one)
    how = AccumulateSpec("1-6-9", 16, "stochastic")
    result = gemm(a, b, a_format="e4m3", b_format="e4m3", accumulate=how, seed=3)
    spec = GemmSpec(accumulator=how)
    assert torch.equal(result, reference.multiply(quantize(a, "e4m3"), quantize(b, "e4m3"), spec, RandomKey(3)))
    same = gemm(a[:1].expand(2, 1, 4, 40), b[:1].expand(3, 40, 5), a_format="e4m3", b_format="e4m3", accumulate=how)
    assert not torch.equal(same[0, 0], same[1, 0])


@pytest.mark.parametrize("accumulate", ["1-6-9", "bf16", "dlfloat16"])
def test_stochastic_takes_neighbours_with_exact_probability(accumulate: str) -> None:
    """1 + rest / 2^M for 2^16 outputs: up with probability `rest`, within five sigma; no third value."""
    row = get_format(accumulate)
    assert isinstance(row, FloatFormat)
    ulp, count = 2.0**-row.mantissa, 256
    for rest in (0.25, 0.40625):
        a = torch.tensor([[1.0, rest]]).expand(count, 2)
        b = torch.tensor([[1.0], [ulp]]).expand(2, count)
        result = gemm(a, b, accumulate=accumulate, rounding="stochastic", seed=11)
        assert set(result.unique().tolist()) == {1.0, 1.0 + ulp}
        share = (result > 1).double().mean().item()
        assert abs(share - rest) < 5 * (rest * (1 - rest)) ** 0.5 / count


def test_stochastic_depends_on_the_key_and_not_on_threads() -> None:
    a, b = torch.randn(70, 200), torch.randn(200, 90)

    def run(**key: int) -> Tensor:
        return gemm(a, b, a_format="e4m3", b_format="e4m3", accumulate="1-6-9/64 stochastic", **key)

    expected, before = run(seed=1, step=2), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(run(seed=1, step=2), expected)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(run(seed=1, step=3), expected)
    assert not torch.equal(run(seed=2, step=2), expected)


def _integers(a: Tensor, b: Tensor, how: AccumulateSpec, bits: int) -> Tensor:
    low, high = -(2 ** (bits - 1)) + (how.overflow == "saturate"), 2 ** (bits - 1) - 1

    def fit(x: int) -> int:
        return min(max(x, low), high) if how.overflow == "saturate" else (x - low) % 2**bits + low

    (m, num_k), n = a.shape, b.shape[1]
    chunk = how.chunk or max(num_k, 1)
    out = torch.zeros(m, n)
    for i, j in itertools.product(range(m), range(n)):
        total = 0
        for start in range(0, num_k, chunk):
            part = 0
            for k in range(start, min(start + chunk, num_k)):
                product = int(a[i, k]) * int(b[k, j])
                product = fit(product) if how.product == "rounded" else product
                part = fit(part + product) if how.model == "per_mac" else part + product
            part = fit(part)
            total = fit(total + part)
        out[i, j] = float(total)
    return out


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_integers_saturate_and_wrap(overflow: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    a, b = (torch.randint(-127, 128, shape, generator=generator).float() for shape in ((3, 50), (50, 4)))
    for product, model, chunk in itertools.product(PRODUCTS, ONE_BY_ONE, (None, 16)):
        how = AccumulateSpec(f"int{bits}", chunk, None, product, model, overflow)  # type: ignore[arg-type]
        result = gemm(a, b, a_format="int8", b_format="int8", accumulate=how)
        assert torch.equal(result, _integers(a, b, how, bits)), how


def test_affine_operands_are_their_integers() -> None:
    """uint8 with a zero point, times int8: no correction term is left over, in int32 as in fp32 sums."""
    x, w = torch.randn(5, 70) * 40, torch.randn(70, 6) * 40
    codes, zero = encode(x, "uint8:zero=100").long(), 100
    expected = (codes - zero) @ quantize(w, "int8").long()
    for accumulate in ("int32", "fp32"):
        result = gemm(x, w, a_format="uint8:zero=100", b_format="int8", accumulate=accumulate)
        assert torch.equal(result, expected.float()), accumulate


def test_int32_ends() -> None:
    ones = torch.full((1, 4), 32767.0)
    saturated, wrapped = (
        gemm(ones, ones.t(), a_format="int16", b_format="int16", accumulate=text) for text in ("int32", "int32 wrap")
    )
    assert saturated.item() == 2.0**31  # 2^31 - 1, to fp32
    assert wrapped.item() == float(torch.tensor(4 * 32767**2 - 2**32).float())


def test_refusals() -> None:
    x = torch.ones(2, 2)
    for options in (
        {"accumulate": "int32"},
        {"accumulate": "e4m4"},
        {"accumulate": "int32", "rounding": "stochastic", "a_format": "int8", "b_format": "int8"},
        {"accumulate": "1-6-9", "chunk": 0},
        {"accumulate": "1-6-9/64", "chunk": 2},
        {"accumulate": "1-6-9", "product": "fused"},
    ):
        with pytest.raises(FormatError):
            gemm(x, x, **options)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="no product"):
        gemm(x, torch.ones(3, 2))


@pytest.mark.parametrize(
    "text",
    ["fp32", "1-6-9/64", "1-6-9/64 stochastic rounded per_chunk", "int16 wrap", "dlfloat16 nearest_even", "fp32/2 fma"],
)
def test_accumulator_prints_and_parses(text: str) -> None:
    spec = AccumulateSpec.parse(text)
    assert AccumulateSpec.parse(str(spec)) == spec
    assert str(spec) == text.removesuffix(" fma")
    assert GemmSpec.parse(str(GemmSpec(accumulator=spec))).accumulator == spec


def test_naming_the_default_rounding_changes_nothing() -> None:
    assert AccumulateSpec("dlfloat16", rounding="nearest_away") == AccumulateSpec.parse("dlfloat16")


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        how = {"a_format": "e4m3", "b_format": "mxfp8", "accumulate": "1-6-9/4 stochastic"}
        return gemm(a * 2, b, seed=2**63 + 5, step=3, **how) + 1  # type: ignore[arg-type]


@needs_compiler
def test_it_is_one_node_of_fx_export_and_compiled_code() -> None:
    a, b, other = torch.randn(2, 5, 40), torch.randn(40, 3), torch.randn(2, 5, 40)
    expected = Product()(other, b)
    graph = make_fx(Product(), tracing_mode="fake")(a, b)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.lp.matrix_product.default) == 1
    assert torch.equal(graph(other, b), expected)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Product(), (a, b), strict=strict).module()(other, b), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Product(), fullgraph=True)(other, b), expected)


def test_the_op_has_a_straight_through_gradient_and_gemm_has_none() -> None:
    a, b = torch.randn(2, 1, 4, 40, requires_grad=True), torch.randn(3, 40, 5, requires_grad=True)
    assert not gemm(a, b, a_format="e4m3").requires_grad
    spec = str(GemmSpec(QuantSpec("e4m3"), QuantSpec("mxfp4", along="column"), AccumulateSpec("1-6-9", 8)))
    y = torch.ops.lp.matrix_product(a, b, spec, 0, 0)
    dy = torch.randn(2, 3, 4, 5)
    da, db = torch.autograd.grad(y, (a, b), dy)
    left = quantize(a.detach(), "e4m3").requires_grad_()
    right = quantize(b.detach().mT, "mxfp4").mT.requires_grad_()
    want = torch.autograd.grad(left.double() @ right.double(), (left, right), dy.double())
    assert torch.allclose(da, want[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(db, want[1], rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.lp.matrix_product.default, (a, b, spec, 0, 0))


PLAIN = ["e4m3", "e5m2", "hfp8-143", "e2m1", "dlfloat16", "bf16", "fp16", "tf32", "int8", "uint8:zero=9", "nf4",
         "mxfp8", "fp4-radix4", "int1", "fp32", "nvfp4"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PLAIN), st.sampled_from(PLAIN), st.sampled_from(ACCUMULATORS), st.sampled_from(ROUNDINGS),
    st.sampled_from(PRODUCTS), st.sampled_from(ONE_BY_ONE), st.integers(0, 9), st.integers(1, 5) | st.none(),
    st.sampled_from([2.0**-14, 1.0, 300.0]),
)  # fmt: skip
def test_any_pair_of_operands_in_any_way_to_add(  # type: ignore[no-untyped-def]
    lhs, rhs, accumulate, mode, product, model, k, chunk, size
) -> None:
    a, b = _values(2, k, size, k), _values(k, 2, 1.0, k + 1)
    how = AccumulateSpec(accumulate, chunk, mode, product, model)
    result = gemm(a, b, a_format=lhs, b_format=rhs, accumulate=how, seed=k)
    left, right = quantize(a, lhs), quantize(b.mT, rhs).mT
    assert torch.equal(result, exact_sums(left, right, how, k))


@pytest.mark.parametrize("accumulate", ["1-6-9", "dlfloat16", "bf16"])
@pytest.mark.parametrize("mode", ["nearest_even", "nearest_away", "toward_zero"])
def test_a_chunk_of_all_is_none_and_of_one_rounds_every_product(mode: str, accumulate: str) -> None:
    """Algorithm notes 12.10. Chunk 1 is Q(c + Q(a b)): the plain sum of rounded products."""
    a, b = _values(4, 60, 3.0, 1), _values(60, 5, 0.1, 2)

    def run(chunk: int | None, product: str = "fma") -> Tensor:
        how = AccumulateSpec(accumulate, chunk, mode, product)  # type: ignore[arg-type]
        return gemm(a, b, a_format="e4m3", b_format="e5m2", accumulate=how)

    assert torch.equal(run(60), run(None))
    assert torch.equal(run(1000), run(None))
    assert torch.equal(run(1), run(None, "rounded"))
    exact = quantize(a, "e4m3").double() @ quantize(b, "e5m2").double()
    single = gemm(a, b, a_format="e4m3", b_format="e5m2")
    assert torch.allclose(single.double(), exact, rtol=0, atol=59 * 2.0**-24 * float((a.abs() @ b.abs()).max()) * 1.2)


def test_dlfloat_counts_exactly_to_1024() -> None:
    """Algorithm notes 12.11 and A3: integers add and multiply exactly up to 2^10; 1024 + 1 is 1026, by ties away."""
    small = torch.arange(33.0)
    products = gemm(small[:, None], small[None], a_format="dlfloat16", b_format="dlfloat16", accumulate="dlfloat16")
    assert torch.equal(products, torch.outer(small, small))
    ones = torch.ones(1, 1500)

    def total(n: int, accumulate: str = "dlfloat16", **options: int) -> float:
        return gemm(ones[:, :n], ones[:, :n].mT, accumulate=accumulate, a_format="dlfloat16", **options).item()

    assert [total(n) for n in (1, 1000, 1024, 1025, 1500)] == [1, 1000, 1024, 1026, 1976]
    assert total(1500, "1-6-9") == 1024  # ties to even stay
    assert total(1500, "1-6-9", chunk=64) == 1500


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_only_real_floating_point_numbers_are_multiplied(dtype: torch.dtype) -> None:
    good, bad = torch.ones(2, 2), torch.ones(2, 2, dtype=dtype)
    for a, b in ((good, bad), (bad, good)):
        with pytest.raises(FormatError, match="only real numbers"):
            gemm(a, b)


def test_float64_operands_are_rounded_once() -> None:
    """1.0625 is a tie of e4m3, which the bit below fp32's last decides."""
    a = torch.tensor([[1.0625 + 2.0**-40, 1.0625]], dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    assert gemm(a, one, a_format="e4m3").item() == 1.125 + 1.0


@pytest.mark.parametrize("overflow", ["", " wrap"])
@pytest.mark.parametrize("bits", [16, 32])
def test_nan_passes_through_integer_sums(bits: int, overflow: str) -> None:
    a, b = torch.tensor([[math.nan, 1.0], [2.0, 3.0]]), torch.tensor([[1.0, 2.0], [4.0, 5.0]])
    y = gemm(a, b, a_format="int8", b_format="int8", accumulate=f"int{bits}{overflow}")
    assert y[0].isnan().all()
    assert y[1].tolist() == [14, 19]


def test_integer_sums_that_could_leave_int64_are_refused() -> None:
    x = torch.full((1, 8), 2.0**32)
    for name, how in (("int32", "int32 per_chunk"), ("uint32", "int32")):
        with pytest.raises(FormatError, match="can leave int64"):
            gemm(x, x.t(), a_format=name, b_format=name, accumulate=how)
    assert gemm(x, x.t(), a_format="int32", b_format="int32", accumulate="int32").item() == 2.0**31


@pytest.mark.parametrize("how", [{"chunk": 1.5}, {"chunk": 0}, {"accumulate": "1-6-9/x"}, {"accumulate": "1-6-9/"}])
def test_a_chunk_is_a_whole_number(how: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="not a chunk"):
        gemm(torch.ones(2, 4), torch.ones(4, 2), **how)


def test_batches_that_do_not_broadcast_are_refused() -> None:
    with pytest.raises(FormatError, match="no product"):
        gemm(torch.ones(2, 3, 4), torch.ones(3, 4, 5))


def test_the_scale_of_an_nvfp4_tensor_takes_its_products_off_the_grid() -> None:
    """fp16's subnormals are the accumulator's grid here: the kernel would take the products of the two for exact."""
    a, b = torch.tensor([[4.0366e-05], [1.5858e-05]]), torch.tensor([[0.40625, -0.21875]])
    found = gemm(a, b, a_format="nvfp4", b_format="e4m3", accumulate="fp16")
    exact = quantize(a, "nvfp4").double() @ quantize(b, "e4m3").double()
    assert torch.equal(found, quantize(exact, "fp16").float())


def test_the_default_formats_overflow_as_torch_does() -> None:
    """fp32 is no cast and its sums are IEEE's; other formats saturate, operands as sums."""
    inf, big = math.inf, 3e38
    a, b = torch.tensor([[inf, 1.0], [big, big], [-inf, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert gemm(a, b).isnan().tolist() == (a @ b).isnan().tolist()
    assert torch.equal(gemm(a, b).nan_to_num(7.0), (a @ b).nan_to_num(7.0))
    largest = torch.finfo(torch.bfloat16).max
    assert gemm(a, b, a_format="bf16").tolist() == [
        [1, largest],
        [quantize(torch.tensor(big), "bf16").item(), inf],
        [0, -largest],
    ]
    assert gemm(a, b, a_format="bf16", accumulate="bf16")[:, 1].tolist() == [largest, largest, -largest]
    cut = gemm(a[1:2], b, rounding="toward_zero")
    assert cut[0, 1] == torch.finfo(torch.float32).max  # IEEE 754-2019, 7.4
    assert gemm(a[1:2], b, rounding="stochastic", seed=1)[0, 1] == inf
    assert gemm(a[1:2].double() * 1e30, b)[0, 1] == inf


def test_the_reference_says_once_that_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MANY_PRODUCTS", 100)
    spec = GemmSpec(accumulator=AccumulateSpec("1-7-5"))
    a = torch.ones(5, 5)
    with pytest.warns(SlowPathWarning, match="1-7-5.*no C\\+\\+ compiler"):
        reference.multiply(a, a, spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.multiply(a, a, spec)


@pytest.mark.skipif(wide_library() is None, reason="needs a C++ compiler")
def test_no_product_on_the_cpu_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> Tensor:
        raise AssertionError("the reference ran")

    a, b = torch.randn(3, 40), torch.randn(40, 5)
    wanted = {
        how: reference_of(a, b, how) for how in ("fp32", "bf16", "fp32 toward_zero", "1-8-22", "1-8-16 stochastic")
    }
    monkeypatch.setattr(reference, "multiply", fail)
    for how, expected in wanted.items():
        assert torch.equal(gemm(a, b, accumulate=AccumulateSpec.parse(how)), expected), how
    for name in PLAIN:
        for accumulate in ("fp32", "bf16", "1-6-9"):
            gemm(a, b, a_format=name, b_format=name, accumulate=accumulate)
    for accumulate in ("int32", "int16 wrap"):
        gemm(a, b, a_format="int8", b_format="int4", accumulate=AccumulateSpec.parse(accumulate))


def reference_of(a: Tensor, b: Tensor, how: str) -> Tensor:
    return reference.multiply(a, b, GemmSpec(accumulator=AccumulateSpec.parse(how)))
