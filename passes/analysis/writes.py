"""Writes: which nodes may write into a tensor that the graph reads, and the epochs that lie between them.

A cast of a tensor says what the tensor was when it was made: it may stand anywhere in the epoch of the tensor, and
nowhere else.
"""

from torch import fx

from passes.ir.program import Program, child_path


def writes(node: fx.Node) -> bool:
    """True for an operation that writes into an argument: add_, __iadd__, __setitem__, `out=`, `inplace=True`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (
        (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name in ("__setitem__", "setitem")
    )
    is_told = node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True
    return node.op in ("call_function", "call_method") and (in_place or is_told)


def epochs(program: Program, path: str, graph: fx.Graph) -> dict[fx.Node, int]:
    """How many writes lie before each node of a graph of the module at `path`, those of what it calls included.

    A write into a module's own parameter or buffer does not count: no cast of an activation reads it.
    """
    found, epoch = {}, 0
    for node in graph.nodes:
        epoch += _writes_here(program, path, node)
        found[node] = epoch
    return found


def _writes_here(program: Program, path: str, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _module_writes(program, child_path(path, node))
    return writes(node) and not (node.args and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr")


def _module_writes(program: Program, path: str) -> bool:
    return any(_writes_here(program, path, node) for unit in program.modules_at(path) for node in unit.graph.nodes)
