"""Graph code: an fx.Graph as a function of a live module, which survives deepcopy and pickle.

Only the graph is state. Source is generated and compiled on the first call, and again after a copy or a load.
The module is an argument and not captured, so a copied model calls its own children.
"""

import importlib
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate


class GraphCode:
    """`code(module, operands)` runs the graph: operands are the placeholders in order, the result is the flat tuple."""

    def __init__(self, graph: fx.Graph, *, switches_grad_mode: bool) -> None:
        self.graph = graph
        self.switches_grad_mode = switches_grad_mode
        self._function: Callable[..., Any] | None = None

    def __call__(self, module: torch.nn.Module, operands: Sequence[Tensor | int]) -> Sequence[Any]:
        function = self._function or self.compiled()
        if not self.switches_grad_mode:
            return function(module, *operands)
        before = torch.is_grad_enabled()
        try:
            return function(module, *operands)
        finally:
            # an error between two switches must not leave grad mode off for the rest of the program
            torch._C._set_grad_enabled(before)

    def compiled(self) -> Callable[..., Any]:
        """The function, made now if it is not there yet."""
        if self._function is None:
            self._function = compile_graph(self.graph)
        return self._function

    @cached_property
    def is_picklable(self) -> bool:
        """False where a target cannot be found again by name: a local autograd.Function, a lambda."""
        try:
            pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError):
            return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphCode":
        return self  # nothing in it belongs to one module: that is an argument

    def __reduce__(self) -> tuple[Any, ...]:
        # bytes: protocols 2 and 3 (torch.save) cannot name every constant of torch's
        return _load, (dumps(self.graph), self.switches_grad_mode)


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


def is_same_graph(left: fx.Graph, right: fx.Graph) -> bool:
    """Whether two graphs are the same node by node: operations, operands, constants and recorded metadata."""
    if left is right:
        return True
    if len(left.nodes) != len(right.nodes):
        return False
    twins: dict[fx.Node, fx.Node] = {}
    for a, b in zip(left.nodes, right.nodes):
        if a.op != b.op or a.target != b.target or a.name != b.name:
            return False
        if not _is_same_operand(a.args, b.args, twins) or not _is_same_operand(a.kwargs, b.kwargs, twins):
            return False
        if a.meta.get("tensor_meta") != b.meta.get("tensor_meta"):
            return False
        twins[a] = b
    return True


def _is_same_operand(a: Any, b: Any, twins: dict[fx.Node, fx.Node]) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, fx.Node):
        return twins.get(a) is b
    if isinstance(a, Sequence) and not isinstance(a, (str, bytes, range)):
        return len(a) == len(b) and all(_is_same_operand(x, y, twins) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_is_same_operand(a[key], b[key], twins) for key in a)
    if type(a) is slice:
        return all(_is_same_operand(getattr(a, s), getattr(b, s), twins) for s in ("start", "stop", "step"))
    return a is b or bool(a == b and repr(a) == repr(b))  # repr: 0.0 is not -0.0


@dataclass(frozen=True)
class _Reference:
    """Stands for a node in a pickled row."""

    name: str


@dataclass(frozen=True)
class _Named:
    """Stands for a function that pickle cannot name: an attribute of one of the namespaces."""

    namespace: str
    name: str


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


def _load(graph: bytes, switches_grad_mode: bool) -> GraphCode:
    return GraphCode(loads(graph), switches_grad_mode=switches_grad_mode)


def _load_graph(rows: list[_Row]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def replace(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, _Reference) else value

    for op, name, target, args, kwargs, meta in rows:
        found = getattr(_namespace(target.namespace), target.name) if isinstance(target, _Named) else target
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
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", "")
    for namespace in _NAMESPACES:
        if getattr(_namespace(namespace), name, None) is target:
            return _Named(namespace, name)
    return target


def _namespace(path: str) -> ModuleType | type:
    return torch.Tensor if path == "torch.Tensor" else importlib.import_module(path)


_ROOT = "_lp_root"

_NAMESPACES = ("torch", "torch.Tensor", "torch.nn.functional", "torch._C._nn", "torch._C", "operator", "math")
"""Where a function is looked for by its name, since many of torch's do not pickle (F.max_pool2d is a closure)."""
