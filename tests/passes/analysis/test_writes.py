"""Writes and epochs: what may change a tensor between two readers of it."""

import operator

import torch
import torch.nn.functional as F
from torch import fx

from passes.analysis.writes import epochs, writes
from passes.ir.program import Program, Unit


def _child(function: object, *args: object, **kwargs: object) -> Unit:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(function, (x, *args), kwargs),))  # type: ignore[arg-type]
    return Unit("m.child", graph, "module")


def test_what_writes_into_its_arguments() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    written = [
        graph.call_function(torch.Tensor.add_, (x, 1)),
        graph.call_function(operator.setitem, (x, 0, 1)),
        graph.call_function(torch.Tensor.__iadd__, (x, 1)),
        graph.call_method("relu_", (x,)),
        graph.call_function(torch.add, (x, 1), {"out": x}),
        graph.call_function(F.relu, (x,), {"inplace": True}),
    ]
    assert all(map(writes, written))
    calls = [
        graph.call_function(torch.Tensor.__add__, (x, 1)),
        graph.call_function(F.relu, (x,), {"inplace": False}),
        graph.call_function(torch._C._nn.linear, (x, x)),
    ]
    assert not any(map(writes, calls))


def _epochs_around_a_call(child: Unit | None) -> list[int]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_module("child", (x,))
    graph.output((call,))
    units = {"m#0": Unit("m", graph, "module")} | ({"m.child#0": child} if child else {})
    return list(epochs(Program(units, {}), "m", graph).values())


def test_a_module_that_writes_into_its_input_begins_an_epoch() -> None:
    assert _epochs_around_a_call(_child(torch.add, 1)) == [0, 0, 0]
    assert _epochs_around_a_call(_child(torch.Tensor.add_, 1)) == [0, 1, 1]
    assert _epochs_around_a_call(None) == [0, 0, 0]


def test_a_module_that_counts_its_calls_does_not() -> None:
    graph = fx.Graph()
    x, count = graph.placeholder("x"), graph.get_attr("num_batches_tracked")
    graph.call_function(torch.Tensor.add_, (count, 1))
    graph.output((x,))
    assert _epochs_around_a_call(Unit("m.child", graph, "module")) == [0, 0, 0]
