"""Traffic: how many casts one forward runs, and how many bytes they and the ops that can carry grid values move.

An op moves what it reads and what it writes, by the shapes that the recorder saw. Counted are lp.scale, lp.quantize,
lp.dequantize, relu, max-pool, cat, copies into contiguous order, and amax; a view moves nothing, and a GEMM moves the
same whatever these passes do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from passes.analysis.grid_ops import read_grid_op
from passes.ir.program import Program, Unit, child_path
from passes.ir.types import types_of
from runtime.ops.dialect import OPS
from runtime.ops.types import OpType, QuantType, TensorType


@dataclass(frozen=True)
class Traffic:
    """Of one forward: lp.quantize nodes that run, and bytes moved as the head of this file counts them."""

    casts: int
    bytes: int


def traffic(program: Program) -> Traffic:
    """One variant of each module, each called as often as its caller does; a fed leaf by its fed graph."""
    casts = moved = 0
    for unit, graph in _graphs_run(program):
        types = types_of(graph)
        for node in graph.nodes:
            casts += node.target is _QUANTIZE
            if _is_counted(program, unit, node):
                moved += sum(_bytes(types[each]) for each in (node, *node.all_input_nodes))
    return Traffic(casts, moved)


def _graphs_run(program: Program) -> Iterator[tuple[Unit, fx.Graph]]:
    first = {unit.path: unit for unit in reversed(program.units.values())}
    modules = [unit for unit in first.values() if unit.kind == "module"]
    called = {child_path(unit.path, node) for unit in modules for node in unit.graph.find_nodes(op="call_module")}
    # a layer that nothing calls is one that place-regions reads through
    waiting = [(unit, unit.graph) for path, unit in first.items() if path not in called and len(unit.graph.nodes) > 3]
    while waiting:
        unit, graph = waiting.pop()
        yield unit, graph
        for node in graph.find_nodes(op="call_module") if unit.kind == "module" else ():
            child = first.get(child_path(unit.path, node))
            if child is not None:
                waiting.append((child, child.fed if child.fed is not None and node.kwargs else child.graph))


def _is_counted(program: Program, unit: Unit, node: fx.Node) -> bool:
    if node.target in _COUNTED:
        return True
    op = read_grid_op(program, unit, node, through_modules=False) if node.op == "call_function" else None
    return op is not None and op.kind in ("cut", "pool", "join")


def _bytes(kind: OpType) -> int:
    tensor = kind.storage if isinstance(kind, QuantType) else kind
    return prod(tensor.shape) * tensor.dtype.itemsize if isinstance(tensor, TensorType) else 0


_QUANTIZE = OPS["lp.quantize"].run
_COUNTED = (_QUANTIZE, OPS["lp.scale"].run, OPS["lp.dequantize"].run, torch.amax, torch.Tensor.contiguous)
