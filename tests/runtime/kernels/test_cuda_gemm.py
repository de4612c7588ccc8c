"""The cuda backend without a GPU: its choices on fake devices, and its FP8 method on torch's own CPU `_scaled_mm`."""

import pytest
import torch

from runtime.kernels import cuda
from runtime.kernels.cuda import Capability, multiply_fp8
from runtime.kernels.dispatch import GemmRequest, choose
from runtime.numerics.casts import quantize
from runtime.numerics.specs import GemmSpec, QuantSpec

A100, H100, B200 = Capability("A100", (8, 0)), Capability("H100", (9, 0)), Capability("B200", (10, 0))


@pytest.mark.parametrize(
    ("device", "lhs", "rhs", "method", "fidelity", "says"),
    [
        (H100, "e4m3", "e4m3", "cuda_fp8", "bounded", "14 bits"),
        (B200, "e4m3", "e2m1", "cuda_fp8", "format-exact", "embed in e4m3"),
        (A100, "e4m3", "e4m3", "cuda_bf16", "format-exact", "no FP8 units"),
        (H100, "e5m2", "e5m2", "cuda_bf16", "format-exact", "not embed in e4m3"),
        (H100, "e4m3 nearest_even block[1,32]/pow2", "e4m3", "cuda_bf16", "bounded", "leave e4m3"),
        (H100, "mxfp8", "e4m3", "cuda_bf16", "bounded", "not embed in e4m3"),
        (H100, "fp16", "fp16", "fp32", "format-exact", "cuda declined"),
        (Capability("V100", (7, 0)), "e4m3", "e4m3", "fp32", "format-exact", "no bf16 units"),
        (None, "e4m3", "e4m3", "fp32", "format-exact", "no CUDA device"),
    ],
)
def test_choices(
    device: Capability | None, lhs: str, rhs: str, method: str, fidelity: str, says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cuda, "current_capability", lambda: device)
    choice = choose(GemmRequest("linear", "fwd", GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs)), "cuda"))
    assert (choice.method, choice.fidelity) == (method, fidelity)
    assert says in choice.reason


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 17), (16, 32, 48), (3, 0, 2), (0, 4, 4)])
def test_fp8_product_of_any_size_and_layout(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    a = quantize(torch.randn(k, m, generator=generator), "e4m3").t()
    b = quantize(torch.randn(k, n, generator=generator), "e4m3")
    for rhs in (b, b.t().contiguous().t()):
        got, want = multiply_fp8(a, rhs), a.double() @ rhs.double()
        assert (got.dtype, got.shape) == (torch.float32, (m, n))
        assert ((got - want).abs() <= k * 2.0**-24 * (a.double().abs() @ rhs.double().abs())).all()
