"""The example call: what it finds, and that nothing of it is left in the model, in globals or in random generators."""

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lpcompile import lpcompile, report
from lpcompile.frontends.intercept import look
from tests.lpcompile.frontends.intercept.test_interception import Attention, policy_of

SEEN: list[int] = []
TABLE: dict[str, int] = {"calls": 0}
TOTAL = torch.zeros(2)
ARRAY = numpy.zeros(2)


class Leaves(nn.Module):
    """A forward that writes wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4, max_norm=0.1)
        self.state, self.seen, self.notes = torch.zeros(2), [0], {"n": torch.zeros(1)}
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        self.seen.append(1)
        self.notes["n"] += 1
        SEEN.append(1)
        TABLE["calls"] += 1
        TOTAL.add_(1)
        numpy.add(ARRAY, 1, out=ARRAY)
        x = (
            self.drop(self.norm(x))
            + self.table(torch.arange(4))
            + torch.rand(()) * random.random() * numpy.random.rand()
        )
        self.cache = y = self.fc(x)
        return y @ y.mT


def _everything(model: Leaves) -> list[Any]:
    own = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    return [
        copy.deepcopy(value)
        for value in (own, dict(model.state_dict()), SEEN, TABLE, TOTAL, ARRAY, torch.get_rng_state())
    ] + [random.getstate(), numpy.random.get_state()]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, numpy.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)


@pytest.mark.parametrize("size", [1 << 28, 0])
@pytest.mark.parametrize("mode", [True, False])
def test_the_example_call_leaves_no_trace(mode: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model, which is copied, and of a large one, which is not."""
    monkeypatch.setattr(look, "_SMALL", size)
    model, x = Leaves().train(mode), torch.randn(4, 4)
    version, before = x._version, _everything(model)
    lpcompile(model, "hfp8", (x,))
    assert _same(_everything(model), before)
    assert x._version == version
    assert model.cache is None
    assert model.training is mode


def test_compiling_writes_no_class() -> None:
    """Not even one of torch's or Python's that a forward names."""

    class Names(nn.Module):
        def forward(self, x: Tensor, **kw: Any) -> Tensor:
            from itertools import chain

            kw.get("scale")
            rows = [*chain.from_iterable([x.unbind(0)])]
            return torch.stack(rows) @ x.mT

    kinds = [Names, nn.Module, nn.Linear, Tensor, dict, torch.autograd.Function]
    before = [dict(vars(kind)) for kind in kinds]
    model = nn.Sequential(nn.Linear(4, 4), Names())
    lpcompile(model, policy_of(), (torch.randn(3, 4),), strict=True)
    model(torch.randn(3, 4))
    assert [dict(vars(kind)) for kind in kinds] == before


def test_a_call_that_fails_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(Attention())
    with pytest.raises(RuntimeError):
        lpcompile(model, "fp32-emulated", (torch.randn(2, 3, 5),))
    assert type(model[0]) is Attention
    assert not vars(model).keys() & {"_lp_compiled", "_lp_captured"}


def test_sums_have_the_longest_lengths_that_were_seen() -> None:
    """auto needs them: 64 products of e4m3 in GRAD, 8 in FWD."""
    auto = {"x": "e4m3", "w": "e4m3", "accumulate": "auto"}
    model = lpcompile(Attention(), policy_of("matmul", fwd=auto), (torch.randn(2, 64, 8),), strict=True)
    rules = {row.name: row.rule for row in report(model).gemms if row.role == "fwd"}
    assert "for 8 products" in rules["matmul_0"]
    assert "for 64 products" in rules["matmul_1"]


class ReadsValues(nn.Module):
    """As transformers' masks do: a value is asked for where the tensor does not say that it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        Calls.without_data.append(tuple(isinstance(each, FakeTensor) for each in (x, self.fc.weight, self.scale)))
        if not isinstance(x, FakeTensor):
            x = x * (x > 0).all().item()
        y = self.fc(x * self.scale)
        return y @ y.mT


class Calls:
    """Of each call, whether its argument, weight and buffer are without data."""

    without_data: list[tuple[bool, ...]] = []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_large_model_is_looked_at_without_its_data(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy has neither weights, nor buffers, nor arguments with data; on meta a small one has none either."""
    if device == "cpu":
        monkeypatch.setattr(look, "_SMALL", 0)
    with torch.device(device):
        model, x = ReadsValues(), torch.randn(3, 4)
    monkeypatch.setattr(Calls, "without_data", [])
    lpcompile(model, policy_of(), (x,), strict=True)
    assert Calls.without_data == [(True, True, True)] * 2
    assert type(model.fc.weight) is nn.Parameter
    assert [row.name for row in report(model).gemms if row.role == "fwd"] == ["fc", "matmul_0"]
