"""Activations: torch's own activation modules as graphs of one operation, so that a pass sees what a call does."""

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lpcompile.capture.batch_norm import is_observed
from passes.ir.program import Unit


def activation_units(modules: dict[str, nn.Module]) -> dict[str, Unit]:
    """A unit for every activation that may become a part of a product, by path."""
    return {
        path: Unit(path, _graph(module), "leaf", is_observed=is_observed(module))
        for path, module in modules.items()
        if type(module).forward in (nn.ReLU.forward, nn.GELU.forward)
    }


def _graph(module: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("input")
    if isinstance(module, nn.ReLU):
        y = graph.call_function(F.relu, (x,), {"inplace": True} if module.inplace else {})
    else:
        y = graph.call_function(F.gelu, (x,), {"approximate": module.approximate})
    graph.output((y,))
    return graph
