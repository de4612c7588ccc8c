"""Writes and epochs: what may change a tensor between two readers of it."""

import operator

import torch
import torch.nn.functional as F
from torch import fx

from passes.analysis.writes import epochs, writes


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


def test_a_write_begins_an_epoch() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("child", (x,))
    y = graph.call_function(torch.Tensor.add_, (called, 1))
    graph.output((y,))
    assert list(epochs(graph).values()) == [0, 0, 1, 1]


def test_a_write_into_a_buffer_does_not() -> None:
    graph = fx.Graph()
    x, count = graph.placeholder("x"), graph.get_attr("num_batches_tracked")
    graph.call_function(torch.Tensor.add_, (count, 1))
    graph.output((x,))
    assert list(epochs(graph).values()) == [0, 0, 0, 0]
