"""Batch norm: its forward in evaluation mode as a graph, and when a graph that it was folded into still holds.

    y = batch_norm(x, running_mean, running_var, weight, bias, training=False, momentum, eps)

A folded batch norm is not called, and its neighbour gives another tensor than it did: so the caller's graph holds only
while the batch norm is in evaluation mode and nobody has put hooks on either.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lpcompile.capture.guards import Guard, ValueFact
from lpcompile.capture.torch_layers import is_observed, layer_facts
from lpcompile.frontends.leaves.find import has_tensor
from passes.fold_batchnorm import norm_node
from passes.ir.gemm_nodes import argument
from passes.ir.program import ACTIVATION, AFFINE, FOLDED, INPUT_AFFINE, RESIDUAL, Program, Unit

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batch_norm_units(modules: dict[str, nn.Module]) -> dict[str, Unit]:
    """A unit for every batch norm of torch's, by path. A subclass counts only if it did not write its own forward."""
    return {
        path: Unit(path, _graph(module), "leaf", is_observed=is_observed(module))
        for path, module in modules.items()
        if isinstance(module, _KINDS) and any(type(module).forward is kind.forward for kind in _KINDS)
    }


def guarding_folds(guard: Guard, unit: Unit, module: nn.Module, program: Program) -> Guard:
    """The guard of a module's graph, with what the batch norms and activations folded in it rely on."""
    attributes: dict[str, ValueFact] = {}
    changed: list[str] = []
    for node in unit.graph.nodes:
        if node.op == "call_module" and {*node.kwargs} & {AFFINE, INPUT_AFFINE, RESIDUAL, ACTIVATION}:
            changed.append(str(node.target))
        for path in filter(None, node.meta.get(FOLDED, "").split(",")):
            norm = program.leaf(f"{unit.path}.{path}" if unit.path else path)
            call = None if norm is None else norm_node(norm.graph)
            if call is not None:
                attributes[f"{path}.training"] = ValueFact(bool, False)
                attributes[f"{path}.eps"] = ValueFact(float, argument(call, 7, "eps"))
            attributes |= layer_facts(path, module.get_submodule(path))
            changed.append(path)
    if not changed:
        return guard
    facts = (*guard.attributes, *attributes.items())
    return replace(guard, attributes=facts, unhooked=tuple(dict.fromkeys((*guard.unhooked, *changed))))


def _graph(module: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("input")
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (graph.get_attr(name) if has_tensor(module, name) else None for name in names)
    operands = (x, mean, var, weight, bias, mean is None, module.momentum, float(module.eps))
    graph.output((graph.call_function(F.batch_norm, operands),))
    return graph
