"""The kernel of aligned sums is the reference, bit for bit: operands, accumulators, chunks, layouts, Inf and NaN."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime import gemm
from runtime.kernels.cpu.accumulate_aligned import aligned_library, declines, multiply
from runtime.kernels.registry import choose
from runtime.kernels.request import GemmRequest
from runtime.numerics import quantize
from runtime.numerics import reference_gemm as reference
from runtime.numerics.accumulators import ACCUMULATORS
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec

pytestmark = pytest.mark.skipif(aligned_library() is None, reason="needs a C++ compiler")

OPERANDS = [("e4m3", "e4m3"), ("hfp8-143", "e5m2"), ("bf16", "bf16"), ("fp16", "dlfloat16"), ("e2m1", "tf32")]
OTHERS = ["1-8-3/1 toward_zero aligned[1]", "fp32/5 toward_zero aligned[28]", "1-8-20/1024 toward_zero aligned[13]"]


def _spec(lhs: str, rhs: str, how: str) -> GemmSpec:
    return GemmSpec(QuantSpec(lhs), QuantSpec(rhs), AccumulateSpec.parse(how))


def _check(a: Tensor, b: Tensor, spec: GemmSpec) -> None:
    assert declines(spec) is None
    found, expected = multiply(a, b, spec), reference.multiply(a, b, spec)
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan()), spec
    is_number = ~expected.isnan()
    assert torch.equal(found[is_number].view(torch.int32), expected[is_number].view(torch.int32)), spec


def _anywhere(shape: tuple[int, ...], low: int, high: int, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source) * torch.exp2(torch.randint(low, high, shape, generator=source).float())


@pytest.mark.parametrize("how", [*ACCUMULATORS, *OTHERS])
def test_equals_the_reference(how: str) -> None:
    """Sides that no vector divides, K of 0, 1, within a chunk and past several; products in and out of fp32's range."""
    for (lhs, rhs), (m, k, n) in itertools.product(
        OPERANDS, [(3, 0, 2), (1, 1, 1), (5, 1, 3), (7, 33, 17), (66, 70, 9), (2, 130, 40)]
    ):
        source = torch.Generator().manual_seed(m * k)
        for low, high in ((0, 1), (-18, 12), (-149, -60), (-120, 126)):
            a = quantize(_anywhere((m, k), low, high, source), lhs)
            b = quantize(_anywhere((k, n), low, high, source), rhs)
            _check(a, b, _spec(lhs, rhs, how))
            _check(a.t().contiguous().t(), b.t().contiguous().t(), _spec(lhs, rhs, how))


@pytest.mark.parametrize("how", ["hopper-fp8", "hopper-bf16"])
def test_inf_and_nan(how: str) -> None:
    """Of one product, of two that cancel, of 0 times Inf, of a sum beyond fp32; other rows are not touched."""
    source = torch.Generator().manual_seed(1)
    a, b = (quantize(torch.randn(shape, generator=source), "bf16") for shape in ((8, 70), (70, 20)))
    a[0, 3], a[1, 40], a[2, 0], a[2, 69] = float("nan"), float("inf"), float("inf"), -float("inf")
    b[40, 2], b[5, 7] = 0, float("-inf")
    a[4, :], b[:, 11] = 2.0**100, 2.0**27
    _check(a, b, _spec("bf16", "bf16", how))


def test_batches_and_strides() -> None:
    source = torch.Generator().manual_seed(2)
    a = quantize(torch.randn(3, 1, 40, 18, generator=source), "e4m3").transpose(-1, -2)[..., ::2, 1:]
    b = quantize(torch.randn(2, 39, 2 * 11, generator=source), "e5m2")[..., ::2]
    spec = _spec("e4m3", "e5m2", "ada-fp8")
    _check(a, b, spec)
    assert multiply(a, b, spec).shape == (3, 2, 9, 11)
    assert multiply(a[:0], b, spec).shape == (0, 2, 9, 11)


def test_threads_change_nothing() -> None:
    source = torch.Generator().manual_seed(3)
    a, b = (quantize(torch.randn(150, 150, generator=source), "e4m3") for _ in "ab")
    spec, threads = _spec("e4m3", "e4m3", "hopper-fp8"), torch.get_num_threads()
    results = []
    for num in (1, 3):
        torch.set_num_threads(num)
        results.append(multiply(a, b, spec))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_it_is_chosen_and_says_what_it_does() -> None:
    choice = choose(GemmRequest("linear", "fwd", _spec("e4m3", "e4m3", "hopper-fp8")))
    assert (choice.kernel, choice.fidelity) == ("cpu_accumulate_aligned", "emulated")
    assert choice.reason.startswith(
        "adds 32 products and the sum at once, 13 fraction bits of the largest, and cuts to 1-8-13, as hopper-fp8, "
        "bitwise the reference"
    )


def test_gemm_takes_the_name() -> None:
    a, b = torch.randn(9, 80), torch.randn(80, 5)
    spec = _spec("e4m3", "e4m3", "hopper-fp8")
    expected = reference.multiply(quantize(a, "e4m3"), quantize(b, "e4m3"), spec)
    assert torch.equal(gemm(a, b, a_format="e4m3", b_format="e4m3", accumulate="hopper-fp8"), expected)
    keys = {"accumulate": "1-8-13", "chunk": 32, "rounding": "toward_zero", "model": "aligned"}
    assert torch.equal(gemm(a, b, a_format="e4m3", b_format="e4m3", **keys), expected)
