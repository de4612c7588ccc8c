"""fuse: a residual and an activation that follow a product become a part of it.

    %y = call_module[fc](%x)       becomes      %z = call_module[fc](%x, lp_residual=%r, lp_activation='relu')
    %s = add(%y, %r)
    %z = relu(%s)

and the lp.gemm of fc's fed graph gets the operand and the attribute. No bit changes, of the outputs or of any gradient:
so what follows must follow at once, or gradients would add up in another order. A product in the graph itself is fused
in the same way, without a call.
"""

import copy
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from passes.ir.gemm_nodes import argument
from passes.ir.program import ACTIVATION, FOLDED, RESIDUAL, Program, Unit, child_path
from passes.ir.types import META
from passes.manager import Pass
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class Fuse(Pass):
    """For inference: in training the modules around a leaf get hooks of an engine, and a fused call has none to show.
    A leaf that has several calls is left alone, since its fed graph is one.
    """

    name: ClassVar[str] = "fuse"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")

    def run(self, program: Program) -> bool:
        calls = _num_calls(program)
        changed = False
        for unit in program.units.values():
            for node in list(unit.graph.nodes):
                if node.target is _GEMM:
                    changed |= _fuse_gemm(program, unit, node)
                leaf = program.called_leaf(unit, node)
                if leaf is not None and calls[leaf.path] == 1 and not leaf.is_observed:
                    changed |= _fuse_call(program, unit, node, leaf)
        return changed


@dataclass(frozen=True)
class _Tail:
    """What follows a product at once: the nodes that go, the residual, the activation, and modules that it calls."""

    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None
    activation: str
    modules: tuple[str, ...]


def activation_of(node: fx.Node) -> str:
    """The activation that a node of a graph is; "" for another."""
    if node.op == "call_function" and node.target in _GELU:
        return {"none": "gelu", "tanh": "gelu-tanh"}.get(argument(node, 1, "approximate", "none"), "")
    return "relu" if node.op == "call_function" and node.target in _RELU else ""


def _num_calls(program: Program) -> dict[str, int]:
    """How many nodes call each leaf."""
    calls = dict.fromkeys((unit.path for unit in program.units.values() if unit.kind == "leaf"), 0)
    for unit in program.units.values():
        for node in unit.graph.nodes:
            leaf = program.called_leaf(unit, node)
            if leaf is not None:
                calls[leaf.path] += 1
    return calls


def _fuse_gemm(program: Program, unit: Unit, gemm: fx.Node) -> bool:
    tail = _tail(program, unit, gemm)
    if tail is None or gemm.args[-1] is not None or "activation" in gemm.kwargs:
        return False
    _write(gemm, tail.residual, tail.activation)
    _replace(gemm, tail)
    return True


def _fuse_call(program: Program, unit: Unit, call: fx.Node, leaf: Unit) -> bool:
    graph = leaf.fed if leaf.fed is not None and call.kwargs else leaf.graph
    gemms = [node for node in graph.nodes if node.target is _GEMM]
    output = next(node for node in graph.nodes if node.op == "output")
    tail = _tail(program, unit, call)
    if tail is None or len(gemms) != 1 or output.args != ((gemms[0],),) or {ACTIVATION, RESIDUAL} & {*call.kwargs}:
        return False
    fed = copy.deepcopy(graph)
    gemm = next(node for node in fed.nodes if node.target is _GEMM)
    handed: dict[str, Any] = {}
    if tail.residual is not None:
        handed[RESIDUAL] = tail.residual
    if tail.activation:
        handed[ACTIVATION] = tail.activation
    added = {}
    for name in handed:
        with fed.inserting_after([node for node in fed.nodes if node.op == "placeholder"][-1]):
            added[name] = fed.placeholder(name, default_value=None)
    if tail.residual is not None:
        added[RESIDUAL].meta[META] = tail.residual.meta[META]
    _write(gemm, added.get(RESIDUAL), tail.activation)
    leaf.fed = fed
    call.kwargs = {**call.kwargs, **handed}
    _replace(call, tail)
    return True


def _write(gemm: fx.Node, residual: fx.Node | None, activation: str) -> None:
    gemm.args = (*gemm.args[:-1], residual)
    if activation:
        gemm.kwargs = {**gemm.kwargs, "activation": activation}


def _replace(product: fx.Node, tail: _Tail) -> None:
    last = tail.nodes[-1]
    last.replace_all_uses_with(product)
    for node in reversed(tail.nodes):
        product.graph.erase_node(node)
    if tail.modules:
        product.meta[FOLDED] = ",".join(filter(None, (product.meta.get(FOLDED), *tail.modules)))


def _tail(program: Program, unit: Unit, product: fx.Node) -> _Tail | None:
    """What can become a part of a product: first a sum, then an activation, each right after what it takes alone."""
    nodes: list[fx.Node] = []
    modules: list[str] = []
    last, residual, activation = product, None, ""
    following = _follower(last)
    if following is not None and (residual := _residual(following, last)) is not None:
        nodes.append(following)
        last, following = following, _follower(following)
    if following is not None and following.args[:1] == (last,):
        activation = activation_of(following) or _called_activation(program, unit, following)
        if activation:
            nodes.append(following)
            modules += [str(following.target)] if following.op == "call_module" else []
    return _Tail(tuple(nodes), residual, activation, tuple(modules)) if nodes else None


def _follower(node: fx.Node) -> fx.Node | None:
    """The next node, where that is all that uses this one."""
    return node.next if list(node.users) == [node.next] else None


def _residual(node: fx.Node, product: fx.Node) -> fx.Node | None:
    """What a sum adds to the product, of the same shape and dtype, if the node is such a sum."""
    if node.op != "call_function" or node.kwargs or len(node.args) != 2 or node.target not in (*_ADD, *_ADD_IN_PLACE):
        return None
    left, right = node.args
    if product not in (left, right) or (node.target in _ADD_IN_PLACE and left is not product):
        return None
    other = right if left is product else left
    if not isinstance(other, fx.Node) or other is product or META not in other.meta or META not in product.meta:
        return None
    seen, wanted = other.meta[META], product.meta[META]
    return other if (seen.shape, seen.dtype) == (wanted.shape, wanted.dtype) else None


def _called_activation(program: Program, unit: Unit, node: fx.Node) -> str:
    """The activation that a called module is, if its graph is that and nothing more, and no hooks see it."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return ""
    units = [each for each in program.units.values() if each.path == child_path(unit.path, node)]
    return _whole_activation(units[0]) if len(units) == 1 and not units[0].is_observed else ""


def _whole_activation(unit: Unit) -> str:
    x, *rest = unit.graph.nodes
    if len(rest) != 2 or rest[0].args[:1] != (x,) or rest[1].args != ((rest[0],),):
        return ""
    return activation_of(rest[0])


_GEMM = OPS["lp.gemm"].run
_RELU = (F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_)
_GELU = (F.gelu,)
_ADD = (operator.add, torch.add, torch.Tensor.add, torch.Tensor.__add__)
_ADD_IN_PLACE = (operator.iadd, torch.Tensor.add_, torch.Tensor.__iadd__)
