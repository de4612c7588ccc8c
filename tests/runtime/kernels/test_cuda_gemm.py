"""The cuda backend without a GPU: its choices on fake devices, and its methods on torch's own CPU `_scaled_mm` and
`_int_mm`.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from runtime.kernels import cuda
from runtime.kernels.cuda import FP8, Capability, fp8_containers, multiply_fp8, multiply_int8
from runtime.kernels.registry import Choice, choose, get_kernel
from runtime.kernels.request import GemmRequest
from runtime.numerics import quantize
from runtime.numerics.embedding import finite_values, has_value
from runtime.numerics.formats import get_format
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec, Role
from tests.machine_facts import needs_exact_int8, needs_fp8_product

V100, T4, A100, L40 = (
    Capability(n, c) for n, c in (("V100", (7, 0)), ("T4", (7, 5)), ("A100", (8, 0)), ("L40", (8, 9)))
)
H100, B200, RTX = (Capability(n, c) for n, c in (("H100", (9, 0)), ("B200", (10, 0)), ("RTX5090", (12, 0))))
POW2_ROWS = "e4m3 nearest_even row/pow2"


def _choose(
    monkeypatch: pytest.MonkeyPatch, device: Capability | None, lhs: str, rhs: str, accumulate: str = "fp32",
    out: str = "fp32", kind: str = "linear", role: Role = "fwd",
) -> Choice:  # fmt: skip
    monkeypatch.setattr(cuda, "current_capability", lambda: device)
    spec = GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), AccumulateSpec.parse(accumulate), out)
    return choose(GemmRequest(kind, role, spec, "cuda"))


@pytest.mark.parametrize(
    ("device", "lhs", "rhs", "method", "fidelity", "says"),
    [
        (L40, "e4m3", "e4m3", "cuda_fp8", "bounded", "L40 adds FP8 products in about 14 bits, |error| <= (K+1) 2^-12"),
        (H100, "e4m3", "e4m3", "cuda_fp8", "bounded", "14 bits"),
        (B200, "e4m3", "e2m1", "cuda_fp8", "bounded", "not published"),
        (RTX, "e4m3", "e2m1", "cuda_fp8", "bounded", "not published"),
        (H100, "e4m3", "e5m2", "cuda_fp8", "bounded", "embeds in e4m3 x e5m2"),
        (H100, "e5m2", "e4m3", "cuda_fp8", "bounded", "embeds in e5m2 x e4m3"),
        (H100, "e5m2", "e5m2", "cuda_bf16", "bounded", "no FP8 pair holds e5m2 x e5m2"),
        (H100, "e5m2", "fp4-radix4", "cuda_fp8", "bounded", "embeds in e5m2 x e4m3"),
        (H100, "fp4-radix4", "fp4-radix4", "cuda_fp8", "bounded", "embeds in e4m3 x e4m3"),
        (H100, "int4", "uint4", "cuda_fp8", "bounded", "embeds in e4m3 x e4m3"),
        (H100, "hfp8-143", "e5m2", "cuda_bf16", "bounded", "no FP8 pair holds hfp8-143"),
        (H100, "1-4-3:bias=11,top=nan", "e5m2", "cuda_fp8", "bounded", "e4m3 shifted by 2^4 x e5m2"),
        (H100, "mxfp8", "e4m3", "cuda_bf16", "bounded", "no FP8 pair"),
        (H100, "fp16", "fp16", "cuda_fp16", "bounded", "embed in fp16"),
        (H100, "fp16", "bf16", "fp32", "format-exact", "H100 has no fp16 unit that holds both"),
        (A100, "e4m3", "e4m3", "cuda_bf16", "bounded", "both embed in bf16, whose unit cuts sums"),
        (A100, "bf16", "bf16", "cuda_bf16", "bounded", "(K+1) 2^-22"),
        (A100, "1-6-9", "1-6-9", "fp32", "format-exact", "no fp16 unit that holds both"),
        (T4, "e4m3", "e5m2", "cuda_fp16", "bounded", "both embed in fp16"),
        (V100, "hfp8-143", "e5m2", "cuda_fp16", "bounded", "embed in fp16"),
        (V100, "bf16", "bf16", "fp32", "format-exact", "V100 has no bf16 unit"),
        (Capability("P100", (6, 0)), "e4m3", "e4m3", "fp32", "format-exact", "P100 has no fp16 unit"),
        (None, "e4m3", "e4m3", "fp32", "format-exact", "no CUDA device"),
    ],
)  # fmt: skip
def test_choices_by_device_and_formats(
    device: Capability | None, lhs: str, rhs: str, method: str, fidelity: str, says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    choice = _choose(monkeypatch, device, lhs, rhs)
    assert (choice.kernel, choice.fidelity) == (method, fidelity)
    assert says in choice.reason


@pytest.mark.parametrize(("kind", "role", "lhs", "rhs", "folds"), [
    ("linear", "fwd", POW2_ROWS, "e4m3", False),
    ("linear", "bwd", POW2_ROWS, "e4m3", False),
    ("linear", "bwd", "e4m3", POW2_ROWS, True),
    ("linear", "grad", POW2_ROWS, "e4m3", True),
    ("linear_kn", "fwd", "e4m3", POW2_ROWS, True),
    ("linear_kn", "bwd", "e4m3", POW2_ROWS, False),
    ("linear", "fwd", "e4m3 nearest_even block[1,32]/pow2", "e4m3", True),
])  # fmt: skip
def test_a_scale_inside_the_sum_leaves_fp8(
    kind: str, role: Role, lhs: str, rhs: str, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, free in ((H100, "cuda_fp8"), (V100, "cuda_fp16")):
        choice = _choose(monkeypatch, device, lhs, rhs, kind=kind, role=role)
        assert choice.kernel == (("cuda_bf16" if device is H100 else "fp32") if folds else free)
    assert ("multiplied into the values, which leave FP8" in _choose(
        monkeypatch, H100, lhs, rhs, kind=kind, role=role).reason) == folds  # fmt: skip
    int8 = [text.replace("e4m3", "int8") for text in (lhs, rhs)]
    if folds:  # nobody multiplies int8 grid values that hold such a scale
        for device_type in ("cpu", "cuda"):
            monkeypatch.setattr(cuda, "current_capability", lambda: H100)
            spec = GemmSpec(QuantSpec.parse(int8[0]), QuantSpec.parse(int8[1]), AccumulateSpec("int32"))
            with pytest.raises(Exception, match="leaves the integers"):
                choose(GemmRequest(kind, role, spec, device_type))
    else:
        assert _choose(monkeypatch, H100, *int8, "int32", kind=kind, role=role).kernel == "cuda_int8"


def test_other_facts_decide_too(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(H100, has_mm_out_dtype=False)
    choice = _choose(monkeypatch, old, "bf16", "bf16")
    assert (choice.kernel, "its mm has no out_dtype" in choice.reason) == ("fp32", True)
    assert _choose(monkeypatch, old, "e4m3", "e4m3").kernel == "cuda_fp8"
    assert "triton is not installed" in _choose(monkeypatch, replace(H100, has_triton=False), "e4m3", "e4m3").reason
    assert _choose(monkeypatch, T4, "int8", "int8", "int32").fidelity == "bitwise"
    choice = _choose(monkeypatch, V100, "int8", "int8", "int32")
    assert (choice.kernel, "V100 has no int8 units" in choice.reason) == ("exact_int", True)


def test_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 sums are rounded once to any output; of bf16 operands torch's own GEMM gives bf16, and says how it adds."""
    assert _choose(monkeypatch, H100, "e4m3", "e4m3", out="bf16").kernel == "cuda_fp8"
    choice = _choose(monkeypatch, H100, "bf16", "bf16", out="bf16")
    assert (choice.kernel, choice.fidelity, "splits K" in choice.reason) == ("bf16", "bounded", True)
    assert _choose(monkeypatch, H100, "bf16", "bf16", out="fp16").kernel == "cuda_bf16"


def test_what_is_not_a_plain_matrix_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("conv", "matmul"):
        assert _choose(monkeypatch, H100, "e4m3", "e4m3", kind=kind).backend == "torch_native"
    assert _choose(monkeypatch, H100, "e4m3", "e4m3", "1-6-9/64").backend == "reference"


def test_tf32_is_told_or_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    tf32 = replace(A100, allows_tf32=(False, True))
    conv = _choose(monkeypatch, tf32, "e4m3", "e5m2", kind="conv")
    assert (conv.kernel, conv.fidelity, "embed in tf32" in conv.reason) == ("fp32", "bounded", True)
    assert _choose(monkeypatch, tf32, "e4m3", "e5m2", kind="matmul").fidelity == "format-exact"
    wide = _choose(monkeypatch, tf32, "1-8-15", "e5m2", kind="conv")
    assert (wide.kernel, "may round fp32 operands to tf32" in wide.reason) == ("sequential", True)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "hfp8-143", "1-4-3:bias=11,top=nan", "fp4-radix4", "e2m1", "e3m2",
                                  "int4", "e4m3-fnuz", "e5m2-fnuz", "pow2", "nf4", "1-4-2:bias=20"])  # fmt: skip
def test_containers_hold_every_value_and_miss_none(name: str) -> None:
    """Against all shifts: a format without a container has no shift that serves, by enumeration."""
    row = get_format(name)
    for container in FP8:
        works = {
            shift
            for shift in range(-40, 41)
            if all(has_value(get_format(container), value * 2.0**shift) for value in finite_values(row))
        }
        found = cuda._containers(row).get(container)
        assert (found is not None) == bool(works)
        if found is not None:
            assert found.shift in works
            assert found.shift == 0 or 0 not in works
            values = torch.tensor(finite_values(row))
            assert torch.equal(found.hold(values).float(), values * 2.0**found.shift)


def _operands(lhs: str, rhs: str, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a = quantize(torch.randn(k, m, generator=generator) * 3, lhs).t()
    return a, quantize(torch.randn(k, n, generator=generator) * 3, rhs)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 17), (16, 32, 48), (3, 0, 2), (0, 4, 4)])
@pytest.mark.parametrize(("lhs", "rhs"), [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("1-4-3:bias=11,top=nan", "fp4-radix4")])
@needs_fp8_product
def test_fp8_product_of_any_size_and_layout(lhs: str, rhs: str, m: int, k: int, n: int) -> None:
    a, b = _operands(lhs, rhs, m, k, n)
    multiply = partial(get_kernel("cuda_fp8").multiply, spec=GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs)))
    for right in (b, b.t().contiguous().t(), b.bfloat16()):
        got, want = multiply(a, right), a.double() @ b.double()
        assert (got.dtype, got.shape, got.is_contiguous()) == (torch.float32, (m, n), True)
        assert ((got - want).abs() <= (k + 1) * 2.0**-22 * (a.double().abs() @ b.double().abs())).all()


@needs_fp8_product
def test_fp8_holds_nan() -> None:
    a = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    assert multiply_fp8(a, torch.ones(2, 2)).isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 33, 17), (17, 8, 16), (3, 0, 2), (0, 4, 4)])
@needs_exact_int8
def test_int8_product_of_any_size_and_layout(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch._int_mm

    def as_on_cuda(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        return own(a, b)

    monkeypatch.setattr(torch, "_int_mm", as_on_cuda)
    a, b = _operands("int8", "int8", m, k, n)
    a, b = a.mul(20).clamp(-127, 127).to(torch.int8), b.mul(20).clamp(-127, 127).to(torch.int8)
    for right in (b, b.t().contiguous().t()):
        got = multiply_int8(a, right)
        assert got.dtype == torch.float32
        assert torch.equal(got.double(), a.double() @ b.double())


def test_containers_are_asked_in_order() -> None:
    e2m1 = get_format("e2m1")
    pair = fp8_containers(e2m1, e2m1)
    assert pair is not None
    assert [c.name for c in pair] == ["e4m3", "e4m3"]
