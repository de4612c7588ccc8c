"""torch's layers: those that are one function, as graphs for passes to read; which calls may write into their input.

The recorder keeps a call of ReLU or MaxPool2d as a call, since hooks hang there, so nothing of a graph says what it
computes. These graphs do; they are never installed.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lpcompile.capture.guards import ValueFact
from lpcompile.capture.recorder import is_builtin_leaf
from lpcompile.capture.recording import Recording
from passes.ir.program import WRITES, Unit, child_path
from passes.ir.types import META


def layer_units(units: Iterable[Unit], modules: dict[str, nn.Module]) -> dict[str, Unit]:
    """A unit for each layer of the table that a recorded module calls, by path."""
    found: dict[str, Unit] = {}
    for call, path in (each for unit in units for each in called_paths(unit)):
        module = modules.get(path)
        if module is None or path in found or type(module) not in _CALLS or len(call.all_input_nodes) != 1:
            continue
        graph = fx.Graph()
        x = graph.placeholder("input")
        function, attributes = _CALLS[type(module)]
        given = {name: getattr(module, attribute) for name, attribute in attributes.items()}
        result = graph.call_function(function, (x,), given)
        graph.output((result,))
        for node, seen in ((x, call.all_input_nodes[0]), (result, call)):
            node.meta.update({META: seen.meta[META]} if META in seen.meta else {})
        found[path] = Unit(path, graph, "module", is_observed=is_observed(module))
    return found


def is_observed(module: nn.Module) -> bool:
    """Whether hooks, or a forward of the instance's own, see what the module is given or gives."""
    return "forward" in vars(module) or any(getattr(module, name, None) for name in _HOOKS)


def note_writes(units: Iterable[Unit], modules: dict[str, nn.Module], leaves: Iterable[str]) -> None:
    """Mark calls of modules that may write into what they are given: `inplace=True`, and a forward without a graph.
    `leaves` are the paths of GEMM-bearing modules, whose forwards are known.
    """
    units = list(units)
    known = {unit.path for unit in units} | set(leaves)
    for unit in units:
        for node, path in called_paths(unit):
            module = modules.get(path)
            is_layer = module is not None and is_builtin_leaf(module)
            if getattr(module, "inplace", False) if is_layer else path not in known:
                node.meta[WRITES] = True


def without_carriers(recording: Recording, module: nn.Module) -> Recording:
    """The recording with the guard of a graph that has no carriers of gradients and may not call torch's layers. What
    those layers are is then a fact of the guard.
    """
    paths = tuple(dict.fromkeys(str(node.target) for node in recording.graph.find_nodes(op="call_module")))
    layers = {path: module.get_submodule(path) for path in paths}
    facts = [fact for path, layer in layers.items() for fact in layer_facts(path, layer).items()]
    attributes = (*recording.guard.attributes, *facts)
    guard = replace(recording.guard, is_forward_only=True, unhooked=paths, attributes=attributes)
    return replace(recording, guard=guard)


def layer_facts(path: str, layer: nn.Module) -> dict[str, ValueFact]:
    """What the graph of a layer of the table relies on, by the path of the attribute; nothing for any other module."""
    row = _CALLS.get(type(layer))
    values = {} if row is None else {name: getattr(layer, name) for name in ("__class__", *row[1].values())}
    return {f"{path}.{name}": ValueFact(type(value), value) for name, value in values.items()}


def called_paths(unit: Unit) -> list[tuple[fx.Node, str]]:
    """Each call of a module in a unit's graph, and the path of what it calls."""
    return [(node, child_path(unit.path, node)) for node in unit.graph.find_nodes(op="call_module")]


_POOL = {
    name: name for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
}  # as keywords, from attributes of these names
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CALLS: dict[type[nn.Module], tuple[Callable[..., Any], dict[str, str]]] = {
    nn.ReLU: (F.relu, {"inplace": "inplace"}),
    nn.GELU: (F.gelu, {"approximate": "approximate"}),
    nn.MaxPool1d: (F.max_pool1d, _POOL),
    nn.MaxPool2d: (F.max_pool2d, _POOL),
    nn.MaxPool3d: (F.max_pool3d, _POOL),
    nn.Flatten: (torch.flatten, {"start_dim": "start_dim", "end_dim": "end_dim"}),
}
