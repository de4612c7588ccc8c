"""The registry: what runs where, how it is graded, that a refusal names every reason, that a kernel is one object."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lpcompile import load_policy, lpcompile, report
from runtime.errors import NotSupported
from runtime.kernels import registry
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.cpu import accumulate_wide
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.kernels.registry import AbstractKernel, Choice, Declined, choose, get_kernel, kernels, register, unregister
from runtime.kernels.request import GemmRequest
from runtime.numerics import quantize
from runtime.numerics.reference_gemm import NO_KEY, RandomKey
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec
from tests.machine_facts import INT8_IS_EXACT


def _request(
    lhs: str, rhs: str, accumulate: str = "fp32", out: str = "fp32", kind: str = "linear", chunk: int | None = None
) -> GemmRequest:
    how = AccumulateSpec(accumulate, chunk)
    return GemmRequest(kind, "fwd", GemmSpec(QuantSpec.parse(lhs), QuantSpec.parse(rhs), how, out))


@pytest.fixture
def _no_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemm, "gemm_library", lambda: None)
    monkeypatch.setattr(cpu_gemm, "int8_library", lambda: None)
    monkeypatch.setattr(cpu_accumulate, "accumulate_library", lambda: None)
    monkeypatch.setattr(accumulate_wide, "wide_library", lambda: None)


@pytest.mark.usefixtures("_no_cpu_kernel")
@pytest.mark.parametrize(
    ("request_", "method", "fidelity"),
    [
        (_request("fp32", "fp32"), "as_is", "format-exact"),
        (_request("hfp8-143", "e5m2"), "fp32", "format-exact"),
        (_request("bf16", "bf16", out="bf16"), "bf16", "bounded"),
        (_request("bf16", "bf16"), "fp32", "format-exact"),
        (_request("e4m3", "e4m3", out="bf16"), "bf16", "bounded"),
        (_request("fp16", "fp16", out="bf16"), "fp32", "format-exact"),
        (_request("int8", "int8", "int32"), "int8" if INT8_IS_EXACT else "exact_int", "bitwise"),
        (_request("e4m3", "e4m3", "dlfloat16", chunk=64), "sequential", "emulated"),
    ],
)
def test_choice_without_the_cpu_kernel(request_: GemmRequest, method: str, fidelity: str) -> None:
    choice = choose(request_)
    assert (choice.kernel, choice.fidelity) == (method, fidelity)


@pytest.mark.parametrize(
    ("request_", "backend", "method", "fidelity"),
    [
        (_request("hfp8-143", "e5m2"), "cpu", "cpu_bf16", "format-exact"),
        (_request("bf16", "bf16"), "cpu", "cpu_bf16", "bounded"),
        (_request("e4m3 nearest_even block[1,32]/pow2", "e4m3"), "cpu", "cpu_bf16", "bounded"),
        (_request("int8", "int8", "int32"), "cpu", "cpu_int8", "bitwise"),
        (_request("int8", "e4m3"), "cpu", "cpu_bf16", "format-exact"),
        (_request("fp16", "fp16"), "torch_native", "fp32", "format-exact"),
        (_request("bf16", "bf16", out="bf16"), "torch_native", "bf16", "bounded"),
        (_request("e4m3", "e4m3", kind="conv"), "torch_native", "fp32", "format-exact"),
        (_request("e4m3", "e4m3", kind="matmul"), "torch_native", "fp32", "format-exact"),
        (_request("fp32", "fp32"), "torch_native", "as_is", "format-exact"),
        (_request("e4m3", "e4m3", "1-6-9", chunk=64), "cpu_emulation", "cpu_accumulate", "emulated"),
        (_request("e4m3", "e4m3", "1-6-9", kind="matmul"), "cpu_emulation", "cpu_accumulate", "emulated"),
        (
            _request("e4m3 nearest_even block[1,32]/amax", "e4m3", "1-6-9"),
            *("cpu_emulation", "cpu_accumulate_off_grid", "emulated"),
        ),
        (_request("bf16", "bf16", "1-6-9"), "cpu_emulation", "cpu_accumulate", "emulated"),
        (_request("e4m3", "e4m3", "fp32", chunk=64), "cpu_emulation", "cpu_accumulate", "emulated"),
        (_request("e4m3", "e4m3", "1-8-22"), "cpu_emulation", "cpu_accumulate_wide", "emulated"),
        (_request("int8", "int8", "int16"), "cpu_emulation", "cpu_accumulate_wide", "emulated"),
    ],
)
def test_choice_with_the_cpu_kernel(
    monkeypatch: pytest.MonkeyPatch, request_: GemmRequest, backend: str, method: str, fidelity: str
) -> None:
    monkeypatch.setattr(cpu_gemm, "gemm_library", object)
    monkeypatch.setattr(cpu_gemm, "int8_library", object)
    monkeypatch.setattr(cpu_accumulate, "accumulate_library", object)
    monkeypatch.setattr(accumulate_wide, "wide_library", object)
    monkeypatch.setattr(registry, "fault_of", lambda *_: "")
    choice = choose(request_)
    assert (choice.backend, choice.kernel, choice.fidelity) == (backend, method, fidelity)


@pytest.mark.usefixtures("_no_cpu_kernel")
def test_a_missing_kernel_is_told() -> None:
    assert "cpu_bf16 declined: no C++ compiler, or a CPU without AVX512-BF16" in choose(_request("e4m3", "e4m3")).reason


def test_the_reason_tells_who_declined() -> None:
    assert (
        "fp32 declined: hardware sums in fp32, not dlfloat16 in chunks of 64"
        in choose(_request("e4m3", "e4m3", "dlfloat16", chunk=64)).reason
    )


def test_refusal_names_every_reason() -> None:
    with pytest.raises(
        NotSupported,
        match=r"exact_int declined: .* not int8 x e4m3; cpu_accumulate .* it sums in floats.*; sequential .* not e4m3",
    ):
        choose(_request("int8", "e4m3", "int32"))


def test_convolutions_have_kernels_for_matrices_too() -> None:
    assert choose(_request("e4m3", "e4m3", "dlfloat16", kind="conv")).fidelity == "emulated"
    for kind, formats in (("conv", ("int8", "int8")), ("matmul", ("int8", "int4")), ("linear", ("uint8", "int4"))):
        choice = choose(_request(*formats, "int32", kind=kind))
        assert (choice.kernel, choice.fidelity) == ("exact_int", "bitwise")


class Toy(AbstractKernel):
    """A kernel as a file of runtime/kernels/gemm/ defines one: products of e5m2 in float64, each counted."""

    name, backend = "toy", "tests"
    dtype = torch.float64

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def consider(self, request: GemmRequest) -> Choice | Declined:
        if request.spec.lhs.format != "e5m2":
            return Declined("it knows e5m2 alone")
        return self.accepts("bounded", "sums in float64")

    def multiply(self, lhs: Tensor, rhs: Tensor, spec: GemmSpec, key: RandomKey = NO_KEY) -> Tensor:
        self.shapes.append((*lhs.shape, rhs.shape[-1]))
        return torch.matmul(lhs, rhs).float()


@pytest.fixture
def toy() -> Iterator[Toy]:
    kernel = Toy()
    register(kernel, 0)
    yield kernel
    unregister("toy")


def test_a_kernel_is_one_object_and_its_row(toy: Toy, tmp_path: Path) -> None:
    assert kernels()[0] is toy
    policy = tmp_path / "toy.yaml"
    policy.write_text(
        "version: 1\nname: toy\nrules:\n"
        "  - match: {name: '*'}\n"
        "    fwd: {x: {format: e5m2, scale: {granularity: row}}, w: e5m2}\n"
        "    bwd: {dy: e5m2, w: e5m2}\n    grad: {dy: e5m2, x: e5m2}\n"
    )
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    model = lpcompile(layer, load_policy(str(policy)))
    rows = {row.role: row for row in report(model).gemms}
    assert {row.backend for row in rows.values()} == {"tests"}
    assert rows["fwd"].reason == "sums in float64"
    toy.shapes.clear()
    model(x).sum().backward()
    assert toy.shapes == [(4, 16, 8), (4, 8, 16), (8, 4, 16)]
    scale = x.detach().abs().amax(1, keepdim=True) / 57344
    w = quantize(layer.weight.detach(), "e5m2")
    want = (quantize(x.detach() / scale, "e5m2").double() @ w.t().double()).float() * scale + layer.bias
    assert torch.equal(model(x), want)
    assert torch.equal(x.grad, torch.ones(4, 8) @ w)
    assert "it knows e5m2 alone" in choose(_request("e4m3", "e4m3")).reason
    with pytest.raises(NotSupported, match=r'no such kernel.*"toys"'):
        get_kernel("toys")
