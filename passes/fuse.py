"""fuse: a residual and an activation that follow a product become a part of it.

    %y = lp.gemm(%x, %w, ...)      becomes      %z = lp.gemm(%x, %w, ..., %r) {activation = "relu"}
    %s = add(%y, %r)
    %z = relu(%s)

No bit of the output changes. The product runs where the last of the three ran, so that what is added is there by then;
nothing may write in between.
"""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from passes.analysis.writes import epochs, writes
from passes.ir.gemm_nodes import argument
from passes.ir.operands import operands_of, set_operands
from passes.ir.program import Program
from passes.ir.types import META
from passes.manager import Pass
from runtime.ops.dialect import OPS


@dataclass(frozen=True)
class Fuse(Pass):
    """For inference: moved, a product would have its gradients added up in another order."""

    name: ClassVar[str] = "fuse"
    requires: ClassVar[tuple[str, ...]] = ("annotated", "cast")

    def run(self, program: Program) -> bool:
        changed = False
        for unit in program.units.values():
            for gemm in unit.graph.find_nodes(op="call_function", target=_GEMM):
                changed |= _fuse(unit.graph, gemm)
        return changed


def activation_of(node: fx.Node) -> str:
    """The activation that a node of a graph is; "" for another."""
    if node.op == "call_function" and node.target in _GELU:
        return {"none": "gelu", "tanh": "gelu-tanh"}.get(argument(node, 1, "approximate", "none"), "")
    return "relu" if node.op == "call_function" and node.target in _RELU else ""


def _fuse(graph: fx.Graph, gemm: fx.Node) -> bool:
    if operands_of(gemm)["residual"] is not None or "activation" in gemm.kwargs:
        return False
    tail: list[fx.Node] = []
    following, residual, activation = _follower(gemm), None, ""
    if following is not None and (residual := _residual(following, gemm)) is not None:
        tail.append(following)
        following = _follower(following)
    if following is not None and following.args[:1] == (tail[-1] if tail else gemm,):
        activation = activation_of(following)
        tail += [following] if activation else []
    epoch_of = epochs(graph)
    if not tail or epoch_of[tail[-1]] - epoch_of[gemm] != sum(map(writes, tail)):
        return False
    set_operands(gemm, residual=residual)
    if activation:
        gemm.kwargs = {**gemm.kwargs, "activation": activation}
    tail[-1].prepend(gemm)
    tail[-1].replace_all_uses_with(gemm)
    for node in reversed(tail):
        graph.erase_node(node)
    return True


def _follower(node: fx.Node) -> fx.Node | None:
    """What uses a node, where one node does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


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


_GEMM = OPS["lp.gemm"].run
_RELU = (F.relu, torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_)
_GELU = (F.gelu,)
_ADD = (operator.add, torch.add, torch.Tensor.add, torch.Tensor.__add__)
_ADD_IN_PLACE = (operator.iadd, torch.Tensor.add_, torch.Tensor.__iadd__)
