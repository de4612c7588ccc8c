"""Layers with a side of length 0 compute, and learn, what torch's do."""

import copy

import pytest
import torch
from torch import nn

from lpcompile import Policy, lpcompile


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("policy", ["hfp8", "int8", "fp8-rowwise", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(0, 4, (3,)), (0, 4, (2, 3)), (4, 0, (2, 3)), (4, 3, (0,))])
def test_values_and_gradients_are_those_of_torch(policy: str, inputs: int, outputs: int, rows: tuple[int, ...]) -> None:
    plain, layer = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
    layer.load_state_dict(plain.state_dict())
    lpcompile(layer, policy)
    results = []
    for each in (plain, layer):
        x = torch.ones(*rows, inputs, requires_grad=True)
        y = each(x)
        y.float().sum().backward()
        results.append((y, x.grad, each.weight.grad, each.bias.grad))
    for name, wanted, found in zip(("y", "dx", "dw", "db"), *results):
        assert found is not None
        assert found.shape == wanted.shape, name
        assert torch.allclose(found.float(), wanted, atol=0.02), name


@pytest.mark.parametrize("sums", ["1-6-9", "bf16", "fp32"])
@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3, stride=2), nn.Conv2d(4, 8, 3, groups=2, padding=1)]
)
def test_convolutions_of_no_image(layer: nn.Module, sums: str) -> None:
    cast = {"accumulate": sums}
    rule = {"fwd": {"x": "e4m3", "w": "e4m3", **cast}, "bwd": {"dy": "e5m2", "w": "e4m3", **cast}}
    rule["grad"] = {"dy": "e5m2", "x": "e4m3", **cast}
    compiled = lpcompile(copy.deepcopy(layer), Policy.model_validate({"rules": [{"match": {}, **rule}]}))
    x = torch.ones(0, 4, *(9, 5)[: layer.weight.dim() - 2], requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert y.shape == layer(x).shape
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert compiled.weight.grad.shape == layer.weight.shape
    assert not compiled.weight.grad.any()
