"""torch.func and second derivatives: torch's own where nothing is cast, a typed error where something is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lpcompile import lpcompile
from lpcompile.errors import NotSupported

_X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h) @ h.mT


def _gradients(model: nn.Module) -> Any:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.grad(lambda each: torch.func.functional_call(model, each, (_X,)).sum())(parameters)
    return [found[name] for name in parameters]


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": _gradients,
    "vmap": lambda model: [torch.vmap(model)(torch.stack([_X, 2 * _X]))],
    "jvp": lambda model: torch.func.jvp(model, (_X,), (_X,)),
    "jacrev": lambda model: [torch.func.jacrev(model)(_X)],
    "hessian": lambda model: [torch.func.hessian(lambda x: model(x).sum())(_X[:, :1])],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_where_nothing_is_cast_a_transform_is_torchs(name: str) -> None:
    original = _Net()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", (_X,), strict=True)
    for found, wanted in zip(TRANSFORMS[name](model), TRANSFORMS[name](original), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("policy", ["hfp8", "int8", "fp8-rowwise"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_where_something_is_cast_a_transform_is_refused_with_the_reason(name: str, policy: str) -> None:
    model = lpcompile(_Net(), policy, (_X,))
    with pytest.raises(NotSupported, match=r"torch\.func .* through a product that is cast.* Try .*backward\(\)"):
        TRANSFORMS[name](model)
    model(_X).sum().backward()


def _penalised(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    x = _X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_where_nothing_is_cast_a_second_derivative_is_torchs() -> None:
    original = _Net()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", (_X,), strict=True)
    for found, wanted in zip(_penalised(model), _penalised(original), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("policy", ["hfp8", "int8", "fp8-rowwise"])
def test_a_second_derivative_of_what_is_cast_is_refused_with_the_reason(policy: str) -> None:
    model = lpcompile(_Net(), policy, (_X,))
    with pytest.raises(NotSupported, match=r"a product that is cast has no second derivative\. .* Try fp32"):
        _penalised(model)
    x = _X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)  # only a second one is refused
    (plain,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(first, plain)


@pytest.mark.parametrize("size", [16, 160])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("policy", ["hfp8", "bf16", "int8"])
def test_a_tangent_is_refused_and_never_lost(policy: str, is_trained: bool, size: int) -> None:
    """Forward-mode differentiation gave no tangent where no weight needed a gradient, and said nothing."""
    model = lpcompile(nn.Sequential(nn.Linear(size, size)).requires_grad_(is_trained), policy)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(160, size), torch.randn(160, size))
        with pytest.raises(NotSupported, match="or a tangent"):
            model(x)
        model(torch.randn(3, size))  # no tangent, nothing to lose


def test_a_tangent_goes_through_the_identity() -> None:
    model = lpcompile(nn.Sequential(nn.Linear(16, 16)), "fp32-emulated")
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(3, 16), torch.randn(3, 16))
        tangent = forward_ad.unpack_dual(model(x)).tangent
    assert tangent.shape == (3, 16)


class _Mapped(nn.Module):
    """A layer under torch.vmap, and a product beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.vmap(self.a)(self.b(x))
        return y


@pytest.mark.parametrize("has_examples", [True, False])
def test_a_transform_inside_of_a_forward_is_seen_by_the_example_call(has_examples: bool) -> None:
    examples = (_X,) if has_examples else None
    original = _Mapped()
    expected = original(_X)
    assert torch.equal(lpcompile(copy.deepcopy(original), "fp32-emulated", examples, strict=True)(_X), expected)
    model = lpcompile(original, "int8", examples)
    with pytest.raises(NotSupported, match=r"Expected tensors that no .* Got a transform of torch\.func\. Try "):
        model(_X)
