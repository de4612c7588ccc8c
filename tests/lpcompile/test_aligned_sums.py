"""Compiled layers whose GEMMs add as a GPU does: outputs and every gradient are those of the reference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, lpcompile, report
from lpcompile.errors import PolicyError
from runtime.kernels.cpu.accumulate_aligned import aligned_library
from runtime.numerics import reference_gemm as reference
from runtime.numerics.specs import GemmSpec

needs_library = pytest.mark.skipif(aligned_library() is None, reason="needs a C++ compiler")


def _policy(accumulate: str) -> Policy:
    said = {"accumulate": accumulate}
    e4m3, e5m2 = {"format": "e4m3", "scale": {"granularity": "tensor"}}, "e5m2"
    gemms = {"fwd": {"x": e4m3, "w": e4m3}, "bwd": {"dy": e5m2, "w": e4m3}, "grad": {"dy": e5m2, "x": e4m3}}
    rule = {"match": {"op": ["linear", "conv2d"]}, **{role: gemm | said for role, gemm in gemms.items()}}
    return Policy(name="sums", rules=[rule])


@needs_library
@pytest.mark.parametrize("layer", [nn.Linear(70, 33), nn.Conv2d(5, 8, 3, padding=1)])
@pytest.mark.parametrize("accumulate", ["hopper-fp8", "blackwell-fp8"])
def test_a_layer_and_its_gradients_add_so(accumulate: str, layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of the three GEMMs, which in the second run is the reference's."""
    torch.manual_seed(0)
    x = torch.randn(40, 70) if isinstance(layer, nn.Linear) else torch.randn(2, 5, 9, 7)
    dy = torch.randn(layer(x).shape)

    def run(how: str) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        model = lpcompile(nn.Sequential(copy.deepcopy(layer)), _policy(how))
        y = model(inputs)
        y.backward(dy)
        assert how == "fp32" or {row.fidelity for row in report(model).gemms} == {"emulated"}
        grads = [inputs.grad, *(parameter.grad for parameter in model.parameters())]
        assert all(grad is not None for grad in grads)
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    found, plain, calls = run(accumulate), run("fp32"), []

    def by_reference(a: Tensor, b: Tensor, spec: GemmSpec, *rest: object) -> Tensor:
        calls.append(spec)
        return reference.multiply(a.float(), b.float(), spec)

    monkeypatch.setattr("runtime.kernels.cpu.accumulate_aligned.multiply", by_reference)
    assert all(torch.equal(one, other) for one, other in zip(found, run(accumulate), strict=True))
    assert len(calls) >= 3
    assert not all(torch.equal(one, other) for one, other in zip(found[:3], plain))


def test_a_scale_inside_the_sum_is_refused() -> None:
    """BWD of a linear layer sums over the rows of w: their scales, powers of two or not, would be in the values."""
    w = {"format": "e4m3", "scale": {"granularity": "row", "rule": "pow2"}}
    rule = {
        "match": {"op": "linear"},
        "fwd": {"x": "e4m3", "w": w, "accumulate": "hopper-fp8"},
        "bwd": {"dy": "e5m2", "w": w, "accumulate": "hopper-fp8"},
    }
    model = lpcompile(nn.Sequential(nn.Linear(8, 8)), Policy(name="rows", rules=[rule]))
    rows = {row.role: row for row in report(model).gemms}
    assert rows["fwd"].fidelity == "emulated"
    assert rows["bwd"].fidelity == "refused"
    assert "an aligned sum takes values of e4m3; use granularity tensor or column" in rows["bwd"].reason


def test_operands_of_many_bits_are_refused_by_the_policy() -> None:
    rule = {"match": {"op": "linear"}, "fwd": {"x": "e4m3", "accumulate": "hopper-fp8"}}
    with pytest.raises(PolicyError, match=r"of at most 11 significant bits, not of fp32\. Got x: e4m3 and w: fp32"):
        Policy(name="half", rules=[rule])
