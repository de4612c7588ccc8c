"""keep: codes in a joint graph, and under torch's own compiler: forward hands codes to backward, and no bit changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import Policy, compile_joint, load_policy, lpcompile
from tests.machine_facts import needs_compiler

BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy_of(name: str, keep: str) -> Policy:
    rule = {"fwd": {"x": name, "w": name}, "bwd": {"dy": name, "w": name}, "grad": {"dy": name, "x": name}}
    return load_policy(Policy.model_validate({"version": 1, "rules": [rule], "keep": keep}))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 160), nn.GELU(), nn.Linear(160, 64))


def trained(model: nn.Module, call: Any, num_rows: int = 96) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Results and gradients; what autograd kept beside parameters, by storage."""
    torch.manual_seed(1)
    x, saved = torch.randn(num_rows, 64, requires_grad=True), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(each: Tensor) -> Tensor:
        place = each.untyped_storage().data_ptr()
        if place not in own:
            saved[place] = each.detach()
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        y = call(x)
    y.square().sum().backward()
    gradients: list[Any] = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *gradients], saved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "bits"), [("e4m3", 8), ("int4", 4), ("mxfp4", 4.25)])
def test_the_joint_graph_hands_on_codes(backend: Any, name: str, bits: float) -> None:
    found = {}
    for keep in ("grid", "codes"):
        torch._dynamo.reset()
        model = compile_joint(lpcompile(mlp(), policy_of(name, keep)), backend=backend, fullgraph=True)
        found[keep], saved = trained(model, model)
    assert all(torch.equal(a, b) for a, b in zip(found["grid"], found["codes"], strict=True))
    codes = [each.numel() for each in saved.values() if each.dtype == torch.uint8]
    flags = 2 if name == "int4" else 0
    assert sum(codes) == 96 * (64 + 160) * bits / 8 + flags
    others = [each for each in saved.values() if each.dtype != torch.uint8]
    assert [each.shape for each in others] == [(96, 160)]  # what GELU reads; no cast of a weight


@pytest.mark.parametrize("name", ["e4m3", "int4", "mxfp4"])
def test_torchs_own_compiler_makes_one_graph_of_it(name: str) -> None:
    model = lpcompile(mlp(), policy_of(name, "codes"))
    wanted, _ = trained(model, model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    found, saved = trained(model, compiled)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert sum(each.dtype == torch.uint8 for each in saved.values()) == 2


def test_sizes_may_be_symbols() -> None:
    model = compile_joint(lpcompile(mlp(), policy_of("mxfp4", "codes")), backend="aot_eager", dynamic=True)
    for num_rows in (96, 33):
        found, _ = trained(model, model, num_rows)
        torch._dynamo.reset()
        plain = lpcompile(mlp(), policy_of("mxfp4", "grid"))
        wanted, _ = trained(plain, plain, num_rows)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        model.zero_grad()


def test_a_nan_without_a_code_is_not_lost() -> None:
    """Compiled code does not look at values: all that was kept is NaN then."""
    model = compile_joint(lpcompile(mlp(), policy_of("int4", "codes")), backend="aot_eager")
    x = torch.randn(96, 64)
    x[3, 5] = torch.nan
    model(x).sum().backward()
    assert model[0].weight.grad.isnan().all()  # type: ignore[index]
