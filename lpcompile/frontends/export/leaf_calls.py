"""Leaf calls: while a model is traced a leaf is one opaque operation, and its node then becomes the leaf's own graph.

    %y = lp.leaf_call([%x], 3)      becomes      %y = linear(%x, %layer.fc.weight, %layer.fc.bias)     site layer.fc
                                    or           %y = call_module[encoder.attn](%q, %k, %v)     several products

So the products of leaves have the nodes, the names and the geometry that the front end `leaves` gives them, and a leaf
that no trace should go into (the time steps of an LSTM, routed experts) is called as it is.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.library import Library
from torch.utils import _pytree as pytree

from lpcompile.errors import NotSupported
from lpcompile.frontends.leaves.find import Leaf, leaf_graph
from lpcompile.frontends.leaves.recurrent import recurrent_like
from passes.ir.gemm_nodes import read_gemm
from passes.ir.program import SITE


@dataclass(frozen=True)
class Structure:
    """How values are put together from tensors: `plain` has None where a tensor is."""

    spec: pytree.TreeSpec
    plain: tuple[Any, ...]
    is_tensor: tuple[bool, ...]

    @staticmethod
    def of(where: str, value: Any) -> tuple["Structure", list[Tensor]]:
        leaves, spec = pytree.tree_flatten(value)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        plain = tuple(None if at else leaf for at, leaf in zip(is_tensor, leaves))
        if not all(leaf is None or type(leaf) in (bool, int, float, str) for leaf in plain):
            raise NotSupported("a leaf takes or gives what is neither a tensor nor a plain value", where=where)
        return Structure(spec, plain, is_tensor), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def build(self, tensors: Iterable[Any]) -> Any:
        """The values, with these in the places of the tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if at else leaf for at, leaf in zip(self.is_tensor, self.plain)]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass
class LeafCall:
    """One call of a leaf in a trace: what it was given, (args, kwargs), and what it gave."""

    path: str
    module: nn.Module
    given: Structure
    result: Structure | None = None


@contextmanager
def opaque_leaves(model: nn.Module, leaves: Sequence[Leaf]) -> Iterator[list[LeafCall]]:
    """While entered, a call of a leaf is one operation. Yields the calls made, by their number."""
    calls: list[LeafCall] = []
    modules = {path: model.get_submodule(path) for path in dict.fromkeys(leaf.path for leaf in leaves)}
    _TRACES.append(calls)
    try:
        for path, module in modules.items():
            vars(module)["forward"] = partial(_call, calls, path, module)
        yield calls
    finally:
        _TRACES.remove(calls)
        for module in modules.values():
            vars(module).pop("forward", None)


def _call(calls: list[LeafCall], path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    given, tensors = Structure.of(path, (args, kwargs))
    call = LeafCall(path, module, given)
    calls.append(call)
    results = torch.ops.lp.leaf_call(tensors, len(calls) - 1)
    assert call.result is not None
    return call.result.build(results)


def _without_data(tensors: Sequence[Tensor], call: int) -> list[Tensor]:
    """What the leaf gives for tensors without data: its own forward says it, but for a loop over time, which would fix
    how long it is.
    """
    this = _TRACES[-1][call]
    args, kwargs = this.given.build(tensors)
    if isinstance(this.module, nn.RNNBase) and (args or "input" in kwargs):
        found: Any = recurrent_like(this.module, args[0] if args else kwargs["input"])
    else:
        found = type(this.module).forward(this.module, *args, **kwargs)
    this.result, results = Structure.of(this.path, found)
    return [torch.empty_like(result) for result in results]


def inline_leaves(graph: fx.Graph, calls: Sequence[LeafCall], leaves: Sequence[Leaf]) -> None:
    """Put in place of each opaque call the graph of the leaf, or a call of a module that holds several products."""
    parts = {path: list(found) for path, found in groupby(leaves, key=lambda leaf: leaf.path)}
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.lp.leaf_call.default)):
        tensors, number = node.args
        call = calls[number]
        leaf = parts[call.path][0]
        with graph.inserting_before(node):
            if leaf.part:
                _call_module(graph, node, call, tensors)
            else:
                if len(call.given.plain) != 1:
                    raise NotSupported("the leaf is called with more than its input", where=call.path)
                _copy_graph(graph, node, leaf, call.module, tensors[0])
        graph.erase_node(node)


def _copy_graph(graph: fx.Graph, opaque: fx.Node, leaf: Leaf, module: nn.Module, x: fx.Node) -> None:
    own = leaf_graph(module)
    images: dict[fx.Node, fx.Node] = {}
    for node in own.nodes:
        if node.op == "placeholder":
            images[node] = x
        elif node.op == "get_attr":
            images[node] = graph.get_attr(f"{leaf.path}.{node.target}".lstrip("."))
            images[node].meta |= node.meta
        elif node.op != "output":
            images[node] = graph.node_copy(node, images.__getitem__)
            if read_gemm(node) is not None:
                images[node].meta[SITE] = leaf.name
    (result,) = own.output_node().all_input_nodes
    (given,) = opaque.users
    images[result].meta["val"] = given.meta["val"]
    given.replace_all_uses_with(images[result])
    graph.erase_node(given)


def _call_module(graph: fx.Graph, opaque: fx.Node, call: LeafCall, tensors: Sequence[fx.Node]) -> None:
    args, kwargs = call.given.build(tensors)
    made = graph.call_module(call.path, args, kwargs)
    assert call.result is not None
    numbered = call.result.build(range(sum(call.result.is_tensor)))
    paths = {number: path for path, number in pytree.tree_flatten_with_path(numbered)[0]}
    for given in list(opaque.users):
        value = made
        for key in paths[given.args[1]]:
            at = key.idx if isinstance(key, pytree.SequenceKey) else getattr(key, "key", None)
            value = graph.call_function(operator.getitem, (value, at))
        value.meta["val"] = given.meta["val"]
        given.replace_all_uses_with(value)
        graph.erase_node(given)


_TRACES: list[list[LeafCall]] = []
"""The calls of the traces that are being made, the innermost last: an operation can name a call by its number only."""

_OPS = Library("lp", "FRAGMENT")
_OPS.define("leaf_call(Tensor[] operands, int call) -> Tensor[]")
torch.library.register_fake("lp::leaf_call", _without_data, lib=_OPS)
