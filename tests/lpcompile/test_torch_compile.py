"""A compiled model under torch.compile: one graph, the bits of eager code where nothing else is fused, and no
compilation per step.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lpcompile import lpcompile


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))


def _gradients(run: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("policy", ["fp8-rowwise", "hfp8", "int8"])
def test_one_graph_with_the_bits_of_eager_code(policy: str) -> None:
    model, x = _model(), torch.randn(64, 32)
    lpcompile(model, policy)
    expected = _gradients(model, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(_gradients(compiled, model, x), expected, strict=True):  # type: ignore[arg-type]
        assert torch.equal(got, want)


def test_steps_are_not_compiled_again() -> None:
    model, x = _model(), torch.randn(64, 32)
    lpcompile(model, "fp8-rowwise")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(x)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_llama_is_one_graph_in_inductor() -> None:
    from tests.zoo.models import ZOO, build

    model, batch = build("llama"), ZOO["llama"].batch(0)
    lpcompile(model, "fp8-rowwise", example_kwargs=batch)
    want = model(**batch)["loss"]
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True)(**batch)["loss"]
    loss.backward()
    assert abs(float(loss) - float(want)) < 1e-4
