"""Graph code: a graph survives pickle, with ops of libraries that no text names."""

import pickle

import torch
from torch import fx, nn

from lpcompile.frontends.graph_code import GraphCode
from passes.ir.targets import is_target


def test_an_op_that_no_text_names_is_pickled_by_its_name() -> None:
    op = torch.ops.prims.neg.default
    graph = fx.Graph()
    graph.output((graph.call_function(op, (graph.placeholder("x"),)),))
    assert not is_target(f"torch.ops.{op}")
    code = pickle.loads(pickle.dumps(GraphCode(graph)))
    (y,) = code(nn.Module(), [torch.ones(2)])
    assert torch.equal(y, -torch.ones(2))
