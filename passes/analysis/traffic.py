"""Traffic: how many casts one forward runs, and how many bytes they and the ops that can carry grid values move.

An op moves what it reads and what it writes, by the shapes of the example call. Counted are lp.scale, lp.quantize,
lp.dequantize, relu, max-pool, cat, copies into contiguous order, and amax; a view moves nothing, and a GEMM moves the
same whatever these passes do.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from passes.analysis.grid_ops import read_grid_op
from passes.ir.program import Program
from passes.ir.types import types_of
from runtime.ops.dialect import OPS
from runtime.ops.types import OpType, QuantType, TensorType


@dataclass(frozen=True)
class Traffic:
    """Of one forward: lp.quantize nodes that run, and bytes moved as the head of this file counts them."""

    casts: int
    bytes: int


def traffic(program: Program) -> Traffic:
    """Of all graphs of the program."""
    casts = moved = 0
    for _, graph in program.graphs():
        types = types_of(graph)
        for node in graph.nodes:
            casts += node.target is _QUANTIZE
            if _is_counted(node):
                moved += sum(_bytes(types[each]) for each in (node, *node.all_input_nodes))
    return Traffic(casts, moved)


def _is_counted(node: fx.Node) -> bool:
    if node.target in _COUNTED:
        return True
    op = read_grid_op(node) if node.op == "call_function" else None
    return op is not None and op.kind in ("cut", "pool", "join")


def _bytes(kind: OpType) -> int:
    tensor = kind.storage if isinstance(kind, QuantType) else kind
    return prod(tensor.shape) * tensor.dtype.itemsize if isinstance(tensor, TensorType) else 0


_QUANTIZE = OPS["lp.quantize"].run
_CASTS = (OPS["lp.rotate"].run, OPS["lp.scale"].run, OPS["lp.dequantize"].run)
_COUNTED = (_QUANTIZE, *_CASTS, torch.amax, torch.Tensor.contiguous)
