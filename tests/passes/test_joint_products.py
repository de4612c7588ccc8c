"""Which products of a joint graph are FWD, BWD and GRAD: every way in which autograd may write dx and dw."""

from typing import Any

import pytest
import torch
from torch import fx

from passes.ir.gemm_nodes import GemmNode
from passes.joint_products import SITE_KEY, UNNAMED, JointSite, NameProducts, find_joint_sites

aten: Any = torch.ops.aten
M, N, K = 5, 3, 4


class _Graph:
    """A joint graph of y_MN = x_MK w_NK^T, or of y = x w_KN, with a backward to be written."""

    def __init__(self, is_transposed: bool) -> None:
        self.graph = fx.Graph()
        self.x = self._input("x", (M, K))
        self.w = self._input("w", (N, K) if is_transposed else (K, N))
        self.dy = self._input("dy", (M, N))
        right = self.t(self.w) if is_transposed else self.w
        self.y = self.mm(self.x, right, autograd_backward=False)

    def _input(self, name: str, shape: tuple[int, ...]) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, device="meta")
        return node

    def t(self, a: fx.Node) -> fx.Node:
        node = self.graph.call_function(aten.permute.default, (a, [1, 0]))
        node.meta["val"] = a.meta["val"].t()
        return node

    def mm(self, a: fx.Node, b: fx.Node, autograd_backward: bool = True) -> fx.Node:
        node = self.graph.call_function(aten.mm.default, (a, b))
        node.meta.update(
            val=a.meta["val"] @ b.meta["val"],
            custom={SITE_KEY: "fc"},
            seq_nr=7,
            autograd_backward=autograd_backward,
        )
        return node

    def site(self) -> JointSite:
        (site,) = find_joint_sites(self.graph, NameProducts({}))
        return site


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("form", ["dy w", "(w^T dy^T)"])
def test_bwd_is_the_product_that_reads_the_weight(is_transposed: bool, form: str) -> None:
    g = _Graph(is_transposed)
    w_NK, w_KN = (g.w, g.t(g.w)) if is_transposed else (g.t(g.w), g.w)
    node = g.mm(g.dy, w_NK) if form == "dy w" else g.mm(w_KN, g.t(g.dy))
    site = g.site()
    assert isinstance(site.gemm, GemmNode)
    assert (site.name, site.gemm.kind) == ("fc", "linear" if is_transposed else "linear_kn")
    assert (site.gemm.lhs, site.gemm.rhs, site.grad, site.stray) == (g.x, g.w, None, [])
    assert site.bwd is not None
    assert (site.bwd.node, site.bwd.dy, site.bwd.is_dy_transposed) == (node, g.dy, False)
    assert site.bwd.is_transposed is (form != "dy w")


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("form", ["dy^T x", "x^T dy"])
def test_grad_is_the_product_that_reads_the_input(is_transposed: bool, form: str) -> None:
    """Its result is in the weight's layout, or transposed against it."""
    g = _Graph(is_transposed)
    node = g.mm(g.t(g.dy), g.x) if form == "dy^T x" else g.mm(g.t(g.x), g.dy)
    site = g.site()
    assert (site.bwd, site.stray) == (None, [])
    assert site.grad is not None
    assert (site.grad.node, site.grad.dy, site.grad.is_dy_transposed) == (node, g.dy, False)
    assert site.grad.is_transposed is (node.meta["val"].shape != g.w.meta["val"].shape)


def test_a_product_that_reads_neither_operand_is_stray() -> None:
    g = _Graph(is_transposed=True)
    node = g.mm(g.dy, g.t(g.dy))
    assert g.site().stray == [node]


def test_a_product_of_a_tensor_with_itself_cannot_be_told_apart() -> None:
    g = _Graph(is_transposed=True)
    g.y.args = (g.x, g.t(g.x))
    square = g._input("dy_MM", (M, M))
    node = g.mm(square, g.x)
    assert g.site().stray == [node]


def test_a_product_without_a_mark_is_named_by_its_module_only_where_the_model_is_one_graph() -> None:
    g = _Graph(is_transposed=False)
    g.y.meta["custom"] = {}
    g.y.meta["nn_module_stack"] = {"12": ("L['self'].attn", torch.nn.Module)}
    assert [site.name for site in find_joint_sites(g.graph, NameProducts({"12": "attn"}))] == [UNNAMED]
    g.y.meta["custom"] = {"lp_root": True}
    assert [site.name for site in find_joint_sites(g.graph, NameProducts({"12": "attn"}))] == ["attn.matmul_0"]
