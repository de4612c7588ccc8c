"""Operands of lp nodes by name: a node's args are in the order that its op declares, and nobody else counts them."""

from collections.abc import Mapping
from typing import Any

from torch import fx

from runtime.ops.declared import OpDef
from runtime.ops.dialect import OP_OF, OPS

GIVEN = "operands"
"""The attribute of the text that names the operands that an lp op with optional ones is given, in their order."""
Operands = dict[str, fx.Node | None]


def operands_of(node: fx.Node) -> Operands:
    """What an lp node is given, by the names of its op's operands; None for one that is not there."""
    return dict(zip(names_of(OP_OF[node.target]), node.args))  # type: ignore[arg-type,index]


def set_operands(node: fx.Node, **values: fx.Node | None) -> None:
    """Give an lp node other operands; those that are not named stay."""
    given: dict[str, Any] = operands_of(node)
    assert values.keys() <= given.keys()
    node.args = tuple((given | values).values())


def call_op(graph: fx.Graph, name: str, operands: Mapping[str, fx.Node | None], attributes: dict[str, Any]) -> fx.Node:
    """A node of the op of that name, where the graph inserts nodes; an operand that is not named is not there."""
    names = names_of(OPS[name])
    assert operands.keys() <= {*names}
    return graph.call_function(OPS[name].run, tuple(operands.get(each) for each in names), attributes)


def names_of(op: OpDef) -> list[str]:
    """The names of an op's operands, in order."""
    return [operand.name for operand in op.operands]
