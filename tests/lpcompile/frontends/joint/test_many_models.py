"""Many models of one process: the limit of torch.compile on graphs is that of a model, and not that of all together."""

from collections.abc import Iterator
from inspect import signature

import pytest
import torch
from torch import Tensor, nn

from lpcompile import compile_joint, lpcompile, report


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        y: Tensor = self.b(x)
        return y


def _rewritten(model: nn.Module) -> int:
    compile_joint(lpcompile(model, "fp8-rowwise", strict=True), backend="aot_eager")
    model(torch.randn(3, 8)).sum().backward()
    return report(model).num_rewritten


def test_every_model_of_many_is_rewritten() -> None:
    assert [_rewritten(nn.Sequential(nn.Linear(8, 8))) for _ in range(14)] == [2] * 14


@pytest.mark.skipif("isolate_recompiles" not in signature(torch.compile).parameters, reason="torch counts all together")
def test_every_model_of_many_is_rewritten_behind_a_graph_break() -> None:
    assert [_rewritten(nn.Sequential(_Broken(), nn.ReLU())) for _ in range(18)] == [5] * 18
