"""Tracers, fake tensors and compiled code see all that a compiled model does: every op has shapes, none is missed."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lpcompile import lpcompile
from lpcompile.frontends.joint.compiling import compile_joint
from tests.machine_facts import needs_compiler

SHIPPED = ("bf16", "fp16", "fp32", "fp32-emulated", "fp8-rowwise", "hfp8", "int8")
LAYER = """
version: 1
name: traced
source: a test
rules:
  - match: {{name: "*"}}
    fwd:  {{x: {cast}, w: {cast}{sums}}}
    bwd:  {{dy: {cast}, w: {cast}{sums}}}
    grad: {{dy: {cast}, x: {cast}{sums}}}
"""
POW2 = "{format: e4m3, scale: {granularity: GRANULARITY, rule: pow2}}"


def _policy(name: str, tmp_path: Path) -> Any:
    """A shipped one, or `CAST` or `CAST accumulate` for every operand."""
    if name in SHIPPED:
        return name
    cast, _, sums = name.partition(" + ")
    text = LAYER.format(cast=cast, sums=f", accumulate: {sums}" if sums else "")
    (tmp_path / "traced.yaml").write_text(text)
    return tmp_path / "traced.yaml"


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32), nn.Linear(32, 8))


POLICIES = (*SHIPPED, "mxfp8", "nvfp4", "e4m3 + {format: 1-6-9, chunk: 8}", POW2.replace("GRANULARITY", "tensor"))


@pytest.mark.parametrize("policy", POLICIES)
def test_make_fx_gives_a_graph_with_the_results_of_eager(policy: str, tmp_path: Path) -> None:
    model, x = lpcompile(_net(), _policy(policy, tmp_path)), torch.randn(2, 3, 4, 4)
    graph = make_fx(lambda x: model(x))(x)
    for other in (x, 3 * x + 1):
        assert torch.equal(graph(other), model(other))


@pytest.mark.parametrize("policy", POLICIES)
def test_fake_tensors_go_forward_and_back(policy: str, tmp_path: Path) -> None:
    model, x = lpcompile(_net(), _policy(policy, tmp_path)), torch.randn(2, 3, 4, 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
        y.sum().backward()
    assert (y.shape, y.dtype) == ((2, 8), torch.float32)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_on_meta_runs_on_meta(policy: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model, x = _net(), torch.randn(2, 3, 4, 4)
    y = lpcompile(model, _policy(policy, tmp_path))(x)
    y.sum().backward()
    assert (y.device.type, y.shape) == ("meta", (2, 8))
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())


def _spoiled(kind: str, spoiled: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    is_conv = kind == "conv"
    leaf: Any = nn.Conv2d(8, 6, 1) if is_conv else nn.Linear(8, 6)
    x, dy = (torch.randn(4, size, *((1, 1) if is_conv else ())) for size in (8, 6))
    if spoiled == "w":
        leaf.weight.data[2, 3] = math.nan
    else:
        {"x": x, "dy": dy}[spoiled][1, 3] = math.nan
    return nn.Sequential(leaf), x.requires_grad_(), dy


def _nan_of(run: Any, model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x.grad = None
    model.zero_grad()
    y = run(x)
    y.backward(dy)
    return [each.isnan() for each in (y, x.grad, *(parameter.grad for parameter in model.parameters()))]  # type: ignore[union-attr]


@pytest.mark.parametrize("spoiled", ["x", "w", "dy"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("front", ["aot_eager", "joint", pytest.param("inductor", marks=pytest.mark.slow)])
def test_int8_keeps_nan_where_it_is_compiled(front: str, kind: str, spoiled: str, tmp_path: Path) -> None:
    policy = _policy("{format: int8, scale: {granularity: tensor, rule: amax}}", tmp_path)
    for each in ("int8", policy):
        model, x, dy = _spoiled(kind, spoiled)
        wanted = _nan_of(lpcompile(model, each), model, x, dy)
        assert any(bool(nan.any()) for nan in wanted)
        model, x, dy = _spoiled(kind, spoiled)
        if front == "joint":
            run: Any = compile_joint(model, each, backend="aot_eager")
        else:
            run = torch.compile(lpcompile(model, each), backend=front)
        found = _nan_of(run, model, x, dy)
        for one, other in zip(found, wanted):
            assert torch.equal(one, other)
        torch._dynamo.reset()


SHAPES: dict[str, Any] = {
    "linear": lambda: (nn.Linear(16, 24), (4, 16)),
    "linear3": lambda: (nn.Linear(33, 17), (2, 3, 33)),
    "wide": lambda: (nn.Linear(64, 64, bias=False), (64, 64)),
    "one": lambda: (nn.Linear(16, 8), (1, 16)),
    "conv1d": lambda: (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    "transposed": lambda: (nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 5, 5)),
}


@needs_compiler
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("name", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SHAPES)[1:])])
def test_scales_that_are_powers_of_two_compile(name: str, granularity: str, tmp_path: Path) -> None:
    policy = _policy(POW2.replace("GRANULARITY", granularity), tmp_path)
    results = []
    for backend in ("inductor", None):
        torch.manual_seed(0)
        leaf, shape = SHAPES[name]()
        model = lpcompile(nn.Sequential(leaf), policy)
        run: Any = torch.compile(model, backend=backend) if backend else model
        x = torch.randn(shape, requires_grad=True)
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())])
        torch._dynamo.reset()
    for compiled, eager in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)
