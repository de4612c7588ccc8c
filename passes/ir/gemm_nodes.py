"""GEMM nodes: which calls of torch multiply matrices, and how to read them: nodes of a graph, and calls as they happen.
The table at the end is the whole knowledge.

    GemmNode     one product, as runtime.ops.layer.KINDS lays it out
    Composite    products among other operations (attention, einsum, grouped): a pass writes them as GEMM nodes
    Unreadable   a product that has no lp form, and why

A site is named `STEM_NUMBER` after the function, counted in program order, and `.PART` where it holds several:
matmul_1, einsum_0, sdpa_0.qk, sdpa_0.pv. What a policy's `op` matches is the op (here matmul) and not the stem.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from passes.ir.conv_geometry import per_dim, read_geometry
from passes.ir.program import WEIGHT
from runtime.ops.contractions import ConvGeometry, linear_kn
from runtime.ops.einsum import why_no_product


@dataclass(frozen=True)
class GemmNode:
    """A call read as y = alpha (lhs . rhs) + beta bias. `kind` is a row of runtime.ops.layer.KINDS, or conv with its
    geometry. Operands are nodes, or tensors where the call is happening.
    """

    op: str
    kind: str
    lhs: Any
    rhs: Any
    bias: Any = None
    geometry: ConvGeometry | None = None
    stem: str = ""
    """What the names of such sites begin with, where it is not the op."""
    alpha: float = 1
    beta: float = 1


@dataclass(frozen=True)
class Unreadable:
    """A node that multiplies matrices in a way that has no lp form yet; the reason goes into the certificate."""

    op: str
    reason: str
    stem: str = ""


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
    return gemm.stem or gemm.op


def site_names(gemm: Reading, name: str) -> list[str]:
    """The sites that a node called `name` holds."""
    return [name + part for part in gemm.parts] if isinstance(gemm, Composite) else [name]


def gemm_functions() -> Iterable[Any]:
    """Every function that may multiply matrices."""
    return _READERS


def read_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reading | None:
    """What a call multiplies; None for one that multiplies no matrices."""
    reader = _READERS.get(function)
    return None if reader is None else reader(args, kwargs)


def read_gemm(node: fx.Node) -> Reading | None:
    """What a node multiplies; None for a node that multiplies no matrices."""
    gemm = read_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None
    if isinstance(gemm, GemmNode) and (gemm.alpha, gemm.beta) != (1, 1):
        return Unreadable(gemm.op, "alpha and beta other than 1 have no lp form", gemm.stem)
    return gemm


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    return given(node.args, node.kwargs, position, name, default=default)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by one of its names."""
    if len(args) > position:
        return args[position]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return default


_Args = tuple[Any, ...]
_Kwargs = Mapping[str, Any]
_OPERAND = (fx.Node, Tensor)


def _num_dims(x: Any) -> int | None:
    """Of an operand, where it is known."""
    if isinstance(x, Tensor):
        return x.dim()
    meta = x.meta.get("tensor_meta")
    return None if meta is None else len(meta.shape)


def _why_no_matrices(*operands: Any) -> str:
    """What keeps operands from being matrices, as far as it is known."""
    if not all(isinstance(each, _OPERAND) for each in operands):
        return "an operand is not a tensor"
    dims = map(_num_dims, operands)
    return _VECTOR if any(each is not None and each < 2 for each in dims) else ""


def _read_linear(args: _Args, kwargs: _Kwargs, kind: str = "linear") -> GemmNode | Unreadable:
    lhs, rhs = given(args, kwargs, 0, "input", "x"), given(args, kwargs, 1, "weight", "weight_KN")
    if reason := _why_no_matrices(rhs):
        return Unreadable("linear", reason)
    return GemmNode("linear", kind, lhs, rhs, given(args, kwargs, 2, "bias"))


def _read_matmul(args: _Args, kwargs: _Kwargs, is_swapped: bool = False) -> GemmNode | Unreadable:
    """`is_swapped`: w.__rmatmul__(x) is x @ w."""
    lhs, rhs = given(args, kwargs, 0, "input", "self"), given(args, kwargs, 1, "other", "mat2", "tensor2")
    reason = "a product that is written into out= has no lp form" if kwargs.get("out") is not None else ""
    if reason := reason or _why_no_matrices(lhs, rhs):
        return Unreadable("matmul", reason)
    return GemmNode("matmul", "matmul", rhs, lhs) if is_swapped else GemmNode("matmul", "matmul", lhs, rhs)


def _read_addmm(args: _Args, kwargs: _Kwargs, stem: str, names: tuple[str, str]) -> GemmNode | Unreadable:
    """beta input + alpha (mat1 . mat2)"""
    added = given(args, kwargs, 0, "input", "self")
    lhs, rhs = given(args, kwargs, 1, names[0]), given(args, kwargs, 2, names[1])
    reason = "out=, or factors by position, have no lp form" if kwargs.get("out") is not None or len(args) > 3 else ""
    if reason := reason or _why_no_matrices(lhs, rhs):
        return Unreadable("matmul", reason, stem)
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    return GemmNode("matmul", "matmul", lhs, rhs, added, stem=stem, alpha=alpha, beta=beta)


def _read_conv(args: _Args, kwargs: _Kwargs, num_dims: int) -> GemmNode | Unreadable:
    op = f"conv{num_dims}d"
    lhs, rhs, bias = (given(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    options = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    stride, padding, dilation, groups = (
        given(args, kwargs, i, name, default=value) for i, (name, value) in enumerate(options, 3)
    )
    kernel: Any = (1,) * num_dims
    if isinstance(rhs, Tensor):
        kernel = rhs.shape[2:]
    elif padding == "same" and rhs.op == "get_attr" and "tensor_meta" in rhs.meta:
        kernel = rhs.meta["tensor_meta"].shape[2:]
    elif padding == "same":  # the window of another call may be another
        return Unreadable(op, 'padding="same" of a window that is no parameter')
    before, geometry = read_geometry(kernel, stride, padding, dilation, groups)
    if before and not isinstance(lhs, Tensor):
        return Unreadable(op, 'padding="same" of this window pads one side more')
    return GemmNode(op, "conv", F.pad(lhs, before) if before else lhs, rhs, bias, geometry)


def _read_conv_transpose(args: _Args, kwargs: _Kwargs, num_dims: int) -> GemmNode | Unreadable:
    lhs, rhs, bias = (given(args, kwargs, i, name) for i, name in enumerate(("input", "weight", "bias")))
    options = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
    stride, padding, more, groups, dilation = (
        given(args, kwargs, i, name, default=value) for i, (name, value) in enumerate(options, 3)
    )
    stride, padding, dilation, more = (per_dim(value, num_dims) for value in (stride, padding, dilation, more))
    geometry = ConvGeometry(stride, padding, dilation, groups, more)
    return GemmNode(f"conv_transpose{num_dims}d", "conv", lhs, rhs, bias, geometry)


def _read_convolution(args: _Args, kwargs: _Kwargs) -> GemmNode | Unreadable:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    lhs, rhs, bias, stride, padding, dilation, is_transposed, more, groups = (
        given(args, kwargs, i, name) for i, name in enumerate(names)
    )
    if not all(isinstance(value, tuple | list) for value in (stride, padding, dilation, more)):
        return Unreadable("convolution", "its stride, padding or dilation is no list of numbers")
    num_dims = len(stride)
    stride, padding, dilation, more = (per_dim(value, num_dims) for value in (stride, padding, dilation, more))
    geometry = ConvGeometry(stride, padding, dilation, groups, more if is_transposed else ())
    return GemmNode(f"conv{'_transpose' if is_transposed else ''}{num_dims}d", "conv", lhs, rhs, bias, geometry)


def _read_einsum(args: _Args, kwargs: _Kwargs) -> Composite | Unreadable:
    equation, operands = given(args, kwargs, 0, "equation"), args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return Unreadable("einsum", "only an equation of two operands is one matrix product")
    reason = why_no_product(equation)
    return Unreadable("einsum", reason) if reason else Composite("matmul", "einsum", "decompose-products")


def _read_grouped(args: _Args, kwargs: _Kwargs) -> Composite | Unreadable:
    """x_SK in groups of rows that end at offs_G, times w_GKN."""
    x, weight, offs, bias, out_dtype = (
        given(args, kwargs, i, name) for i, name in enumerate(("mat_a", "mat_b", "offs", "bias", "out_dtype"))
    )
    are_tensors = isinstance(x, _OPERAND) and isinstance(weight, _OPERAND) and offs is not None
    reason = ""
    if not are_tensors or _num_dims(weight) != 3 or _num_dims(x) not in (None, 2):
        reason = "only rows in groups times one matrix per group, x_SK w_GKN, is read"
    elif isinstance(weight, fx.Node) and not _is_parameter(weight):
        reason = "the matrices are no parameter, and another call may have another number of them"
    elif bias is not None or out_dtype not in (None, getattr(x, "dtype", None)):
        reason = "a grouped product with a bias or an output dtype has no lp form"
    return Unreadable("linear", reason, "grouped_mm") if reason else _GROUPED


def _is_parameter(weight: fx.Node) -> bool:
    root = weight.args[0] if weight.op == "call_function" else weight
    return isinstance(root, fx.Node) and (root.op == "get_attr" or bool(root.meta.get(WEIGHT)))


def _always(reading: Composite | Unreadable) -> "_Reader":
    return lambda args, kwargs: reading


def _unreadable(stem: str, reason: str = "") -> "_Reader":
    told = f"{stem}: {reason}" if reason else f"{stem} has no lp form; write it as matmul or linear"
    return _always(Unreadable(stem, told))


_Reader = Callable[[_Args, _Kwargs], Reading]
_GROUPED = Composite("linear", "grouped_mm", "decompose-products")
_VECTOR = "a product with a vector is no GEMM"
_NO_SUM = "an outer product has no sum and is no GEMM"
_IN_PLACE = "a product that is added in place has no lp form"
_CELL = "the products of a cell as one function have no lp form; call its module, or write them as linear"
_read_addmm_2d = partial(_read_addmm, stem="addmm", names=("mat1", "mat2"))
_read_addmm_3d = partial(_read_addmm, stem="baddbmm", names=("batch1", "batch2"))

_CONVS: dict[str, _Reader] = {
    **{f"conv{dims}d": partial(_read_conv, num_dims=dims) for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": partial(_read_conv_transpose, num_dims=dims) for dims in (1, 2, 3)},
}
_READERS: dict[Any, _Reader] = {
    torch._C._nn.linear: _read_linear,  # F.linear, by the name that ZeRO-3 does not replace in the whole process
    linear_kn: partial(_read_linear, kind="linear_kn"),
    **{getattr(F, name): read for name, read in _CONVS.items()},
    torch.matmul: _read_matmul,
    torch.Tensor.matmul: _read_matmul,
    torch.Tensor.__matmul__: _read_matmul,
    torch.bmm: _read_matmul,
    torch.Tensor.bmm: _read_matmul,
    torch.mm: _read_matmul,
    torch.Tensor.mm: _read_matmul,
    F.scaled_dot_product_attention: _always(Composite("matmul", "sdpa", "decompose-attention", (".qk", ".pv"))),
    torch.einsum: _read_einsum,
    torch.addmm: _read_addmm_2d,
    torch.Tensor.addmm: _read_addmm_2d,
    torch.baddbmm: _read_addmm_3d,
    torch.Tensor.baddbmm: _read_addmm_3d,
    torch.nn.functional.grouped_mm: _read_grouped,
    torch._grouped_mm: _read_grouped,
    torch.linalg.matmul: _read_matmul,
    torch.Tensor.__rmatmul__: partial(_read_matmul, is_swapped=True),
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

_ATEN: dict[str, _Reader] = {
    "mm": _read_matmul,
    "bmm": _read_matmul,
    "matmul": _read_matmul,
    "linalg_matmul": _read_matmul,
    "linear": _read_linear,
    "addmm": _read_addmm_2d,
    "baddbmm": _read_addmm_3d,
    "convolution": _read_convolution,
    **_CONVS,
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
