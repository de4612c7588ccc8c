"""Hooks and what changes after compiling: leaves multiply what arrives there, whatever was cast before.

The oracle is the model under a memo that finds nothing, where every leaf casts for itself.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lpcompile import lpcompile
from runtime.quantize import quantizer
from runtime.quantize.cast_memo import CastMemo


@pytest.fixture(autouse=True)
def large_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts of small layers are not shared: these stand for large ones."""
    monkeypatch.setattr("runtime.ops.small.LARGEST", 0)


Hook = Callable[[nn.Module, tuple[Any, ...]], Any]


class TwoOfOne(nn.Module):
    """Two leaves of one input, which a policy casts once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        return self.a(x) - self.b(x.view(-1, 16))


class _Alias(torch.autograd.Function):
    """What ZeRO-3 puts before a module to be told of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


def _write(module: nn.Module, args: tuple[Any, ...]) -> None:
    with torch.no_grad():
        args[0].mul_(3.0)


def _write_after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
    _write(module, args)


CHANGING: dict[str, Hook] = {
    "another tensor": lambda module, args: (args[0] * -2.0,),
    "a view of it": lambda module, args: (args[0].flip(0),),
    "other strides": lambda module, args: (args[0][:, :1].expand(-1, 16),),
    "in place": _write,
}
OBSERVING: dict[str, Hook] = {
    "looks": lambda module, args: None,
    "an alias": lambda module, args: (_Alias.apply(args[0]),),
    "itself": lambda module, args: args,
}


def _pair(policy: str, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model that shares casts, and one that does not."""
    torch.manual_seed(0)
    shared = TwoOfOne()
    apart = copy.deepcopy(shared)
    return lpcompile(shared, policy, example_inputs=(x,)), lpcompile(apart, policy)


def _alone(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model with every cast made anew."""

    def run(x: Tensor) -> Tensor:
        with patch.object(CastMemo, "find_or_make", lambda memo, x, key, make, is_brief=False: make()):
            return model(x)  # type: ignore[no-any-return]

    return run


def _results(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in (x, *model.parameters()) if p.grad is not None)]


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


@pytest.fixture
def num_casts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many casts of an input ran, in its one element."""
    counted = [0]
    original = quantizer.to_grid

    def counting(x: Tensor, *args: Any) -> Tensor:
        counted[0] += not isinstance(x, nn.Parameter)
        return original(x, *args)

    monkeypatch.setattr(quantizer, "to_grid", counting)
    return counted


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["hfp8", "fp8-rowwise", "int8"])
@pytest.mark.parametrize("child", ["a", "b"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_leaf_multiplies_what_its_hook_gives(name: str, child: str, policy: str) -> None:
    x = torch.randn(4, 16)
    shared, apart = _pair(policy, x)
    for model in (shared, apart):
        model.get_submodule(child).register_forward_pre_hook(CHANGING[name])
    _assert_same(_results(shared, shared, x), _results(_alone(apart), apart, x))
    with torch.inference_mode():
        assert torch.equal(shared(x), _alone(apart)(x))


@pytest.mark.parametrize("name", [name for name in CHANGING if name != "in place"])  # torch refuses its backward
def test_emulation_gives_the_bits_of_the_original_under_hooks(name: str) -> None:
    x = torch.randn(4, 16)
    original = TwoOfOne()
    model = lpcompile(copy.deepcopy(original), "fp32-emulated", example_inputs=(x,))
    for each in (original, model):
        each.a.register_forward_pre_hook(CHANGING[name])
    _assert_same(_results(model, model, x), _results(original, original, x))


def test_a_hook_that_was_there_before_compiling_counts_too() -> None:
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    shared = TwoOfOne()
    shared.a.register_forward_pre_hook(CHANGING["another tensor"])
    apart = lpcompile(copy.deepcopy(shared), "hfp8")
    lpcompile(shared, "hfp8", example_inputs=(x,))
    _assert_same(_results(shared, shared, x), _results(_alone(apart), apart, x))


def test_a_write_after_a_leaf_is_seen_by_the_next() -> None:
    x = torch.randn(4, 16)
    shared, apart = _pair("hfp8", x)
    for model in (shared, apart):
        model.a.register_forward_hook(_write_after)
    with torch.no_grad():
        assert torch.equal(shared(x), _alone(apart)(x))
    with torch.inference_mode():
        assert torch.equal(shared(x), _alone(apart)(x))


@pytest.mark.parametrize("name", CHANGING)
def test_hooks_of_every_module_count(name: str) -> None:
    x = torch.randn(4, 16)
    shared, apart = _pair("hfp8", x)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return CHANGING[name](module, args) if isinstance(module, nn.Linear) else None

    handle = register_module_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            assert torch.equal(shared(x), _alone(apart)(x))
        with torch.inference_mode():
            assert torch.equal(shared(x), _alone(apart)(x))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", OBSERVING)
def test_a_hook_that_changes_nothing_leaves_casts_shared(name: str, num_casts: list[int]) -> None:
    x = torch.randn(4, 16)
    shared, apart = _pair("hfp8", x)
    for model in (shared, apart):
        for child in (model.a, model.b):
            child.register_forward_pre_hook(OBSERVING[name])
    expected = _results(_alone(apart), apart, x)
    num_casts[0] = 0
    _assert_same(_results(shared, shared, x), expected)
    assert num_casts == [1]


class Expanded(nn.Module):
    """A leaf whose input is cast before it is expanded, where there is less of it."""

    def __init__(self) -> None:
        super().__init__()
        self.between, self.a, self.b = nn.Identity(), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 1.5)[None]
        y = self.a(x.expand(8, -1, -1))
        self.between(x)
        return y - self.b(x.expand(8, -1, -1))


@pytest.mark.parametrize("child", ["a", "between", "b"])
@pytest.mark.parametrize("name", ["another tensor", "a view of it", "in place"])
def test_a_cast_that_was_moved_is_of_what_it_was_moved_to(name: str, child: str, num_casts: list[int]) -> None:
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    moved = Expanded()
    apart = lpcompile(copy.deepcopy(moved), "hfp8")
    lpcompile(moved, "hfp8", example_inputs=(x,))
    _assert_same(_results(moved, moved, x), _results(_alone(apart), apart, x))
    with torch.no_grad():
        num_casts[0] = 0
        moved(x)
        assert num_casts == [1]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return _write(module, (args[0][0],)) if name == "in place" else CHANGING[name](module, args)

        for model in (moved, apart):
            model.get_submodule(child).register_forward_pre_hook(hook)
        assert torch.equal(moved(x), _alone(apart)(x))


def test_in_inference_mode_where_no_write_shows_every_leaf_casts(num_casts: list[int]) -> None:
    x = torch.randn(4, 16)
    shared, _ = _pair("hfp8", x)
    with torch.inference_mode():
        num_casts[0] = 0
        shared(x)
    assert num_casts == [2]


@pytest.mark.parametrize("name", [None, *CHANGING])
def test_hooks_count_under_torch_compile(name: str | None) -> None:
    x = torch.randn(4, 16)
    shared, apart = _pair("hfp8", x)
    if name is not None:
        for model in (shared, apart):
            model.a.register_forward_pre_hook(CHANGING[name])
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    _assert_same(_results(compiled, shared, x), _results(_alone(apart), apart, x))
