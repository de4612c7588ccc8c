"""Fused products in compiled models: with and without the pass every output and gradient has the same bits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import lpcompile
from lpcompile.compiled import get_compiled
from passes.ir.parser import parse_program
from passes.ir.printer import print_program
from passes.ir.program import Program
from passes.pipelines import PIPELINES
from runtime.ops.dialect import OPS
from tests.lpcompile.program_results import calls_by_graph
from tests.lpcompile.test_fold_batchnorm import _varied
from tests.passes.ir.xdsl_dialect import verify_text
from tests.zoo.models import ZOO, build

POLICIES = ["fp32-emulated", "hfp8", "int8", "fp8-rowwise", "bf16"]


class Block(nn.Module):
    """A sum and an activation after layers, as functions, methods, in place and as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32, bias=number != 1) for number in range(4))
        self.act, self.gelu = nn.ReLU(inplace=True), nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        y = self.b(h)
        y += x  # x: also the layer's own input two lines above, and used again below
        z = F.relu(x + self.c(y))
        return self.gelu(self.d(z)) + x


def _activations(program: Program) -> list[str]:
    """What is fused into each product, "+" for a sum."""
    found = []
    for unit in program.units.values():
        for node in unit.graph.nodes:
            if node.target is OPS["lp.gemm"].run:
                found.append(("+" if node.args[-1] is not None else "") + str(node.kwargs.get("activation", "")))
    return found


def _without_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, text in PIPELINES.items():
        monkeypatch.setitem(PIPELINES, mode, text.replace(",fuse,", ","))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_output_has_the_bits_of_the_unfused_model(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 32)
    fused = lpcompile(copy.deepcopy(model), policy, (x,), mode="infer")
    assert _activations(get_compiled(fused).phase.program) == ["relu", "+", "+relu", "gelu-tanh"]
    _without_fuse(monkeypatch)
    apart = lpcompile(copy.deepcopy(model), policy, (x,), mode="infer")
    assert not any(_activations(get_compiled(apart).phase.program))
    with torch.no_grad():
        for each in (x, torch.randn(5, 32)):
            assert torch.equal(fused(each), apart(each))
    assert calls_by_graph(fused) == (2, 0)
    if policy == "fp32-emulated":
        with torch.no_grad():
            assert torch.equal(fused(x), model(x))


def test_gradients_are_those_of_the_unfused_model() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 32)
    twins = [lpcompile(copy.deepcopy(model).eval(), "int8", (x,), mode=mode) for mode in ("infer", "train")]  # type: ignore[arg-type]
    for each in twins:
        each(x).square().sum().backward()
    for got, wanted in zip(*(each.parameters() for each in twins), strict=True):
        assert torch.equal(got.grad, wanted.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["int8", "bf16"])
def test_conv_bn_relu_and_conv_bn_add_relu_are_one_product(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _varied(build("resnet18")), ZOO["resnet18"].batch(0)
    fused = lpcompile(copy.deepcopy(model), policy, example_kwargs=batch, mode="infer")
    program = get_compiled(fused).phase.program
    kinds = _activations(program)
    # the first convolution of the network and of each of 8 blocks; the second of every block
    assert (kinds.count("relu"), kinds.count("+relu")) == (9, 8)
    text = print_program(program)
    assert print_program(parse_program(text)) == text
    verify_text(text)
    _without_fuse(monkeypatch)
    apart = lpcompile(copy.deepcopy(model), policy, example_kwargs=batch, mode="infer")
    with torch.no_grad():
        assert torch.equal(fused(**batch)["logits"], apart(**batch)["logits"])
    assert calls_by_graph(fused) == (1, 0)


def test_hooks_that_come_later_see_what_they_saw() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 32)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    seen: list[Tensor] = []
    with torch.no_grad():
        wanted = model(x)
        model.a.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        assert torch.equal(model(x), wanted)
    assert torch.equal(seen[0], F.linear(x, model.a.weight, model.a.bias))
    assert calls_by_graph(model) == (1, 1)


def test_hooks_of_every_module_see_what_they_saw() -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 32)
    lpcompile(model, "fp32-emulated", (x,), mode="infer")
    seen = []
    with torch.no_grad():
        wanted = model(x)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: seen.append((module, y.clone()))
        )
        try:
            assert torch.equal(model(x), wanted)
        finally:
            handle.remove()
    (before_relu,) = (y for module, y in seen if module is model.a)
    assert torch.equal(before_relu, F.linear(x, model.a.weight, model.a.bias))


@pytest.mark.parametrize("policy", ["hfp8", "int8"])
def test_torch_compile_gives_the_same_bits(policy: str) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 32)
    lpcompile(model, policy, (x,), mode="infer")
    with torch.no_grad():
        wanted = model(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
