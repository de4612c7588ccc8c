"""What does not fit raises, as torch's own layer does: no kernel reads past the end of an operand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile import LpError, Policy, lpcompile

CASTS = {
    "e4m3": {"x": "e4m3", "w": "e4m3"},
    "1-6-9": {"x": "e4m3", "w": "e4m3", "accumulate": "1-6-9"},
    "wide": {"x": "e4m3", "w": "e4m3", "accumulate": {"format": "fp32", "rounding": "toward_zero"}},
    "mxfp8": {"x": "mxfp8", "w": "mxfp8"},
}
POLICIES: dict[str, Any] = {
    **{name: name for name in ("int8", "hfp8", "fp8-rowwise", "bf16", "fp16", "fp32-emulated")},
    **{name: Policy.model_validate({"rules": [{"fwd": fwd}]}) for name, fwd in CASTS.items()},
}
CALLS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "narrow": (lambda: nn.Linear(288, 10), (torch.randn(2, 200),)),
    "wide": (lambda: nn.Linear(288, 10), (torch.randn(2, 3, 400),)),
    "vector": (lambda: nn.Linear(288, 10), (torch.randn(100),)),
    "scalar": (lambda: nn.Linear(288, 10), (torch.tensor(1.0),)),
    "channels": (lambda: nn.Conv2d(4, 8, 3), (torch.randn(2, 3, 5, 5),)),
    "window": (lambda: nn.Conv2d(4, 8, 7), (torch.randn(2, 4, 5, 5),)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 8, 3), (torch.randn(2, 3, 5),)),
    "recurrent": (lambda: nn.LSTM(8, 8), (torch.randn(3, 2, 7),)),
}


@pytest.mark.filterwarnings("ignore::runtime.errors.LpWarning")
@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("call", list(CALLS))
def test_it_raises_as_torch_does(call: str, policy: str) -> None:
    make, args = CALLS[call]
    with pytest.raises((RuntimeError, ValueError)):
        make()(*args)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        lpcompile(make(), POLICIES[policy])(*args)


@pytest.mark.parametrize("policy", ["int8", "hfp8", "fp8-rowwise", "bf16"])
def test_products_of_activations_raise_too(policy: str) -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    model = lpcompile(Product(), policy)
    for a, b in ((torch.randn(3, 4), torch.randn(5, 6)), (torch.randn(2, 3, 4), torch.randn(3, 4, 5))):
        with pytest.raises(RuntimeError):
            model(a, b)


def test_a_bias_of_one_element_broadcasts_as_torchs_does() -> None:
    """A kernel refused it, and before that read past its end."""
    layer, zero = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    zero.weight, layer.bias = layer.weight, nn.Parameter(torch.ones(1))
    layer, zero = lpcompile(layer, "hfp8"), lpcompile(copy.deepcopy(zero), "hfp8")
    x = torch.randn(3, 8)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, zero(x) + 1)
    assert layer.bias.grad.tolist() == [12.0]


def test_a_lazy_layer_is_refused_with_examples_and_serves_after_its_first_call() -> None:
    x, model = torch.randn(4, 8), nn.Sequential(nn.LazyLinear(8))
    hint = r"0\.weight has no shape yet.* Got UninitializedParameter\. Try a first call, .* or no example inputs"
    with pytest.raises(LpError, match=hint):
        lpcompile(model, "int8", (x,))
    expected = lpcompile(model, "int8")(x)
    assert torch.equal(lpcompile(model, "int8", (x,), strict=True)(x), expected)
