"""Which nodes are GEMMs: every spelling of a product is read alike, and what has no lp form says why."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lpcompile.capture.leaves import is_leaf
from lpcompile.capture.recorder import record
from passes.ir.gemm_nodes import GemmNode, Unreadable, read_gemm


class _Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight) + x @ self.weight + x.mm(self.weight) + F.linear(x, self.weight)
        z = torch.bmm(y[None], y[None])
        y = torch.addmm(y, x, self.weight) + torch.einsum("ij,jk->ik", x, self.weight)
        z = F.conv1d(torch.baddbmm(z, z, z), self.weight[:, :, None], padding=1)[..., :4]
        return F.scaled_dot_product_attention(z, z, z) + y + y @ y[0]


def _gemms() -> list[GemmNode | Unreadable]:
    graph: fx.Graph = record(_Spellings(), (torch.randn(4, 4),), {}, is_leaf=is_leaf).recordings[""][0].graph
    return [gemm for node in graph.nodes if (gemm := read_gemm(node)) is not None]


def test_every_product_is_seen() -> None:
    assert [gemm.op for gemm in _gemms()] == [
        "matmul", "matmul", "matmul", "linear", "matmul", "addmm", "einsum", "baddbmm", "conv1d", "sdpa", "matmul",
    ]  # fmt: skip


def test_what_has_no_lp_form_says_why() -> None:
    reasons = [gemm.reason for gemm in _gemms() if isinstance(gemm, Unreadable)]
    assert reasons[:3] == ["this op has no lp form yet"] * 3
    assert 'attn_implementation="eager"' in reasons[3]
    assert reasons[4] == "a product with a vector is no GEMM"


def test_geometry_of_a_convolution() -> None:
    (conv,) = (gemm for gemm in _gemms() if isinstance(gemm, GemmNode) and gemm.kind == "conv")
    assert conv.geometry == "stride=1 padding=1 dilation=1 groups=1"


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_refused(padding: str) -> None:
    graph = fx.Graph()
    node = graph.call_function(F.conv1d, (graph.placeholder("x"), graph.placeholder("w")), {"padding": padding})
    gemm = read_gemm(node)
    assert isinstance(gemm, Unreadable)
    assert padding in gemm.reason
