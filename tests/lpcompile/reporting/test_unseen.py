"""What only a call shows is listed before there was one: a router without example inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile import lpcompile, report
from lpcompile.policy.resolve import Policy


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).softmax(-1)


class Table(nn.Embedding):
    """A table that is looked up is no matrix of a product."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.long())


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table(8, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"gate": Router(), "up": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["up"](x) * layer["gate"](x).amax()
        return x


def _policy(**match: Any) -> Policy:
    rules = [{"match": match, "fwd": {"x": "e4m3", "w": "e4m3"}}]
    return Policy.model_validate({"version": 1, "name": "p", "rules": rules})


@pytest.mark.parametrize(("match", "said"), [({"name": "*.up"}, "left alone"), ({"op": "linear"}, "give example")])
def test_a_router_without_examples_is_in_the_report(match: dict[str, Any], said: str) -> None:
    found = report(lpcompile(Routed(), _policy(**match)))
    assert list(found.unseen) == ["layers.0.gate", "layers.1.gate"]
    assert all(said in reason for reason in found.unseen.values())
    assert f"not seen: layers.{{0,1}}.gate (2 x): {found.unseen['layers.0.gate']}" in found.to_text()


def test_a_router_that_a_call_showed_is_a_site() -> None:
    model, x = lpcompile(Routed(), _policy(op="linear")), torch.randn(3, 8)
    model(x)
    assert report(model).unseen == {}
    assert "layers.0.gate.linear_0" in {row.name for row in report(model).gemms}
    assert report(lpcompile(Routed(), _policy(op="linear"), (x,))).unseen == {}
