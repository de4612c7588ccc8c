"""Facts: a graph runs as long as what its forward reads is as it was, and no longer."""

import copy
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lpcompile import lpcompile, report

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Config:
    def __init__(self, value: Any) -> None:
        self.value = value


class Empty:
    """A config without attributes."""


class Reading(nn.Module):
    """Its factor is what the test's function reads from `held`."""

    def __init__(self, held: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
        self.held, self.read = held, read

    def forward(self, x: Tensor) -> Tensor:
        factor = 2 if self.l.weight is self.c.weight else 3
        return self.c(self.l(x)) * self.read(self.held) * factor


def _setter(name: str) -> Callable[[Any], None]:
    return lambda held: setattr(held, name, 5.0)


def _set_item(at: Any, value: Any = 5.0) -> Callable[[Any], None]:
    return lambda held: held.__setitem__(at, value)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "config": (lambda: Config(1.0), lambda held: held.value, _setter("value")),
    "empty config": (Empty, lambda held: getattr(held, "value", 1.0), _setter("value")),
    "config in a config": (lambda: Config(Config(1.0)), lambda h: h.value.value, lambda h: _setter("value")(h.value)),
    "config in a list": (lambda: [Config(1.0)], lambda held: held[0].value, lambda h: _setter("value")(h[0])),
    "bytearray": (lambda: bytearray(b"\1"), lambda held: held[0], _set_item(0, 7)),
    "deque of lists": (lambda: deque([[1.0]]), lambda held: held[0][0], lambda h: _set_item(0)(h[0])),
    "dict of lists": (lambda: {"a": [1.0]}, lambda held: held["a"][0], lambda h: _set_item(0)(h["a"])),
    "tuple of lists": (lambda: (1.0, [2.0]), lambda held: held[1][0], lambda h: _set_item(0)(h[1])),
    "tensor in a list": (lambda: [torch.ones(2)], lambda held: held[0][0], lambda h: h[0].fill_(5)),
    "tensor in a config": (lambda: Config(torch.ones(2)), lambda held: held.value[0], lambda h: h.value.fill_(5)),
    "array": (lambda: np.ones(2), lambda held: float(held[0]), _set_item(0)),
    "array in a dict": (lambda: {"a": np.ones(2)}, lambda held: float(held["a"][0]), lambda h: _set_item(0)(h["a"])),
}  # fmt: skip


def _compiled(held: Any, read: Any) -> nn.Module:
    return lpcompile(Reading(held, read).eval(), "fp32-emulated", (X,), mode="infer")


def _same(model: nn.Module, original: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(model(X), original(X))


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_into_an_attribute_is_seen(name: str) -> None:
    make, read, change = CHANGES[name]
    model, original = _compiled(make(), read), Reading(make(), read).eval()
    assert not [each for each in report(model).warnings if each.code == "not-exported"]
    assert _same(model, original)
    assert not report(model).unserved
    twin = copy.deepcopy(model)
    for each in (model, original):
        change(each.held)
    assert _same(model, original)
    assert "1 call ran module by module" in report(model).unserved
    assert _same(twin, Reading(make(), read))
    assert not report(twin).unserved
    assert _same(copy.deepcopy(model), original)


def test_a_tie_made_later_is_seen() -> None:
    model, original = _compiled(1.0, float), Reading(1.0, float).eval()
    for each in (model, original):
        each.c.weight = each.l.weight
    assert _same(model, original)
    assert "tied" in report(model).unserved


def test_the_graph_of_a_model_that_was_in_training_runs_in_evaluation() -> None:
    model = lpcompile(Reading(1.0, float).train(), "fp32-emulated", (X,), mode="infer")
    assert model.training
    with torch.no_grad():
        model(X)
    assert "1 call ran" in report(model).unserved
    model.eval()
    assert _same(model, Reading(1.0, float))
    assert "1 call ran" in report(model).unserved
    assert _same(pickle.loads(pickle.dumps(model)), Reading(1.0, float))
