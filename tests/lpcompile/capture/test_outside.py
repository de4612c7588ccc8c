"""Outside and looks: what a forward reads beside its arguments is guarded, what it changes there is noticed and put
back, and what no guard can see ends the frame with a reason.
"""

import collections
import contextvars
import copy
import itertools
import math
import os
import pickle
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, is_grad_enabled, nn
from torch.overrides import has_torch_function

from lpcompile import lpcompile
from lpcompile.capture.looks import Unseen, look_at
from lpcompile.capture.recorder import record
from lpcompile.capture.recording import RecordResult
from lpcompile.frontends.install import captured

SCALE = 1.0
TABLE = {"scale": 1.0, "limits": [1, 2]}
AUX: list[Any] = []
CONTEXT = SimpleNamespace(seen=[], scale=1.0)
COUNTER = itertools.count()
VARIABLE = contextvars.ContextVar("VARIABLE", default=1.0)


class Defaults:
    scale = 1.0


class Plain:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


def halved(x: Tensor) -> Tensor:
    return x / 2


class Pair(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        for name, value in values.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.a(x) + self.b(x))

    def finish(self, y: Tensor) -> Tensor:
        return y


class WithClassAttribute(Pair):
    scale = 1.0

    def finish(self, y: Tensor) -> Tensor:
        return y * self.scale


class OfClass(WithClassAttribute):
    def finish(self, y: Tensor) -> Tensor:
        return y * type(self).scale


class WithConfig(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * self.config.sub.scale


class WithTable(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * self.table["scale"]


class WithObjects(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * self.objects[0].scale


class WithNumpy(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * 3 if self.k > 2 else y


class WithArray(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * float(self.k[0])


class WithActivation(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return self.act(y)


class WithMethod(Pair):
    def act(self, y: Tensor) -> Tensor:
        return y.tanh()

    def finish(self, y: Tensor) -> Tensor:
        return self.act(y)


class WithPositions(Pair):
    def __init__(self) -> None:
        super().__init__(pos=nn.Parameter(torch.randn(3, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[: self.pos.shape[0]])


class WithWidth(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y / y.shape[-1]


class WithGlobals(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return scaled(y) * TABLE["scale"] * Defaults.scale * CONTEXT.scale


class WithDtype(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * 2 if torch.get_default_dtype() == torch.float64 else y


class WithInferenceMode(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * 2 if torch.is_inference_mode_enabled() else y


class WithGradMode(Pair):
    def finish(self, y: Tensor) -> Tensor:
        return y * 2 if is_grad_enabled() else y


def change(module: nn.Module, what: str) -> None:
    """One of the changes that a user makes to a model or its surroundings."""
    exec(what, {**globals(), "m": module})


@pytest.mark.parametrize(
    ("make", "what", "sentence"),
    [
        (WithClassAttribute, "m.scale = 3.0", "attribute scale is 3.0, recorded 1.0"),
        (
            lambda: WithConfig(config=Plain(sub=Plain(scale=1.0))),
            "m.config.sub.scale = 3.0",
            "attribute config.sub.scale is 3.0, recorded 1.0",
        ),
        (
            lambda: WithConfig(config=SimpleNamespace(sub=SimpleNamespace(scale=1.0))),
            "m.config.sub.scale = 3.0",
            "attribute config.sub.scale is 3.0, recorded 1.0",
        ),
        (
            lambda: WithTable(table=collections.OrderedDict(scale=1.0)),
            "m.table['scale'] = 3.0",
            "attribute table is OrderedDict([('scale', 3.0)]), recorded {'scale': 1.0}",
        ),
        (
            lambda: WithTable(table=collections.defaultdict(float, scale=1.0)),
            "m.table['scale'] = 3.0",
            "attribute table is defaultdict(<class 'float'>, {'scale': 3.0}), recorded {'scale': 1.0}",
        ),
        (
            lambda: WithTable(table={"scale": 1.0, "other": Plain(a=1)}),
            "m.table['scale'] = 3.0",
            "attribute table is a dict, not what was recorded",
        ),
        (
            lambda: WithObjects(objects=[Plain(scale=1.0)]),
            "m.objects[0].scale = 3.0",
            "attribute objects is a list, not what was recorded",
        ),
        (
            lambda: WithNumpy(k=np.float64(1.0)),
            "m.k = np.float64(5.0)",
            "attribute k is np.float64(5.0), recorded np.float64(1.0)",
        ),
        (
            lambda: WithArray(k=np.array([1.0])),
            "m.k[0] = 5.0",
            "attribute k is a ndarray, not what was recorded",
        ),
        (
            lambda: WithActivation(act=torch.tanh),
            "m.act = torch.sigmoid",
            "attribute act is a builtin_function_or_method, not what was recorded",
        ),
        (
            lambda: WithActivation(act=halved),
            "m.act = scaled",
            "attribute act is a function, not what was recorded",
        ),
        (WithMethod, "m.act = halved", "attribute act is a function, not what was recorded"),
        (
            WithPositions,
            "m.pos = nn.Parameter(torch.ones(4, 16))",
            "attribute pos.shape is torch.Size([4, 16]), not what was recorded",
        ),
        (
            WithWidth,
            "m.a.weight, m.a.bias = nn.Parameter(torch.ones(1, 16)), nn.Parameter(torch.ones(1))",
            "attribute a.weight.shape is torch.Size([1, 16]), not what was recorded",
        ),
    ],
)
def test_change_of_the_module_is_a_miss(make: Callable[[], nn.Module], what: str, sentence: str) -> None:
    original, x = make(), torch.randn(4, 16)
    model = copy.deepcopy(original)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    assert torch.equal(model(x), original(x))
    for each in (model, original):
        change(each, what)
    assert torch.equal(model(x), original(x))
    found = captured(model)
    assert found is not None
    assert (found.num_hits, found.num_misses, found.first_miss) == (1, 1, sentence)


@pytest.mark.parametrize(
    ("make", "holder", "name", "value", "sentence"),
    [
        (WithClassAttribute, WithClassAttribute, "scale", 3.0, "attribute scale is 3.0, recorded 1.0"),
        (OfClass, WithClassAttribute, "scale", 3.0, "scale of WithClassAttribute is 3.0, not what was recorded"),
        (WithMethod, WithMethod, "act", lambda self, y: y * 0, "attribute act is a method, not what was recorded"),
        (WithGlobals, None, "SCALE", 3.0, "SCALE of {file} is 3.0, not what was recorded"),
        (WithGlobals, None, "scaled", halved, "scaled of {file} is a function, not what was recorded"),
        (WithGlobals, Defaults, "scale", 3.0, "scale of Defaults is 3.0, not what was recorded"),
        (WithGlobals, CONTEXT, "scale", 3.0, "CONTEXT of {file} is a SimpleNamespace, not what was recorded"),
        (
            WithGlobals,
            TABLE,
            "scale",
            3.0,
            "TABLE of {file} is {{'scale': 3.0, 'limits': [1, 2]}}, not what was recorded",
        ),
    ],
)
def test_change_outside_is_a_miss(
    make: Any, holder: Any, name: str, value: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, x = make(), torch.randn(4, 16)
    model = copy.deepcopy(original)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    assert torch.equal(model(x), original(x))
    if isinstance(holder, dict):
        monkeypatch.setitem(holder, name, value)
    elif holder is None:
        monkeypatch.setitem(globals(), name, value)
    else:
        monkeypatch.setattr(holder, name, value)
    assert torch.equal(model(x), original(x))
    found = captured(model)
    assert found is not None
    assert (found.num_hits, found.num_misses, found.first_miss) == (1, 1, sentence.format(file=__name__))


def test_state_of_the_process_that_was_read() -> None:
    x = torch.randn(4, 16)
    models = [cls() for cls in (WithDtype, WithInferenceMode, WithGradMode)]
    originals = copy.deepcopy(models)
    for model in models:
        lpcompile(model, "fp32-emulated", example_inputs=(x,))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(models[0](x), originals[0](x))
    finally:
        torch.set_default_dtype(before)
    with torch.inference_mode():
        assert torch.equal(models[1](x), originals[1](x))
    with torch.no_grad():
        assert torch.equal(models[2](x), originals[2](x))
    assert [captured(model).num_misses for model in models] == [1, 1, 1]  # type: ignore[union-attr]


def test_a_copy_and_a_pickle_hold_too() -> None:
    model, x = WithGlobals(), torch.randn(4, 16)
    lpcompile(model, "fp32-emulated", example_inputs=(x,))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again(x)
        found = captured(again)
        assert found is not None
        assert (found.num_hits, found.num_misses) == (1, 0)


# -- side effects, and what moves on -----------------------------------------------------------------------------------


class Wrapped(Pair):
    def __init__(self, function: Callable[..., Any], **values: Any) -> None:
        super().__init__(**values)
        self.function = function

    def finish(self, y: Tensor) -> Tensor:
        return self.function(self, y)


def recorded(model: nn.Module) -> RecordResult:
    return record(model, (torch.randn(4, 16),), {}, is_leaf=lambda module: False)


def rebind(self: nn.Module, y: Tensor) -> Tensor:
    global SCALE
    SCALE = SCALE + 1
    return y


def append(self: nn.Module, y: Tensor) -> Tensor:
    AUX.append(y.sum())
    return y


def append_nested(self: nn.Module, y: Tensor) -> Tensor:
    CONTEXT.seen.append(y.sum())
    return y


def count(self: nn.Module, y: Tensor) -> Tensor:
    Defaults.scale += 1
    return y


def append_held(self: Any, y: Tensor) -> Tensor:
    self.context[0].values.append(y.sum())
    return y


def append_to_deque(self: Any, y: Tensor) -> Tensor:
    self.last.append(y.sum())
    return y


@pytest.mark.parametrize(
    ("function", "values", "reason"),
    [
        (rebind, {}, f"changes SCALE of {__name__}, which it names"),
        (append, {}, f"changes AUX of {__name__}, which it names"),
        (append_nested, {}, f"changes CONTEXT of {__name__}, which it names"),
        (count, {}, "changes scale of Defaults, which it names"),
        (append_held, {"context": [Plain(values=[])]}, "changes the attribute context"),
        (append_to_deque, {"last": collections.deque()}, "changes the attribute last"),
    ],
)
def test_side_effect_is_opaque_and_put_back(function: Callable[..., Any], values: dict[str, Any], reason: str) -> None:
    model = Wrapped(function, **values)
    assert recorded(model).opaque[""].reason == reason
    assert (SCALE, AUX, CONTEXT.seen, Defaults.scale) == (1.0, [], [], 1.0)
    if "context" in values:
        assert model.context[0].values == []
    if "last" in values:
        assert not model.last


def test_side_effect_of_a_child_is_its_own() -> None:
    model = Wrapped(lambda self, y: self.child(y) * 2, child=Wrapped(append))
    result = recorded(model)
    assert list(result.opaque) == ["child"]
    assert AUX == []


@pytest.mark.parametrize(
    ("values", "use"),
    [
        ({"rng": random.Random(0)}, lambda self: self.rng.random()),
        ({"rng": np.random.default_rng(0)}, lambda self: float(self.rng.random())),
        ({"rng": np.random.RandomState(0)}, lambda self: float(self.rng.rand())),
        ({"rng": itertools.count(1)}, lambda self: next(self.rng)),
        ({"rng": (number for number in range(9))}, lambda self: next(self.rng)),
        ({"rng": [random.Random(0)]}, lambda self: self.rng[0].random()),
        ({"rng": SimpleNamespace(inner=random.Random(0))}, lambda self: self.rng.inner.random()),
    ],
)
def test_what_moves_on_is_opaque(values: dict[str, Any], use: Callable[..., float]) -> None:
    model = Wrapped(lambda self, y: y * use(self), **values)
    reason = recorded(model).opaque[""].reason
    assert "reads the attribute rng" in reason
    assert "which moves on with each use" in reason


def test_generators_are_put_back() -> None:
    torch_rng = torch.Generator().manual_seed(0)
    held = {"r": random.Random(0), "n": np.random.default_rng(0), "t": torch_rng, "i": itertools.count(1)}
    model = Wrapped(
        lambda self, y: y * self.r.random() * self.n.random() * next(self.i) + torch.rand(16, generator=self.t), **held
    )
    states = model.r.getstate(), model.n.bit_generator.state, model.t.get_state()
    recorded(model)
    assert model.r.getstate() == states[0]
    assert model.n.bit_generator.state == states[1]
    assert torch.equal(model.t.get_state(), states[2])
    assert next(model.i) == 1
    explicit = Wrapped(lambda self, y: y + torch.rand(16, generator=self.t), t=torch_rng)
    assert recorded(explicit).opaque[""].reason == "passes a Generator to rand"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, y: y * next(COUNTER), f"reads COUNTER of {__name__}, count, which moves on with each use"),
        (lambda self, y: y * VARIABLE.get(), f"reads VARIABLE of {__name__}, a context variable, which no guard holds"),
        (lambda self, y: y * len(os.environ.get("HOME", "")), "reads the environment, which no guard holds"),
        (lambda self, y: y * bool(os.getenv("HOME")), "reads the environment, which no guard holds"),
        (
            lambda self, y: y if has_torch_function((y,)) else -y,
            "asks has_torch_function, which is answered otherwise while it is recorded",
        ),
    ],
)
def test_what_no_guard_sees_is_opaque(function: Callable[..., Any], reason: str) -> None:
    assert recorded(Wrapped(function)).opaque[""].reason == reason


def test_looks() -> None:
    assert look_at(1) != look_at(True)
    assert look_at({"a": Plain(b=[1])}) == look_at({"a": Plain(b=[1])})
    assert look_at({"a": Plain(b=[1])}) != look_at({"a": Plain(b=[2])})
    assert look_at({"a": 1, "b": 2}) != look_at({"b": 2, "a": 1}), "the order in which a loop meets them"
    assert look_at(nn.Linear(1, 1)) == look_at(nn.Identity()), "a call of a child says which child"
    assert look_at(math.sin) is math.sin
    loop: list[Any] = []
    loop.append(loop)
    look_at(loop)
    with pytest.raises(Unseen, match="too large"):
        look_at([[0] * 100 for _ in range(20)])
    with pytest.raises(Unseen, match="numpy array too large"):
        look_at(np.zeros(1 << 16))
