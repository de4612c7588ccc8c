"""Replay: what a forward does only because it is being recorded is noticed, and the example itself comes out right."""

import copy
import numbers
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpcompile import lpcompile
from lpcompile.capture.recorder import record
from lpcompile.frontends.install import CapturedForward, captured


class Pair(nn.Module):
    """Two layers, and a function that says what becomes of them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)

    def choose(self, x: Tensor, condition: bool) -> Tensor:
        return self.a(x) + self.b(x) if condition else self.a(x) - self.b(x)


def captured_pair(function: Callable[..., Any], *others: Tensor) -> CapturedForward | None:
    """What is captured of a compiled pair, which gives the bits of its twin for the example and for `others`."""
    original, x = Pair(function), torch.randn(4, 16)
    model = copy.deepcopy(original)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    for each in (x, *others):
        assert torch.equal(model(each), original(each))
    return captured(model)


@pytest.mark.parametrize(
    "is_this",
    [
        lambda x: isinstance(x.shape[0], int),
        lambda x: type(x.shape[0]) is int,
        lambda x: isinstance(x.shape[0], numbers.Integral),
        lambda x: repr(x.shape) == "torch.Size([4, 16])",
        lambda x: str(x.shape[0]) in {"4": 1, "6": 2},
        lambda x: f"{x.shape[0]}" == "6",
        lambda x: "%s" % x.size(0) == "6",  # noqa: UP031
        lambda x: len({x.shape[0], 4}) == 1,
    ],
)
def test_what_a_size_is_besides_its_value(is_this: Callable[[Tensor], bool]) -> None:
    found = captured_pair(lambda self, x: self.choose(x, is_this(x)), torch.randn(6, 16), torch.randn(1, 16))
    assert found is not None
    assert (found.num_hits, found.num_misses) == (1, 2), "a graph for these very sizes"


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x.contiguous() is x,
        lambda x: x.to(torch.float32) is x,
        lambda x: x.float() is x,
        lambda x: F.dropout(x, 0.0) is x,
        lambda x: x.type(torch.float32) is x,
    ],
)
def test_tensor_handed_through_is_itself(same: Callable[[Tensor], bool]) -> None:
    transposed = torch.randn(16, 4).t()
    assert captured_pair(lambda self, x: self.choose(x, same(x)), transposed) is None
    model = Pair(lambda self, x: self.choose(x, same(x)))
    reason = record(model, (torch.randn(4, 16),), {}, is_leaf=lambda module: False).opaque[""].reason
    assert reason == "does not do in a second run what it did in the first"


def test_copy_that_depends_on_strides_fixes_them_where_its_identity_is_read() -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        return self.choose(x, x.contiguous() is x)

    model, transposed = Pair(forward), torch.randn(16, 4).t()
    (recording,) = record(model, (transposed,), {}, is_leaf=lambda module: False).recordings[""]
    assert recording.guard.check(model, (transposed,), {}) is None
    assert "strides" in str(recording.guard.check(model, (transposed.contiguous(),), {}))
    plain = Pair(lambda self, x: self.choose(x.contiguous(), True))
    (recording,) = record(plain, (transposed,), {}, is_leaf=lambda module: False).recordings[""]
    assert recording.guard.check(plain, (transposed.contiguous(),), {}) is None


def test_recording_is_no_override_of_torchs_functions() -> None:
    found = captured_pair(lambda self, x: self.choose(x, torch.overrides.has_torch_function((x, self.a.weight))))
    assert found is not None
    assert found.num_hits == 1


def test_what_comes_out_otherwise_by_itself_is_opaque() -> None:
    assert captured_pair(lambda self, x: self.choose(x, True) * (0.0 * time.perf_counter() + 1.0)) is not None
    model = Pair(lambda self, x: self.choose(x, True) * time.perf_counter())
    reason = record(model, (torch.randn(4, 16),), {}, is_leaf=lambda module: False).opaque[""].reason
    assert reason == "does not do in a second run what it did in the first"


def test_error_that_the_forward_catches_comes_again() -> None:
    def forward(self: Pair, x: Tensor) -> Tensor:
        try:
            x = x.view(3, -1)
        except RuntimeError:
            x = x * 2
        return self.choose(x, True)

    found = captured_pair(forward)
    assert found is not None
    assert found.num_hits == 1


def test_nothing_is_computed_again() -> None:
    calls: list[int] = []

    class Child(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Pair(lambda self, x: F.dropout(self.child(x), 0.5))
    model.child = Child()
    model.child.register_forward_hook(lambda *_: calls.append(1))
    result = record(model, (torch.randn(4, 16),), {}, is_leaf=lambda module: False)
    assert set(result.recordings) == {"", "child"}
    assert calls == [1]
