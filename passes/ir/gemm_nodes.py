"""GEMM nodes: which nodes of a graph multiply matrices, and how to read them. The table at the end is the whole
knowledge.

    GemmNode     one product, as runtime.ops.layer.KINDS lays it out
    Composite    products among other operations (attention, einsum, grouped): a pass writes them as GEMM nodes
    Unreadable   a product that has no lp form, and why

A node's site is named `STEM_NUMBER` after the function, counted in program order, and `.PART` where it holds several:
matmul_1, einsum_0, sdpa_0.qk, sdpa_0.pv. What a policy's `op` matches is the op (here matmul) and not the stem.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from passes.ir.program import WEIGHT
from runtime.ops.contractions import ConvGeometry, linear_kn
from runtime.ops.einsum import why_no_product
from runtime.ops.plan import print_geometry


@dataclass(frozen=True)
class GemmNode:
    """A node read as y = lhs . rhs + bias. `kind` is a row of runtime.ops.layer.KINDS, or conv with its geometry."""

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


def unreadable_functions() -> dict[Any, Unreadable]:
    """The functions that multiply matrices in a way that has no lp form, whatever they are given."""
    return {function: read.reading for function, read in _READERS.items() if isinstance(read, _Always)}


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


def _read_matmul_swapped(node: fx.Node) -> GemmNode | Unreadable:
    """w.__rmatmul__(x) is x @ w."""
    gemm = _read_matmul(node)
    return replace(gemm, lhs=gemm.rhs, rhs=gemm.lhs) if isinstance(gemm, GemmNode) else gemm


def _read_convolution(node: fx.Node) -> GemmNode | Unreadable:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    lhs, rhs, bias, stride, padding, dilation, is_transposed, more, groups = (
        argument(node, i, name) for i, name in enumerate(names)
    )
    if not all(isinstance(value, tuple | list) for value in (stride, padding, dilation, more)):
        return Unreadable("convolution", "its stride, padding or dilation is no list of numbers")
    num_dims = len(stride)
    stride, padding, dilation, more = (_per_dim(value, num_dims) for value in (stride, padding, dilation, more))
    geometry = ConvGeometry(stride, padding, dilation, groups, more if is_transposed else ())
    op = f"conv{'_transpose' if is_transposed else ''}{num_dims}d"
    return GemmNode(op, "conv", lhs, rhs, bias, print_geometry(geometry))


def _read_einsum(node: fx.Node) -> Composite | Unreadable:
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    equation = argument(node, 0, "equation")
    if not isinstance(equation, str) or len(operands) != 2:
        return Unreadable("einsum", "only an equation of two operands is one matrix product")
    reason = why_no_product(equation)
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


@dataclass(frozen=True)
class _Always:
    """The reader of a function that is never read."""

    reading: Unreadable

    def __call__(self, node: fx.Node) -> Unreadable:
        return self.reading


def _unreadable(stem: str, reason: str = "") -> _Always:
    told = f"{stem}: {reason}" if reason else f"{stem} has no lp form; write it as matmul or linear"
    return _Always(Unreadable(stem, told))


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
_NO_SUM = "an outer product has no sum and is no GEMM"
_IN_PLACE = "a product that is added in place has no lp form"
_CELL = "the products of a cell as one function have no lp form; call its module, or write them as linear"
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
    torch.linalg.matmul: _read_matmul,
    torch.Tensor.__rmatmul__: _read_matmul_swapped,
    torch.convolution: _read_convolution,
    torch.Tensor.addmm_: _unreadable("addmm", _IN_PLACE),
    torch.Tensor.baddbmm_: _unreadable("baddbmm", _IN_PLACE),
    torch.Tensor.addbmm_: _unreadable("addbmm", _IN_PLACE),
    torch.Tensor.addmv_: _unreadable("addmv", _IN_PLACE),
    torch.Tensor.addr_: _unreadable("addr", _IN_PLACE),
    F.bilinear: _unreadable("bilinear"),
    F.multi_head_attention_forward: _unreadable("multi_head_attention_forward"),
    torch.tensordot: _unreadable("tensordot"),
    torch.inner: _unreadable("inner"),
    torch.Tensor.inner: _unreadable("inner"),
    torch.addbmm: _unreadable("addbmm"),
    torch.Tensor.addbmm: _unreadable("addbmm"),
    torch.chain_matmul: _unreadable("chain_matmul"),
    torch.linalg.multi_dot: _unreadable("multi_dot"),
    torch.matrix_power: _unreadable("matrix_power"),
    torch.Tensor.matrix_power: _unreadable("matrix_power"),
    torch.linalg.matrix_power: _unreadable("matrix_power"),
    torch.mv: _unreadable("mv", _VECTOR),
    torch.Tensor.mv: _unreadable("mv", _VECTOR),
    torch.addmv: _unreadable("addmv", _VECTOR),
    torch.Tensor.addmv: _unreadable("addmv", _VECTOR),
    torch.dot: _unreadable("dot", _VECTOR),
    torch.Tensor.dot: _unreadable("dot", _VECTOR),
    torch.vdot: _unreadable("dot", _VECTOR),
    torch.Tensor.vdot: _unreadable("dot", _VECTOR),
    torch.linalg.vecdot: _unreadable("vecdot", _VECTOR),
    torch.outer: _unreadable("outer", _NO_SUM),
    torch.Tensor.outer: _unreadable("outer", _NO_SUM),
    torch.ger: _unreadable("outer", _NO_SUM),
    torch.Tensor.ger: _unreadable("outer", _NO_SUM),
    torch.addr: _unreadable("addr", _NO_SUM),
    torch.Tensor.addr: _unreadable("addr", _NO_SUM),
    torch.sparse.mm: _unreadable("sparse_mm", "products of sparse matrices have no lp form"),
    torch.sparse.addmm: _unreadable("sparse_addmm", "products of sparse matrices have no lp form"),
    torch._int_mm: _unreadable("int_mm", "its operands are integers already"),
    torch._scaled_mm: _unreadable("scaled_mm", "its operands are FP8 already"),
    torch._addmm_activation: _unreadable("addmm_activation"),
    torch.conv_tbc: _unreadable("conv_tbc", "write it as conv1d"),
    torch.lstm: _unreadable("lstm"),
    torch.gru: _unreadable("gru"),
    torch.rnn_tanh: _unreadable("rnn_tanh"),
    torch.rnn_relu: _unreadable("rnn_relu"),
    torch.lstm_cell: _unreadable("lstm_cell", _CELL),
    torch.gru_cell: _unreadable("gru_cell", _CELL),
    torch.rnn_tanh_cell: _unreadable("rnn_tanh_cell", _CELL),
    torch.rnn_relu_cell: _unreadable("rnn_relu_cell", _CELL),
}

_ATEN: dict[str, Callable[[fx.Node], Reading]] = {
    "mm": _read_matmul,
    "bmm": _read_matmul,
    "matmul": _read_matmul,
    "linear": _read_linear,
    "addmm": _read_addmm("addmm", ("mat1", "mat2")),
    "baddbmm": _read_addmm("baddbmm", ("batch1", "batch2")),
    "convolution": _read_convolution,
    **{f"conv{dims}d": _read_conv(dims) for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _read_conv_transpose(dims) for dims in (1, 2, 3)},
    "mv": _unreadable("mv", _VECTOR),
    "dot": _unreadable("dot", _VECTOR),
    "outer": _unreadable("outer", _NO_SUM),
    "einsum": _unreadable("einsum", "torch.einsum is read, and not the operation below it"),
    "addmm_": _unreadable("addmm", _IN_PLACE),
    "baddbmm_": _unreadable("baddbmm", _IN_PLACE),
    "scaled_dot_product_attention": _unreadable("sdpa", "torch.nn.functional's is read, and not the one below it"),
}
"""torch.ops.aten.NAME, as such and by each overload of it that makes its result."""

for _name, _read in _ATEN.items():
    _packet = getattr(torch.ops.aten, _name)
    _overloads = [getattr(_packet, each) for each in _packet.overloads() if each in ("default", "input", "padding")]
    _READERS |= dict.fromkeys((_packet, *_overloads), _read)
