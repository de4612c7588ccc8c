"""The emulation kernel is the reference, bit for bit: operands, accumulators, chunks, layouts, NaN and Inf."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.kernels.cast.grid import fast_to_grid
from runtime.kernels.cpu.accumulate import (
    accumulate_library,
    declines,
    is_direct,
    multiply,
    never_underflows,
)
from runtime.numerics import reference_gemm as reference
from runtime.numerics.formats import get_format
from runtime.numerics.grid import round_to_grid
from runtime.numerics.reference_gemm import RandomKey
from runtime.numerics.specs import (
    PRODUCTS,
    ROUNDINGS,
    AccumulateModel,
    AccumulateSpec,
    GemmSpec,
    Product,
    QuantSpec,
    Rounding,
)

pytestmark = pytest.mark.skipif(accumulate_library() is None, reason="needs a C++ compiler and AVX-512")

ONE_BY_ONE: tuple[AccumulateModel, ...] = ("per_mac", "per_chunk")
OPERANDS = [
    ("e4m3", "e4m3"), ("hfp8-143", "e5m2"), ("dlfloat16", "dlfloat16"), ("int8", "e4m3"), ("fp16", "fp16"),
    ("bf16", "bf16"), ("fp32", "fp32"), ("1-8-1", "1-8-1"), ("nf4", "fp4-radix4-odd"),
]  # fmt: skip
ACCUMULATORS = ["dlfloat16", "1-6-9", "fp16", "bf16", "e5m2", "1-8-14", "e4m3", "tf32", "fp32", "1-8-21", "1-8-2"]


def _spec(lhs: str, rhs: str, accumulate: str, chunk: int | None = None) -> GemmSpec:
    return GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), AccumulateSpec(accumulate, chunk))


def _operands(spec: GemmSpec, m: int, k: int, n: int, size: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = fast_to_grid(torch.randn(m, k, generator=generator) * size, spec.lhs, None)
    return a, fast_to_grid(torch.randn(k, n, generator=generator) * size, spec.rhs, None)


@pytest.mark.parametrize("accumulate", ACCUMULATORS)
@pytest.mark.parametrize("operands", OPERANDS, ids="-".join)
def test_equals_the_reference(operands: tuple[str, str], accumulate: str) -> None:
    for k, chunk in ((0, None), (1, None), (33, None), (130, 64), (64, 1), (70, 7)):
        spec = _spec(*operands, accumulate, chunk)
        assert declines(spec) is None
        for size in (1.0, 2.0**-8, 30.0):
            a, b = _operands(spec, 9, k, 37, size)
            assert torch.equal(multiply(a, b, spec), reference.multiply(a, b, spec)), (k, chunk, size)


def test_which_sums_need_no_care_before_they_are_rounded() -> None:
    assert is_direct(_spec("hfp8-143", "e5m2", "fp16"))
    assert is_direct(_spec("e4m3", "e4m3", "1-6-9"))
    assert not is_direct(_spec("dlfloat16", "dlfloat16", "1-6-9"))
    assert not is_direct(_spec("bf16", "bf16", "bf16"))


def test_which_sums_may_be_too_small_for_full_precision() -> None:
    assert never_underflows(_spec("e4m3", "e4m3", "1-6-9"))  # 2^-18, a multiple of 2^-39
    assert not never_underflows(_spec("e5m2", "e5m2", "dlfloat16"))  # 2^-32, and dlfloat16 has no subnormals
    assert not never_underflows(_spec("hfp8-143", "e5m2", "fp16"))  # 2^-29 against 2^-24


def test_fused_multiply_add_rounds_once() -> None:
    """design.md section 3: through an fp32 sum this would end at 1.001953125."""
    a = torch.tensor([[1.0, 1 + 2.0**-9]])
    b = torch.tensor([[1.0], [(1 + 510 / 512) * 2.0**-11]])
    assert multiply(a, b, _spec("dlfloat16", "dlfloat16", "dlfloat16")).item() == 1.0


@pytest.mark.parametrize("accumulate", ["1-6-9", "dlfloat16"])
def test_layout_threads_and_batches_change_nothing(accumulate: str) -> None:
    spec = _spec("e4m3", "e4m3", accumulate, 64)
    a, b = _operands(spec, 50, 200, 70, 1.0)
    expected = multiply(a, b, spec)
    assert torch.equal(multiply(a.t().contiguous().t(), b.t().contiguous().t(), spec), expected)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(multiply(a, b, spec), expected)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(multiply(a.expand(2, 3, 50, 200), b, spec)[1, 2], expected)


@pytest.mark.parametrize("accumulate", ["1-6-9", "dlfloat16", "e5m2"])
def test_nan_stays_and_inf_saturates_as_in_the_reference(accumulate: str) -> None:
    spec = _spec("e4m3", "e4m3", accumulate, 16)
    a, b = _operands(spec, 9, 40, 20, 1.0)
    a[1, 3], a[2, 5], a[4, 0] = float("nan"), float("inf"), -float("inf")
    result, expected = multiply(a, b, spec), reference.multiply(a, b, spec)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


def test_swamping_and_its_cure() -> None:
    ones = torch.ones(1, 4096)
    assert multiply(ones, ones.t(), _spec("e4m3", "e4m3", "1-6-9")).item() == 1024
    assert multiply(ones, ones.t(), _spec("e4m3", "e4m3", "1-6-9", 64)).item() == 4096


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec("e4m3", "e4m3", "1-8-22"), "no room in fp32"),
        (GemmSpec(accumulator=AccumulateSpec("fp32", rounding="nearest_away")), "no room in fp32"),
        (GemmSpec(accumulator=AccumulateSpec("1-8-16", rounding="stochastic")), "16 random digits"),
        (_spec("int8", "int8", "int32"), "sums in floats"),
    ],
)
def test_what_it_cannot_do_exactly_it_declines(spec: GemmSpec, reason: str) -> None:
    assert reason in (declines(spec) or "")


@pytest.mark.parametrize("accumulate", ["fp32", "bf16", "1-6-9", "dlfloat16", "1-8-2"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_and_sums_anywhere_in_fp32(product: Product, accumulate: str) -> None:
    """Products of 48 bits, from 2^-298 to 2^256: below the quantum of fp32, beyond its largest value; NaN of Inf."""
    generator = torch.Generator().manual_seed(5)

    def anywhere(*shape: int) -> Tensor:
        size = torch.exp2(torch.randint(-149, 127, shape, generator=generator).double())
        return (torch.randn(shape, generator=generator).double() * size).float()

    a, b = anywhere(9, 40), anywhere(40, 37)
    a[1, 3], a[2, 5], a[4, 0] = float("nan"), float("inf"), -float("inf")
    b[0, 3] = 0
    for mode, model, size in itertools.product(ROUNDINGS, ONE_BY_ONE, (1.0, 2.0**-60)):
        spec = GemmSpec(accumulator=AccumulateSpec(accumulate, 7, mode, product, model))
        if declines(spec) is None:
            found, expected = multiply(a * size, b, spec), reference.multiply(a * size, b, spec)
            assert torch.equal(found.isnan(), expected.isnan())
            is_number = ~expected.isnan()
            assert torch.equal(found[is_number].view(torch.int32), expected[is_number].view(torch.int32)), (mode, model)


def test_fp32_sums_are_the_multiply_adds_of_the_unit() -> None:
    """1 + 2^-24 + 2^-48 is above the tie that 1 + 2^-24 is; the product alone, rounded, is the tie."""
    a = torch.tensor([[1.0, 1 + 2.0**-23]])
    b = torch.tensor([[1.0], [2.0**-24 + 2.0**-47]])
    assert multiply(a, b, GemmSpec()).item() == 1 + 2.0**-23
    assert multiply(a[:, :1], b[:1], GemmSpec()).item() == 1
    rounded = GemmSpec(accumulator=AccumulateSpec("fp32", product="rounded"))
    assert (
        multiply(torch.tensor([[1.0, 1 + 2.0**-12]]), torch.tensor([[1.0], [2.0**-24 * (1 - 2.0**-12)]]), rounded) == 1
    )


@pytest.mark.parametrize("accumulate", ["dlfloat16", "1-6-9", "bf16", "e5m2", "fp16", "1-6-11"])
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_every_way_to_add_equals_the_reference(mode: Rounding, accumulate: str) -> None:
    """Stochastic bits included: K crosses groups of eight draws, N two vectors, and the stream needs all its words."""
    key = RandomKey(2**40 + 5, 3, (7 << 33) + 11)
    for product, model, (k, chunk) in itertools.product(PRODUCTS, ONE_BY_ONE, ((1, None), (20, 7), (70, 32))):
        how = AccumulateSpec(accumulate, chunk, mode, product, model)
        spec = GemmSpec(QuantSpec("e4m3"), QuantSpec("e5m2"), how)
        assert declines(spec) is None
        for size in (1.0, 2.0**-14, 30.0):
            a, b = _operands(spec, 9, k, 37, size)
            assert torch.equal(multiply(a, b, spec, key), reference.multiply(a, b, spec, key)), (how, k, size)


@pytest.mark.parametrize("text", ["1-6-9 stochastic", "1-6-9/8 per_chunk", "1-6-9/8 toward_zero rounded"])
def test_nan_and_inf_in_every_way_to_add(text: str) -> None:
    spec = GemmSpec(QuantSpec("e4m3"), QuantSpec("e4m3"), AccumulateSpec.parse(text))
    a, b = _operands(spec, 9, 40, 20, 1.0)
    a[1, 3], a[2, 5], a[4, 0] = float("nan"), float("inf"), -float("inf")
    result, expected = multiply(a, b, spec), reference.multiply(a, b, spec)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("accumulate", ["fp16", "1-6-9", "bf16", "dlfloat16"])
@pytest.mark.parametrize("mode", ["nearest_even", "nearest_away"])
def test_a_sum_of_two_values_of_the_accumulator_is_rounded_once(mode: Rounding, accumulate: str) -> None:
    """What makes rounded products direct: fp32's rounding of such a sum makes no tie. Sums in float64 are exact."""
    generator = torch.Generator().manual_seed(7)
    size = torch.exp2(torch.randint(-12, 13, (2**16, 2), generator=generator).double())
    pairs = round_to_grid((torch.rand(2**16, 2, generator=generator) + 1) * size, get_format(accumulate), mode).float()
    pairs *= 1 - 2 * torch.randint(0, 2, (2**16, 2), generator=generator)
    spec = GemmSpec(QuantSpec(accumulate, mode), QuantSpec("int1"), AccumulateSpec(accumulate, None, mode, "rounded"))
    assert is_direct(spec) or mode == "nearest_away"  # whose sums are cut
    expected = round_to_grid(pairs.double().sum(1, keepdim=True), get_format(accumulate), mode).float()
    assert torch.equal(multiply(pairs, torch.ones(2, 1), spec), expected)


@pytest.mark.parametrize("accumulate", ["fp32", "1-8-22"])
@pytest.mark.parametrize("product", ["fma", "rounded"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_sums_cut_to_fp32_are_the_adders_own(chunk: int | None, product: Product, accumulate: str) -> None:
    """What is finite stops at the largest value; Inf, NaN and products below 2^-149 are as in the reference."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(9, 40, generator=generator), torch.randn(40, 35, generator=generator)
    wild = a * torch.exp2(torch.randint(-148, 127, a.shape, generator=generator).float())
    special = a.clone()
    special[0, 3], special[1, 5], special[2, 4] = torch.inf, torch.nan, -torch.inf
    spec = GemmSpec(accumulator=AccumulateSpec(accumulate, chunk, "toward_zero", product))
    assert declines(spec) is None
    for left in (a, wild, special, a * 2.0**127):
        found, wanted = multiply(left, b, spec), reference.multiply(left, b, spec)
        assert bool(((found.view(torch.int32) == wanted.view(torch.int32)) | (found.isnan() & wanted.isnan())).all())
