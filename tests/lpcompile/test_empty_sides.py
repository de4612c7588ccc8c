"""Layers with a side of length 0 compute, and learn, what torch's do."""

import pytest
import torch
from torch import nn

from lpcompile import lpcompile


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
