"""decompose-products: einsum and grouped products that the policy names become plain products.

    einsum(eq, %a, %b)        ->  from_matrices(matmul(left_matrices(%a), right_matrices(%b)))
    grouped_mm(%x, %w, offs)  ->  join_groups([linear(%x_g, %w_g) for each group g])    one site, a GEMM per group

Bit for bit what torch computes on a CPU in fp32, forward and backward.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.ir.gemm_nodes import Composite, argument, read_gemm
from passes.ir.program import GROUP, SITE, WEIGHT, Program
from passes.manager import Pass
from runtime.ops import einsum, grouped
from runtime.ops.contractions import linear_kn


@dataclass(frozen=True)
class DecomposeProducts(Pass):
    """Rewrites the composite nodes that `program.specs` names."""

    name: ClassVar[str] = "decompose-products"

    def run(self, program: Program) -> bool:
        changed = False
        for _, graph in program.graphs():
            for node in list(graph.nodes):
                gemm = read_gemm(node) if node.meta.get(SITE) in program.specs else None
                if isinstance(gemm, Composite) and gemm.taken_apart_by == self.name:
                    with graph.inserting_before(node):
                        new = _REWRITES[gemm.stem](graph, node)
                    new.meta.update({key: value for key, value in node.meta.items() if key != SITE})
                    node.replace_all_uses_with(new)
                    graph.erase_node(node)
                    changed = True
        return changed


def _product(graph: fx.Graph, site: str, function: Any, lhs: fx.Node, rhs: fx.Node, group: int = 0) -> fx.Node:
    product = graph.call_function(function, (lhs, rhs))
    product.meta.update({SITE: site, GROUP: group})
    return product


def _rewrite_einsum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    equation = node.args[0]
    left, right = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    a = graph.call_function(einsum.left_matrices, (left, equation))
    b = graph.call_function(einsum.right_matrices, (right, equation))
    product = _product(graph, node.meta[SITE], torch.matmul, a, b)
    return graph.call_function(einsum.from_matrices, (product, left, right, equation))


def _rewrite_grouped(graph: fx.Graph, node: fx.Node) -> fx.Node:
    x, offs = argument(node, 0, "mat_a"), argument(node, 2, "offs")
    weight = argument(node, 1, "mat_b")
    kind: Callable[..., Any] = linear_kn
    num_groups = weight.meta["tensor_meta"].shape[0]
    if _is_transpose(weight):  # stored as (G, N, K), the weight of a linear layer per group
        kind, weight = torch._C._nn.linear, weight.args[0]
    rows = graph.call_function(grouped.split_groups, (x, offs))
    matrices = graph.call_function(torch.unbind, (weight, 0))
    products = []
    for group in range(num_groups):
        lhs, rhs = (graph.call_function(operator.getitem, (source, group)) for source in (rows, matrices))
        rhs.meta[WEIGHT] = weight.op == "get_attr" or weight.meta.get(WEIGHT, False)
        products.append(_product(graph, node.meta[SITE], kind, lhs, rhs, group))
    rest = graph.call_function(operator.getitem, (rows, num_groups))
    return graph.call_function(grouped.join_groups, (products, rest))


def _is_transpose(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] == "mT"
    dims = {dim % 3 for dim in node.args[1:] if isinstance(dim, int)}
    return node.target in (torch.transpose, torch.Tensor.transpose) and dims == {1, 2}


_REWRITES: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "einsum": _rewrite_einsum,
    "grouped_mm": _rewrite_grouped,
}
