"""Dispatch: what runs where, how it is graded, and that a refusal names every backend's reason."""

import pytest

from runtime.errors import NotSupported
from runtime.kernels.cpu import accumulate as cpu_accumulate
from runtime.kernels.cpu import gemm as cpu_gemm
from runtime.kernels.dispatch import GemmRequest, choose
from runtime.numerics.specs import AccumulateSpec, GemmSpec, QuantSpec


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
        (_request("int8", "int8", "int32"), "int8", "bitwise"),
        (_request("e4m3", "e4m3", "dlfloat16", chunk=64), "sequential", "emulated"),
    ],
)
def test_choice_without_the_cpu_kernel(request_: GemmRequest, method: str, fidelity: str) -> None:
    choice = choose(request_)
    assert (choice.method, choice.fidelity) == (method, fidelity)


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
        (_request("e4m3", "e4m3", "1-8-22"), "reference", "sequential", "emulated"),
    ],
)
def test_choice_with_the_cpu_kernel(
    monkeypatch: pytest.MonkeyPatch, request_: GemmRequest, backend: str, method: str, fidelity: str
) -> None:
    monkeypatch.setattr(cpu_gemm, "gemm_library", object)
    monkeypatch.setattr(cpu_gemm, "int8_library", object)
    monkeypatch.setattr(cpu_accumulate, "accumulate_library", object)
    choice = choose(request_)
    assert (choice.backend, choice.method, choice.fidelity) == (backend, method, fidelity)


@pytest.mark.usefixtures("_no_cpu_kernel")
def test_a_missing_kernel_is_told() -> None:
    assert "cpu declined: no C++ compiler, or a CPU without AVX512-BF16" in choose(_request("e4m3", "e4m3")).reason


def test_the_reason_tells_who_declined() -> None:
    assert (
        "torch_native declined: hardware sums in fp32, not dlfloat16 in chunks of 64"
        in choose(_request("e4m3", "e4m3", "dlfloat16", chunk=64)).reason
    )


def test_refusal_names_every_reason() -> None:
    with pytest.raises(
        NotSupported,
        match=r"int8 operands, not int8 x e4m3; cpu_emulation: it sums in floats.*; reference: .* not e4m3",
    ):
        choose(_request("int8", "e4m3", "int32"))


def test_convolutions_are_emulated_too() -> None:
    for sums in (("int8", "int8", "int32"), ("e4m3", "e4m3", "dlfloat16")):
        assert choose(_request(*sums, kind="conv")).fidelity == "emulated"
