"""NaN in a layer: what it reaches is NaN under every policy, and nothing else is. int8, whose dtype has none, too."""

import math

import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile

_POLICIES = ("fp32-emulated", "bf16", "hfp8", "fp8-rowwise", "int8")


def _leaf(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(8, 6), torch.randn(4, 8)),
        "conv": (nn.Conv2d(8, 6, 1), torch.randn(4, 8, 1, 1)),
    }[name]


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_of_an_input_reaches_its_row_and_every_gradient_of_its_column(name: str, policy: str) -> None:
    leaf, x = _leaf(name)
    model = lpcompile(nn.Sequential(leaf), policy)
    x[1, 3] = math.nan
    y = model(x.requires_grad_()).reshape(4, 6)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, False, False]
    y.sum().backward()
    dw = leaf.weight.grad.reshape(6, 8)  # type: ignore[union-attr]
    assert dw.isnan().all(0).tolist() == dw.isnan().any(0).tolist() == [column == 3 for column in range(8)]
    assert not x.grad.isnan().any()  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_of_a_gradient_reaches_its_row_of_dx_and_of_dw(name: str, policy: str) -> None:
    leaf, x = _leaf(name)
    model = lpcompile(nn.Sequential(leaf), policy)
    y = model(x.requires_grad_())
    dy = torch.ones_like(y)
    dy[2, 5] = math.nan
    y.backward(dy)
    dx, dw = x.grad.reshape(4, 8), leaf.weight.grad.reshape(6, 8)  # type: ignore[union-attr]
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [row == 2 for row in range(4)]
    assert dw.isnan().all(1).tolist() == dw.isnan().any(1).tolist() == [row == 5 for row in range(6)]
