"""GEMM nodes: which nodes of a graph multiply matrices, and how to read them. The table at the end is the whole
knowledge.

    GemmNode     one product, as runtime.gemms.KINDS lays it out
    Composite    products among other operations (attention, einsum, grouped): a pass writes them as GEMM nodes
    Unreadable   a product that has no lp form, and why

A node's site is named `STEM_NUMBER` after the function, counted in program order, and `.PART` where it holds several:
matmul_1, einsum_0, sdpa_0.qk, sdpa_0.pv. What a policy's `op` matches is the op (here matmul) and not the stem.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes.ir.program import WEIGHT
from runtime.contractions import ConvGeometry, linear_kn
from runtime.einsum import why_no_product
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
    stem: str = ""
    """What the names of such sites begin with, where it is not the op."""


@dataclass(frozen=True)
class Unreadable:
    """A node that multiplies matrices in a way that has no lp form yet; the reason goes into the certificate."""

    op: str
    reason: str


@dataclass(frozen=True)
class Composite:
    """A node that holds products among other operations, by the suffix of each site's name. `op` is the policy's, for
    all of them; the pass `taken_apart_by` writes the node as GEMM nodes.
    """

    op: str
    stem: str
    taken_apart_by: str
    parts: tuple[str, ...] = ("",)


Reading = GemmNode | Composite | Unreadable


def stem_of(gemm: Reading) -> str:
    """What the names of a node's sites begin with."""
    return gemm.op if isinstance(gemm, Unreadable) else gemm.stem or gemm.op


def site_names(gemm: Reading, name: str) -> list[str]:
    """The sites that a node called `name` holds."""
    return [name + part for part in gemm.parts] if isinstance(gemm, Composite) else [name]


def is_gemm(function: Any) -> bool:
    """Whether a function may multiply matrices."""
    return function in _READERS


def read_gemm(node: fx.Node) -> Reading | None:
    """What a node multiplies; None for a node that multiplies no matrices."""
    if node.op != "call_function" or not is_gemm(node.target):
        return None
    return _READERS[node.target](node)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _read_linear(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    if _has_vector(rhs):
        return Unreadable("linear", _VECTOR)
    return GemmNode("linear", "linear", lhs, rhs, bias)


def _has_vector(*operands: object) -> bool:
    """Whether one of them is known to have fewer than two dims."""
    metas = [operand.meta.get("tensor_meta") for operand in operands if isinstance(operand, fx.Node)]
    return any(meta is not None and len(meta.shape) < 2 for meta in metas)


def _read_linear_kn(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs, bias = (argument(node, i, name) for i, name in enumerate(("x", "weight_KN", "bias")))
    return GemmNode("linear", "linear_kn", lhs, rhs, bias)


def _read_matmul(node: fx.Node) -> GemmNode | Unreadable:
    lhs, rhs = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
    if not isinstance(lhs, fx.Node) or not isinstance(rhs, fx.Node):
        return Unreadable("matmul", "an operand is not a tensor of the graph")
    if node.kwargs.get("out") is not None:
        return Unreadable("matmul", "a product that is written into out= has no lp form")
    if _has_vector(lhs, rhs):
        return Unreadable("matmul", _VECTOR)
    return GemmNode("matmul", "matmul", lhs, rhs)


def _read_conv(num_dims: int) -> Callable[[fx.Node], GemmNode | Unreadable]:
    op = f"conv{num_dims}d"

    def read(node: fx.Node) -> GemmNode | Unreadable:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        lhs, rhs, bias = (argument(node, i, name) for i, name in enumerate(names[:3]))
        stride, padding, dilation = (
            argument(node, i + 3, name, default) for i, (name, default) in enumerate(_CONV_DEFAULTS)
        )
        stride, dilation = _per_dim(stride, num_dims), _per_dim(dilation, num_dims)
        if isinstance(padding, str):
            padding = _same_padding(node, padding, dilation)
            if padding is None:
                return Unreadable(op, 'padding="same" of this window pads one side more, or the window is no parameter')
        geometry = ConvGeometry(stride, _per_dim(padding, num_dims), dilation, argument(node, 6, "groups", 1))
        return GemmNode(op, "conv", lhs, rhs, bias, print_geometry(geometry))

    return read


def _read_einsum(node: fx.Node) -> Composite | Unreadable:
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(argument(node, 0, "equation"), str) or len(operands) != 2:
        return Unreadable("einsum", "only an equation of two operands is one matrix product")
    reason = why_no_product(node.args[0])
    return Unreadable("einsum", reason) if reason else Composite("matmul", "einsum", "decompose-products")


def _read_addmm(stem: str, names: tuple[str, str]) -> Callable[[fx.Node], GemmNode | Unreadable]:
    def read(node: fx.Node) -> GemmNode | Unreadable:
        factors = (node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1))
        if len(node.args) > 3 or factors != (1, 1) or node.kwargs.get("out") is not None:
            return Unreadable(stem, "alpha and beta other than 1, or out=, have no lp form")
        added, lhs, rhs = (argument(node, i, name) for i, name in enumerate(("input", *names)))
        if not (isinstance(added, fx.Node) and isinstance(lhs, fx.Node) and isinstance(rhs, fx.Node)):
            return Unreadable(stem, "an operand is not a tensor of the graph")
        return GemmNode("matmul", "matmul", lhs, rhs, added, stem=stem)

    return read


def _read_grouped(node: fx.Node) -> Composite | Unreadable:
    """x_SK in groups of rows that end at offs_G, times w_GKN."""
    weight = argument(node, 1, "mat_b")
    meta = weight.meta.get("tensor_meta") if isinstance(weight, fx.Node) else None
    if meta is None or len(meta.shape) != 3 or argument(node, 2, "offs") is None:
        return Unreadable("grouped_mm", "only rows in groups times one matrix per group, x_SK w_GKN, is read")
    if not isinstance(argument(node, 0, "mat_a"), fx.Node):
        return Unreadable("grouped_mm", "an operand is not a tensor of the graph")
    root = weight.args[0] if weight.op == "call_function" else weight
    if not isinstance(root, fx.Node) or not (root.op == "get_attr" or root.meta.get(WEIGHT)):
        return Unreadable(
            "grouped_mm", "the matrices are no parameter, and another call may have another number of them"
        )
    if argument(node, 3, "bias") is not None or argument(node, 4, "out_dtype") is not None:
        return Unreadable("grouped_mm", "a grouped product with a bias or an output dtype has no lp form")
    return Composite("linear", "grouped_mm", "decompose-products")


def _read_attention(node: fx.Node) -> Composite:
    return Composite("matmul", "sdpa", "decompose-attention", (".qk", ".pv"))


def _read_conv_transpose(num_dims: int) -> Callable[[fx.Node], GemmNode | Unreadable]:
    op = f"conv_transpose{num_dims}d"

    def read(node: fx.Node) -> GemmNode | Unreadable:
        lhs, rhs, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        names = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
        stride, padding, more, groups, dilation = (
            argument(node, i + 3, name, default) for i, (name, default) in enumerate(names)
        )
        stride, padding, dilation, more = (_per_dim(value, num_dims) for value in (stride, padding, dilation, more))
        geometry = ConvGeometry(stride, padding, dilation, groups, more)
        return GemmNode(op, "conv", lhs, rhs, bias, print_geometry(geometry))

    return read


def _unreadable(stem: str) -> Callable[[fx.Node], Unreadable]:
    return lambda node: Unreadable(stem, f"{stem} has no lp form; write it as matmul or linear")


def _per_dim(value: Any, num_dims: int) -> tuple[int, ...]:
    """One number for every spatial dim; torch takes one number or a sequence of one for all."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * num_dims if len(values) == 1 else values


def _same_padding(node: fx.Node, padding: str, dilation: Sequence[int]) -> tuple[int, ...] | None:
    """Padding by name as numbers; None where one side gets more than the other, or the window is not known."""
    if padding == "valid":
        return (0,) * len(dilation)
    weight = argument(node, 1, "weight")
    meta = weight.meta.get("tensor_meta") if isinstance(weight, fx.Node) else None
    if meta is None or weight.op != "get_attr":  # the window of another call may be another
        return None
    both = [d * (extent - 1) for d, extent in zip(dilation, meta.shape[2:])]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


_VECTOR = "a product with a vector is no GEMM"
_CONV_DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))

_READERS: dict[Any, Callable[[fx.Node], Reading]] = {
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
    F.scaled_dot_product_attention: _read_attention,
    torch.einsum: _read_einsum,
    torch.addmm: _read_addmm("addmm", ("mat1", "mat2")),
    torch.Tensor.addmm: _read_addmm("addmm", ("mat1", "mat2")),
    torch.baddbmm: _read_addmm("baddbmm", ("batch1", "batch2")),
    torch.Tensor.baddbmm: _read_addmm("baddbmm", ("batch1", "batch2")),
    torch.nn.functional.grouped_mm: _read_grouped,
    torch._grouped_mm: _read_grouped,
    F.conv_transpose1d: _read_conv_transpose(1),
    F.conv_transpose2d: _read_conv_transpose(2),
    F.conv_transpose3d: _read_conv_transpose(3),
    F.bilinear: _unreadable("bilinear"),
    F.multi_head_attention_forward: _unreadable("multi_head_attention_forward"),
    torch.tensordot: _unreadable("tensordot"),
    torch.inner: _unreadable("inner"),
    torch.addbmm: _unreadable("addbmm"),
    torch.Tensor.addbmm: _unreadable("addbmm"),
    torch.chain_matmul: _unreadable("chain_matmul"),
    torch.linalg.multi_dot: _unreadable("multi_dot"),
    torch.lstm: _unreadable("lstm"),
    torch.gru: _unreadable("gru"),
    torch.rnn_tanh: _unreadable("rnn_tanh"),
    torch.rnn_relu: _unreadable("rnn_relu"),
}
