"""Example inputs that say little: tensors without elements."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile
from lpcompile.policy.resolve import Policy


class _Recalling(nn.Module):
    """Attention to a memory, which may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.query(x) @ memory.mT @ memory


@pytest.mark.parametrize(("rows", "kept"), [(0, 5), (4, 0), (0, 0)])
@pytest.mark.parametrize("policy", ["fp32-emulated", "int8", "hfp8", "fp8-rowwise", "accumulator"])
def test_an_example_may_be_empty(policy: str, rows: int, kept: int) -> None:
    """An empty example says nothing of how long sums are."""
    casts = {"x": "e4m3", "w": "e4m3", "accumulate": "auto"}
    chosen = Policy.model_validate({"version": 1, "name": "p", "rules": [{"match": {"name": "*"}, "fwd": casts}]})
    model, inputs = _Recalling(), (torch.randn(rows, 16), torch.randn(kept, 16))
    exact = copy.deepcopy(model)
    lpcompile(model, chosen if policy == "accumulator" else policy, inputs)
    for x, memory in (inputs, (torch.randn(3, 16), torch.randn(2, 16)), (torch.randn(3, 16), torch.randn(0, 16))):
        y, wanted = model(x, memory), exact(x, memory)
        y.sum().backward()
        torch.testing.assert_close(y, wanted, rtol=0, atol=0 if policy == "fp32-emulated" else 0.2 * len(memory) * 16)
