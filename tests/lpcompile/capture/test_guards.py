"""Guards: each thing a graph assumes is checked, and a miss says in one sentence what differs."""

import timeit
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpcompile.capture.guards import Guard
from lpcompile.capture.recorder import record


class Mode(Enum):
    FAST = 1
    SLOW = 2


class Settings:
    def __init__(self) -> None:
        self.attention = "eager"
        self.unread = 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.unread = 1
        self.drop = nn.Dropout(0.5)
        self.config = Settings()
        self.sizes = {"window": [3, 3], "causal": None}

    def forward(self, x: Tensor, pair: Any = None, *, options: Any = None, flag: Any = None, **rest: Any) -> Tensor:
        y = x * self.scale * self.drop.p * self.sizes["window"][0]
        return y if self.config.attention == "eager" else -y


def guard_of(module: nn.Module, *args: Any, **kwargs: Any) -> Guard:
    return record(module, args, kwargs, is_leaf=lambda module: False).recordings[""][0].guard


def x(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 3))


def test_holds_for_other_tensors_of_the_same_kind() -> None:
    module = Block()
    guard = guard_of(module, x(), (x(), None), options={"a": x(), "b": [1, "s"]}, flag=torch.float32)
    same = (x() + 1, (x(), None))
    assert guard.check(module, same, {"options": {"a": x(), "b": [1, "s"]}, "flag": torch.float32}) is None
    swapped = {"flag": torch.float32, "options": {"b": [1, "s"], "a": x()}}
    assert guard.check(module, same, swapped) is None


@pytest.mark.parametrize(
    ("recorded", "now", "sentence"),
    [
        (x(2, 3), x(4, 1), "x has shape (4, 1), recorded (s0, s1)"),
        (x(), x().double(), "x is torch.float64, recorded torch.float32"),
        (x(), x().to("meta"), "x is on meta, recorded cpu"),
    ],
)
def test_tensor_that_differs(recorded: Tensor, now: Tensor, sentence: str) -> None:
    module = Block()
    assert guard_of(module, recorded).check(module, (now,), {}) == sentence


@pytest.mark.parametrize(
    ("recorded", "now", "sentence"),
    [
        (1, True, "flag is True, recorded 1"),
        (1, 1.0, "flag is 1.0, recorded 1"),
        (None, x(), "flag is a Tensor, recorded None"),
        (x(), None, "flag is None, recorded a tensor"),
        ("a", "b", "flag is 'b', recorded 'a'"),
        (Mode.FAST, Mode.SLOW, "flag is <Mode.SLOW: 2>, recorded <Mode.FAST: 1>"),
        (torch.float16, torch.bfloat16, "flag is torch.bfloat16, recorded torch.float16"),
        (torch.device("cpu"), torch.device("meta"), "flag is device(type='meta'), recorded device(type='cpu')"),
        (None, object(), "flag is an object, recorded None"),
        ((1, 2), (1, 3), "flag_1 is 3, recorded 2"),
        ((1, 2), [1, 2], "the structure of the arguments differs"),
        ((1, 2), (1, 2, 3), "the structure of the arguments differs"),
        ({"a": 1}, {"b": 1}, "the structure of the arguments differs"),
        (None, (), "the structure of the arguments differs"),
    ],
)
def test_value_that_differs(recorded: object, now: object, sentence: str) -> None:
    module = Block()
    guard = guard_of(module, x(), flag=recorded)
    assert guard.check(module, (x(),), {"flag": recorded}) is None
    assert guard.check(module, (x(),), {"flag": now}) == sentence


def test_argument_by_position_is_not_argument_by_name() -> None:
    module = Block()
    assert guard_of(module, x()).check(module, (), {"x": x()}) == "the structure of the arguments differs"


def test_identity_of_arguments() -> None:
    module, a, b = Block(), x(), x()
    shared, apart = guard_of(module, a, a), guard_of(module, a, b)
    assert shared.check(module, (b, b), {}) is None
    assert shared.check(module, (a, b), {}) == "pair is no longer the same tensor as x"
    assert apart.check(module, (b, a), {}) is None
    assert apart.check(module, (a, a), {}) == "two arguments are the same tensor, recorded as two"


def test_train_and_eval() -> None:
    module = Block()
    guard = guard_of(module, x())
    assert guard.check(module.eval(), (x(),), {}) == "training is False, recorded True"


def test_autocast() -> None:
    module = Block()
    guard = guard_of(module, x())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert guard.check(module, (x(),), {}) == "autocast on cpu is torch.bfloat16, recorded None"
        inside = guard_of(module, x())
        assert inside.check(module, (x(),), {}) is None
    assert inside.check(module, (x(),), {}) == "autocast on cpu is None, recorded torch.bfloat16"


def test_grad_mode_where_it_was_read() -> None:
    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if torch.is_grad_enabled() else -x

    module = Reader()
    guard = guard_of(module, x())
    with torch.no_grad():
        assert guard.check(module, (x(),), {}) == "grad mode is False, recorded True"
        assert guard_of(Block(), x()).grad_enabled is None


def test_strides_where_they_were_read() -> None:
    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.is_contiguous() else x.contiguous()

    module, transposed = Reader(), x(2, 2).t()
    sentence = "x has strides (1, 2), recorded (2, 1)"
    assert guard_of(module, x(2, 2)).check(module, (transposed,), {}) == sentence
    assert guard_of(Block(), x(2, 2)).check(Block(), (transposed,), {}) is None


def test_attributes_that_the_forward_read() -> None:
    module = Block()
    guard = guard_of(module, x())
    assert {path for path, _ in guard.attributes} == {"scale", "drop.p", "config.attention", "sizes"}
    module.unread = module.config.unread = 5
    assert guard.check(module, (x(),), {}) is None
    module.scale = 3.0
    assert guard.check(module, (x(),), {}) == "attribute scale is 3.0, recorded 2.0"
    module.scale, module.drop.p = 2.0, 0.1
    assert guard.check(module, (x(),), {}) == "attribute drop.p is 0.1, recorded 0.5"
    module.drop.p, module.config.attention = 0.5, "sdpa"
    assert guard.check(module, (x(),), {}) == "attribute config.attention is 'sdpa', recorded 'eager'"


def test_containers_and_builtin_objects_of_plain_values() -> None:
    module = Block()
    guard = guard_of(module, x())
    module.sizes["window"][1] = 5
    sentence = "attribute sizes is {'window': [3, 5], 'causal': None}, recorded {'window': [3, 3], 'causal': None}"
    assert guard.check(module, (x(),), {}) == sentence

    module.config = SimpleNamespace(attention="eager", other=1)
    guard = guard_of(module, x())
    module.config.other = 2
    assert guard.check(module, (x(),), {}) == "attribute config.other is 2, recorded 1"


def test_check_is_cheap() -> None:
    """About 5 us on an idle core; the bound leaves room for a busy one."""
    module = Block()
    kwargs = {"options": {"mask": x(), "positions": x()}, "flag": False}
    guard = guard_of(module, x(), (x(), x()), **kwargs)
    args = (x(), (x(), x()))
    seconds = min(timeit.repeat(lambda: guard.check(module, args, kwargs), number=100, repeat=20)) / 100
    assert guard.check(module, args, kwargs) is None
    assert seconds < 60e-6
