"""Graph code: an fx.Graph as a function of a live module, which survives deepcopy and pickle.

Only the graph is state. Source is generated and compiled on the first call, and again after a copy or a load.
The module is an argument and not captured, so a copied model calls its own children.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from passes.ir.targets import find_op, find_target, name_of


class GraphCode:
    """`code(module, operands)` runs the graph: operands are the placeholders in order, the result is the flat tuple."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._function: Callable[..., Any] | None = None

    def __call__(self, module: nn.Module, operands: Sequence[Tensor]) -> Sequence[Any]:
        if self._function is None:
            self._function = compile_graph(self.graph)
        return self._function(module, *operands)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphCode":
        return self  # nothing in it belongs to one module: that is an argument

    def __reduce__(self) -> tuple[Any, ...]:
        # bytes: protocols 2 and 3 (torch.save) cannot name every constant of torch's
        return _load, (dumps(self.graph),)


def dumps(value: object) -> bytes:
    """Pickle in which graphs, wherever they are, are rows as in a GraphCode; `loads` reads it."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


def loads(held: bytes) -> Any:
    """What `dumps` wrote. torch warns of the class of its own specs of arguments, which nobody here can help."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return pickle.loads(held)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (_load_graph, (_to_rows(value),)) if isinstance(value, fx.Graph) else NotImplemented


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as `function(module, *operands)`.

    The module's variable is renamed: a child called `self` would otherwise be taken for the module.
    """
    code = graph.python_code(root_module=_ROOT)
    source = code.src.replace("def forward(self", f"def forward({_ROOT}", 1)
    namespace = dict(code.globals)
    exec(compile(source, "<lpcompile graph>", "exec"), namespace)
    return namespace["forward"]


@dataclass(frozen=True)
class _Reference:
    """Stands for a node in a pickled row."""

    name: str


@dataclass(frozen=True)
class _Named:
    """Stands for a function by its name in the text form; pickle cannot name all of torch's."""

    name: str

    def function(self) -> Callable[..., Any]:
        """Also an op of a library's own, which no text names."""
        return find_op(self.name) if self.name.startswith("torch.ops.") else find_target(self.name)


_Row = tuple[str, str, Any, Any, Any, dict[str, Any]]


def _to_rows(graph: fx.Graph) -> list[_Row]:
    def replace(value: Any) -> Any:
        return _Reference(value.name) if isinstance(value, fx.Node) else value

    return [
        (
            node.op,
            node.name,
            _name_target(node.target),
            _plain_copy(map_aggregate(node.args, replace)),
            _plain_copy(map_aggregate(node.kwargs, replace)),
            dict(node.meta),
        )
        for node in graph.nodes
    ]


def _load(graph: bytes) -> GraphCode:
    return GraphCode(loads(graph))


def _load_graph(rows: list[_Row]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def replace(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for op, name, target, args, kwargs, meta in rows:
        found = target.function() if isinstance(target, _Named) else target
        node = graph.create_node(op, found, map_aggregate(args, replace), map_aggregate(kwargs, replace), name=name)
        node.meta.update(meta)
        nodes[name] = node
    return graph


def _plain_copy(value: Any) -> Any:
    """fx's immutable containers as plain ones."""
    if isinstance(value, list):
        return [_plain_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain_copy(item) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_plain_copy(item) for item in value)
    return value


def _name_target(target: Any) -> Any:
    name = None if isinstance(target, str) else name_of(target)
    return target if name is None else _Named(name)


_ROOT = "_lp_root"
