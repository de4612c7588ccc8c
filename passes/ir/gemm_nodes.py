"""GEMM nodes: which nodes of a graph multiply matrices, and how to read them. The table at the end is the whole
knowledge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from runtime.contractions import ConvGeometry, linear_kn
from runtime.gemms import print_geometry


@dataclass(frozen=True)
class GemmNode:
    """A node read as y = lhs . rhs + bias. `kind` is a row of runtime.gemms.KINDS, or conv with its geometry."""

    op: str
    kind: str
    lhs: fx.Node
    rhs: fx.Node
    bias: fx.Node | None = None
    geometry: str = ""


@dataclass(frozen=True)
class Unreadable:
    """A node that multiplies matrices in a way that has no lp form yet; the reason goes into the certificate."""

    op: str
    reason: str


def read_gemm(node: fx.Node) -> GemmNode | Unreadable | None:
    """The GEMM that a node is; None for every other node."""
    if node.op != "call_function" or node.target not in _READERS:
        return None
    return _READERS[node.target](node)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _read_linear(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs, bias = (_argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    return GemmNode("linear", "linear", lhs, rhs, bias)


def _read_linear_kn(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs, bias = (_argument(node, i, name) for i, name in enumerate(("x", "weight_KN", "bias")))
    return GemmNode("linear", "linear_kn", lhs, rhs, bias)


def _read_matmul(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs = node.args[0], _argument(node, 1, "other")
    if not isinstance(lhs, fx.Node) or not isinstance(rhs, fx.Node) or node.kwargs.get("out") is not None:
        return Unreadable("matmul", "an operand is not a tensor of the graph")
    shapes = [operand.meta["tensor_meta"].shape for operand in (lhs, rhs) if "tensor_meta" in operand.meta]
    if any(len(shape) < 2 for shape in shapes):
        return Unreadable("matmul", "a product with a vector is no GEMM")
    return GemmNode("matmul", "matmul", lhs, rhs)


def _read_conv(num_dims: int) -> Callable[[fx.Node], GemmNode | Unreadable]:
    op = f"conv{num_dims}d"

    def read(node: fx.Node) -> GemmNode | Unreadable:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        lhs, rhs, bias = (_argument(node, i, name) for i, name in enumerate(names[:3]))
        stride, padding, dilation = (
            _argument(node, i + 3, name, default) for i, (name, default) in enumerate(_CONV_DEFAULTS)
        )
        if isinstance(padding, str):
            return Unreadable(op, f'padding="{padding}" is not written as numbers')
        per_dim = [tuple(v) if isinstance(v, tuple | list) else (v,) * num_dims for v in (stride, padding, dilation)]
        geometry = ConvGeometry(per_dim[0], per_dim[1], per_dim[2], _argument(node, 6, "groups", 1))
        return GemmNode(op, "conv", lhs, rhs, bias, print_geometry(geometry))

    return read


def _unreadable(op: str, reason: str) -> Callable[[fx.Node], GemmNode | Unreadable]:
    return lambda node: Unreadable(op, reason)


_CONV_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))
_FUSED_ATTENTION = (
    'fused attention is not taken apart yet; build the model with attn_implementation="eager" to reach its products'
)
_NO_LP_FORM = "this op has no lp form yet"

_READERS: dict[Any, Callable[[fx.Node], GemmNode | Unreadable]] = {
    torch._C._nn.linear: _read_linear,  # F.linear, by the name that ZeRO-3 does not replace in the whole process
    linear_kn: _read_linear_kn,
    F.conv1d: _read_conv(1),
    F.conv2d: _read_conv(2),
    F.conv3d: _read_conv(3),
    torch.matmul: _read_matmul,
    torch.Tensor.matmul: _read_matmul,
    torch.Tensor.__matmul__: _read_matmul,
    torch.bmm: _read_matmul,
    torch.Tensor.bmm: _read_matmul,
    torch.mm: _read_matmul,
    torch.Tensor.mm: _read_matmul,
    F.scaled_dot_product_attention: _unreadable("sdpa", _FUSED_ATTENTION),
    torch.einsum: _unreadable("einsum", _NO_LP_FORM),
    torch.addmm: _unreadable("addmm", _NO_LP_FORM),
    torch.Tensor.addmm: _unreadable("addmm", _NO_LP_FORM),
    torch.baddbmm: _unreadable("baddbmm", _NO_LP_FORM),
    torch.Tensor.baddbmm: _unreadable("baddbmm", _NO_LP_FORM),
    F.conv_transpose1d: _unreadable("conv_transpose1d", _NO_LP_FORM),
    F.conv_transpose2d: _unreadable("conv_transpose2d", _NO_LP_FORM),
    F.conv_transpose3d: _unreadable("conv_transpose3d", _NO_LP_FORM),
}
