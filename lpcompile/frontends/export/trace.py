"""Trace: one FX graph of a frozen model, as torch.export sees it, for the passes.

    placeholders       the tensors among the arguments of a call, in order
    get_attr           parameters and buffers by their path: they stay in the live model
    call_function      torch's functions (functions.py); products have their site's name (leaf_calls.py, and below)
    call_module        leaves of several products
    output             the flat tuple of the result

Sizes are symbols where the forward lets them be: a node reads them from a placeholder.
"""

import copy
import functools
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils import _pytree as pytree

from lpcompile.errors import NotSupported
from lpcompile.frontends.export.facts import CONTAINERS, items_of, mark_of
from lpcompile.frontends.export.functions import write_functions
from lpcompile.frontends.export.leaf_calls import LeafCall, inline_leaves, opaque_leaves
from lpcompile.frontends.export.sizes import SizeRules, size_rules
from lpcompile.frontends.intercept.look import generator_states, no_trace
from lpcompile.frontends.leaves.find import Leaf
from passes.ir.gemm_nodes import read_gemm, stem_of
from passes.ir.program import GROUP, REPEATED, SITE, WEIGHT
from passes.ir.types import META


@dataclass(frozen=True)
class Exported:
    """A graph and the calls that it stands for: those with arguments like `in_spec` and sizes as `sizes` says."""

    graph: fx.Graph
    in_spec: pytree.TreeSpec
    """Of (args, kwargs)."""
    out_spec: pytree.TreeSpec
    sizes: SizeRules
    """Of the tensors, which are the placeholders."""
    training: Mapping[str, bool]
    """Of every module, by its path, while this was made."""


def export_graph(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[Leaf]
) -> Exported:
    """The graph of one call of a model in evaluation mode, without gradients; nothing is computed, and the model is
    left as it was. Sizes above 1 are symbols where the forward does not fix them.

    Plain values that a forward writes into attributes or configs are no part of the graph, if with them a second call
    writes no more and computes the same. Raises NotSupported with the reason where torch.export gives no graph that
    stands for the forward.
    """
    values, in_spec = pytree.tree_flatten((args, dict(kwargs)))
    for value in values:
        if not isinstance(value, Tensor) and type(value) not in (type(None), bool, int, float, str, torch.dtype):
            raise NotSupported(f"an argument is a {type(value).__name__}, which no graph can take")
    with _TRACING, no_trace(model):
        program, calls = _traced(_twin(model), args, kwargs, leaves)
    graph, signature = fx.Graph(), program.graph_signature
    graph.output(graph.graph_copy(program.graph, {}))
    assert all(each.kind is OutputKind.USER_OUTPUT for each in signature.output_specs)  # writes are operations
    if graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        raise NotSupported("sizes in its forward follow from data")
    if any(node.op == "get_attr" for node in graph.nodes):
        raise NotSupported("its forward has a branch or a loop that is an operation")
    placeholders = graph.find_nodes(op="placeholder")
    tensors = [
        node for node, each in zip(placeholders, signature.input_specs)
        if each.kind is InputKind.USER_INPUT and isinstance(node.meta["val"], Tensor)
    ]  # fmt: skip
    sizes = size_rules([node.meta["val"] for node in tensors], program)
    inline_leaves(graph, calls, leaves)
    for node, each in zip(placeholders, signature.input_specs):
        if each.kind is not InputKind.USER_INPUT:
            _read_live(graph, node, str(each.target), program.constants, model)
        elif node not in tensors:
            graph.erase_node(node)  # a plain value, which the graph holds
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    does_more = {node for node in graph.nodes if _does_more(node)}  # as operations say it, and functions do not
    if tensors:
        write_functions(graph, tensors[0].meta["val"].fake_mode)
    _name_functional(graph)  # as products are read from here on, those without readers among them
    graph.eliminate_dead_code(does_more.__contains__)
    for node in graph.nodes:
        _keep_own_meta(node)
    (results,) = graph.output_node().args
    graph.output_node().args = (tuple(results),)  # type: ignore[arg-type]
    graph.lint()
    assert program.call_spec.in_spec == in_spec
    assert program.call_spec.out_spec is not None
    training = {path: module.training for path, module in model.named_modules()}
    return Exported(graph, in_spec, program.call_spec.out_spec, sizes, training)


def _twin(model: nn.Module) -> nn.Module:
    """A copy, of which the forward may change what it wants but the parameters and buffers, which are the model's:
    torch.export leaves those alone.
    """
    tensors = (*model.parameters(), *model.buffers())
    try:
        return copy.deepcopy(model, {id(each): each for each in tensors})
    except Exception as error:  # whatever an attribute says
        raise NotSupported(f"it cannot be copied: {type(error).__name__}: {_first_line(error)}") from error


def _traced(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: Sequence[Leaf]) -> "_Trace":
    """What torch.export makes of one call, and of a second one where the first writes attributes."""
    dims = torch.export.ShapesCollection()
    for value in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, Tensor):
            dims[value] = [Dim.AUTO if size > 1 else Dim.STATIC for size in value.shape]

    def trace() -> _Trace:
        with torch.no_grad(), opaque_leaves(model, leaves) as calls:
            try:
                shapes = dims.dynamic_shapes(model, args, dict(kwargs))
                return _Trace(
                    torch.export.export(model, args, dict(kwargs), dynamic_shapes=shapes, strict=False), calls
                )
            except NotSupported:
                raise
            except Exception as error:  # whatever a forward does with tensors that have no data
                raise NotSupported(f"torch.export says {type(error).__name__}: {_first_line(error)}") from error

    with _watched(model, leaves) as changes:
        first = trace()
        if not changes:
            return first
        for holder, name, value in changes:  # torch.export takes some of them back
            holder[name] = value
        changes.clear()
        second = trace()
        if changes or not _is_same_program(first.program, second.program):
            raise NotSupported(_CHANGES)
        return second


_Change = tuple[dict[str, Any], str, Any]
"""A dict of attributes, a name in it, and the plain value that was written."""


class _Trace(NamedTuple):
    program: torch.export.ExportedProgram
    calls: list[LeafCall]
    """Of leaves."""


def _is_same_program(left: torch.export.ExportedProgram, right: torch.export.ExportedProgram) -> bool:
    if str(left.graph) != str(right.graph) or left.constants.keys() != right.constants.keys():
        return False
    pairs = ((constant, right.constants[name]) for name, constant in left.constants.items())
    return all(
        one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other))
        for one, other in pairs
    )


def _does_more(node: fx.Node) -> bool:
    """Whether a node without readers is there for something."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op in ("placeholder", "output", "call_module")
    schema = node.target._schema
    return schema.is_mutable or not schema.returns or torch.Tag.nondeterministic_seeded in node.target.tags


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _read_live(graph: fx.Graph, node: fx.Node, target: str, constants: Mapping[str, Any], model: nn.Module) -> None:
    """A parameter, a buffer, a tensor in an attribute: read from the model. What the forward makes from numbers of its
    own is made again.
    """
    if node.users:
        path, _, name = target.rpartition(".")
        with graph.inserting_before(next(each for each in graph.nodes if each in node.users)):
            try:
                is_there = isinstance(getattr(model.get_submodule(path), name, None), Tensor)
            except AttributeError:
                is_there = False
            if is_there:
                made = graph.get_attr(target)
            else:
                made = _made_again(graph, constants.get(target))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
    graph.erase_node(node)


def _made_again(graph: fx.Graph, constant: Any) -> fx.Node:
    if not isinstance(constant, Tensor) or constant.numel() > _MOST_ELEMENTS:
        raise NotSupported("its forward reads an object or a large tensor that is no attribute of a module")
    return graph.call_function(torch.tensor, (constant.tolist(),), {"dtype": constant.dtype, "device": constant.device})


def _name_functional(graph: fx.Graph) -> None:
    """Give each product that is no leaf's the name PATH.STEM_NUMBER, counted anew in each call of the module."""
    numbers: Counter[tuple[str, str]] = Counter()
    first: dict[str, fx.Node] = {}
    for node in graph.nodes:
        gemm = None if SITE in node.meta else read_gemm(node)
        if gemm is not None:
            call, (path, _) = list(node.meta["nn_module_stack"].items())[-1]
            number = numbers[call, stem_of(gemm)]
            numbers[call, stem_of(gemm)] += 1
            node.meta[SITE] = f"{path.partition('@')[0]}.{stem_of(gemm)}_{number}".removeprefix(".")
        site = node.meta.get(SITE)
        if site is not None and first.setdefault(site, node) is not node:
            node.meta[REPEATED] = first[site].meta[REPEATED] = True


def _keep_own_meta(node: fx.Node) -> None:
    """Of torch.export's metadata the shape and dtype of a tensor, at the sizes of the example."""
    value = node.meta.get("val")
    kept = {key: node.meta[key] for key in (SITE, GROUP, REPEATED, WEIGHT, META) if key in node.meta}
    node.meta.clear()
    node.meta.update(kept)
    if isinstance(value, Tensor):
        shape, strides = ([_hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
        node.meta[META] = _extract_tensor_metadata(
            torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
        )


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


@contextmanager
def _watched(model: nn.Module, leaves: Sequence[Leaf]) -> Iterator[list[_Change]]:
    """What the forward writes into modules, their containers and their configs: the plain values among it are in the
    list that is given; others raise NotSupported. Hooks of the root do not run.
    """
    original, known, changes = model.forward, {leaf.path for leaf in leaves}, list[_Change]()

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = _State(module for path, module in model.named_modules() if path not in known)
        states = generator_states()
        result = original(*args, **kwargs)
        if generator_states() != states:
            raise NotSupported("its forward draws random numbers that are not torch's")
        for holder, old in before.changed():
            if not isinstance(holder, dict) or holder.keys() != old.keys():
                raise NotSupported(_CHANGES)
            names = [name for name in holder if not _is_same(holder[name], old[name])]
            if any(
                not isinstance(each[name], bool | int | float | str | None) for name in names for each in (holder, old)
            ):
                raise NotSupported(_CHANGES)
            changes.extend((holder, name, holder[name]) for name in names)
        if any(isinstance(each, torch.Size) for each in pytree.tree_leaves(result, is_leaf=_is_size)):
            raise NotSupported("its forward returns a torch.Size, for which a graph gives a tuple")
        return result

    for name in _HOOKS:
        vars(model)[name].clear()
    vars(model)["forward"] = forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is dropped here
        yield changes


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


class _State:
    """What modules hold beside the data of their tensors: every dict, list and set of theirs, and in these and in
    configs what a write moves of tensors and arrays, which a graph holds as they are.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: dict[int, tuple[Any, Any]] = {}
        for module in modules:
            own = vars(module)
            self._hold(own)
            self._hold_inside([each for each in own.values() if not isinstance(each, Tensor)], own)

    def _hold(self, holder: Any) -> None:
        mark = mark_of(holder)
        self._held[id(holder)] = holder, copy.copy(holder) if mark is None else mark

    def _hold_inside(self, waiting: list[Any], own: Mapping[str, Any]) -> None:
        while waiting:
            value = waiting.pop()
            if id(value) in self._held or isinstance(value, (nn.Module, type)):
                continue
            if isinstance(value, CONTAINERS) or mark_of(value) is not None:
                self._hold(value)
            if isinstance(value, CONTAINERS):
                is_known = value is own["_parameters"] or value is own["_buffers"]
                waiting += [] if is_known else items_of(value)
            elif hasattr(value, "__dict__") and not isinstance(value, Tensor):
                waiting.append(vars(value))

    def changed(self) -> list[Any]:
        return [
            (holder, before)
            for holder, before in self._held.values()
            if not (_is_same(holder, before) if mark_of(holder) is None else mark_of(holder) == before)
        ]


def _is_same(left: Any, right: Any) -> bool:
    """Whether two values are one object, or containers and plain values of the same: torch.export builds some anew."""
    if left is right or type(left) is not type(right):
        return left is right
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_is_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple, deque)):
        return len(left) == len(right) and all(map(_is_same, left, right))
    return isinstance(left, (set, frozenset, bool, int, float, str)) and left == right


_TRACING = threading.RLock()
"""torch.export patches modules and torch's functions for the whole process: one thread traces at a time."""
_CHANGES = "its forward changes attributes of a module"
_MOST_ELEMENTS = 64
"""Of a tensor that a graph makes anew in each call: a microsecond or two."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
