"""Types of nodes: what the text says each value is, from the node's declaration or from the example call."""

import operator
from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata

from passes.ir.operands import operands_of
from passes.ir.program import STATE
from runtime.ops.dialect import OP_OF
from runtime.ops.types import DTYPE_NAMES, VALUE, Operands, OpType, PlainType, TensorType

META = "tensor_meta"
"""Key of `node.meta`: shape and dtype of a tensor, as the example call had them."""


Types = Mapping[fx.Node, OpType]
"""Of the nodes before the one that is asked about."""


def types_of(graph: fx.Graph) -> dict[fx.Node, OpType]:
    """The type of every node of a graph that verifies."""
    types: dict[fx.Node, OpType] = {}
    for node in graph.nodes:
        types[node] = type_of(node, types)
    return types


def type_of(node: fx.Node, types: Types) -> OpType:
    """An lp op's declared result, a tensor of the example call, the RunState, a size, or `!torch.value`."""
    if node.op == "call_function" and node.target in OP_OF:
        declared = declared_type(node, types)
        return declared if declared is not VALUE else seen_type(node)
    if node.op == "get_attr" and node.target == STATE:
        return PlainType.STATE
    if _is_size(node, types):
        return PlainType.INDEX
    return seen_type(node)


def declared_type(node: fx.Node, types: Types) -> OpType:
    """What the declaration of a valid lp node's op says of its result."""
    op = OP_OF[node.target]  # type: ignore[index]
    return op.result(operand_types(node, types), dict(node.kwargs))


def operand_types(node: fx.Node, types: Types) -> Operands:
    """Of an lp node, by the operands' names."""
    return {name: types[value] if value is not None else None for name, value in operands_of(node).items()}


def tensor_meta(kind: TensorType) -> TensorMetadata:
    """What a node carries whose type the text gives: contiguous, no gradient; the text does not say more."""
    return _extract_tensor_metadata(torch.empty(kind.shape, dtype=kind.dtype, device="meta"))


def seen_type(node: fx.Node) -> OpType:
    """The tensor that the example call had there."""
    meta = node.meta.get(META)
    if not isinstance(meta, TensorMetadata) or meta.dtype not in DTYPE_NAMES:
        return VALUE
    return TensorType(tuple(meta.shape), meta.dtype)


def _is_size(node: fx.Node, types: Types) -> bool:
    """A dim of a tensor, or arithmetic of such."""
    if node.op != "call_function" or node.kwargs:
        return False
    if node.target is torch.Tensor.size:
        return len(node.args) == 2
    if node.target not in _SIZE_FUNCTIONS:
        return False
    return all(types[arg] is PlainType.INDEX if isinstance(arg, fx.Node) else type(arg) is int for arg in node.args)


_SIZE_FUNCTIONS = (operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.pow)
