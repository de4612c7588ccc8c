"""Writes: which nodes may write into a tensor that the graph reads, and the epochs that lie between them.

A cast of a tensor says what the tensor was when it was made: it may stand anywhere in the epoch of the tensor, and
nowhere else.
"""

from torch import fx


def writes(node: fx.Node) -> bool:
    """True for an operation that writes into an argument: add_, __iadd__, __setitem__, `out=`, `inplace=True`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (
        (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name in ("__setitem__", "setitem")
    )
    is_told = node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True
    return node.op in ("call_function", "call_method") and (in_place or is_told)


def epochs(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many writes lie before each node of a graph. A module that it calls is a leaf, which does not write.

    A write into a parameter or buffer does not count: no cast of an activation reads it.
    """
    found, epoch = {}, 0
    for node in graph.nodes:
        into = node.args[0] if node.args else None
        epoch += writes(node) and not (isinstance(into, fx.Node) and into.op == "get_attr")
        found[node] = epoch
    return found
