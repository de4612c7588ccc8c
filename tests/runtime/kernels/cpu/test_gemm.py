"""The C++ GEMM against float64 products: layouts, ragged sizes, bias, the same bits for any threads."""

import pytest
import torch
from torch import Tensor

from runtime.errors import LpError, NotSupported
from runtime.kernels.cpu import gemm
from runtime.kernels.cpu.gemm import SOURCES, gemm_library, load_gemm, multiply

pytestmark = pytest.mark.skipif(gemm_library() is None, reason="needs a C++ compiler, AVX512-BF16")

SIZES = [(1, 1, 1), (5, 7, 3), (12, 32, 32), (13, 33, 45), (100, 300, 70), (97, 1, 513), (3, 0, 4), (200, 515, 600)]


def _column_major(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def _embedded(*shape: int, seed: int) -> Tensor:
    """Random bf16 values in fp32, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-20, 20, shape, generator=generator)
    return torch.ldexp(torch.randn(*shape, generator=generator), size).bfloat16().float()


KERNELS = [source for source in SOURCES if load_gemm(source)]


@pytest.fixture(params=KERNELS, ids=lambda source: source.stem, autouse=True)
def _every_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs on every kernel that this CPU can run, and not only on the fastest."""
    monkeypatch.setattr(gemm, "gemm_library", lambda: load_gemm(request.param))


LAYOUTS = {
    "NN": (torch.clone, torch.clone),
    "TN": (_column_major, torch.clone),
    "NT": (torch.clone, _column_major),
    "TT": (_column_major, _column_major),
    "bf16 x fp32": (Tensor.bfloat16, torch.clone),
    "bf16 x bf16 T": (Tensor.bfloat16, lambda x: _column_major(x).bfloat16()),
    "strided": (lambda x: x.repeat_interleave(2, 1)[:, ::2], lambda x: x.repeat_interleave(3, 0)[::3]),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_bf16_values_within_the_bound_of_fp32_sums(m: int, k: int, n: int, layout: str, with_bias: bool) -> None:
    a, b = _embedded(m, k, seed=1), _embedded(k, n, seed=2)
    bias = torch.randn(n) if with_bias else None
    left, right = LAYOUTS[layout]
    result = multiply(left(a), right(b), bias)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    magnitude = a.abs().double() @ b.abs().double() + (0 if bias is None else bias.abs().double())
    assert result.dtype == torch.float32
    assert ((result - exact).abs() <= (k + 1) * 2.0**-24 * magnitude).all()


def test_bits_do_not_depend_on_threads_or_layout() -> None:
    a, b = _embedded(150, 700, seed=1), _embedded(700, 130, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = multiply(a, b)
        torch.set_num_threads(2)
        two = multiply(_column_major(a), _column_major(b))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_nan_and_inf_reach_their_row_only() -> None:
    a, b = torch.ones(14, 40), torch.ones(40, 50)
    a[3, 5], a[7, 1] = float("nan"), float("inf")
    result = multiply(a, b)
    assert result[3].isnan().all()
    assert (result[7] == float("inf")).all()
    assert torch.equal(result[[0, 1, 2, 4, 5, 6]], torch.full((6, 50), 40.0))


def test_tensors_without_memory_are_refused() -> None:
    a, b = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
    with pytest.raises(LpError, match="no memory"):
        multiply(a, b)


@pytest.mark.skipif(gemm.int8_library() is None, reason="needs a CPU with AMX tiles")
@pytest.mark.parametrize("layout", ["NN", "TN", "NT", "TT", "strided"])
@pytest.mark.parametrize(("m", "k", "n"), [*SIZES, (64, 1100, 96), (33, 2049, 31)])
def test_int8_sums_are_exact(m: int, k: int, n: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (k, n), dtype=torch.int8, generator=generator)
    left, right = LAYOUTS[layout]
    result = gemm.multiply_int8(left(a), right(b))
    assert torch.equal(result, (a.long() @ b.long()).float())


def test_a_sum_that_could_leave_int32_is_refused() -> None:
    with pytest.raises(NotSupported, match="can overflow int32"):
        gemm.multiply_int8(torch.zeros(1, 200_000, dtype=torch.int8), torch.zeros(200_000, 1, dtype=torch.int8))
