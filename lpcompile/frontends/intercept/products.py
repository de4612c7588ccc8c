"""Products: how each function of torch that multiplies matrices runs when a scope sees it called.

Every runner numbers the call, reads its operands, asks the scope for what runs it, and else calls torch. The functions
that have no lp form, and why, are those of passes/ir/gemm_nodes.py.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.frontends.conv_geometry import per_dim, read_geometry
from lpcompile.frontends.intercept.scope import RUNNERS, Frame
from lpcompile.frontends.leaves.multihead_attention import multihead_attention
from passes.ir.gemm_nodes import unreadable_functions
from runtime.ops import attention, einsum
from runtime.ops.contractions import ConvGeometry
from runtime.ops.grouped import join_groups, split_groups

Kwargs = Mapping[str, Any]


def _argument(args: tuple[Any, ...], kwargs: Kwargs, position: int, *names: str, default: Any = None) -> Any:
    if len(args) > position:
        return args[position]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return default


def _why_no_matrices(lhs: object, rhs: object) -> str:
    if not isinstance(lhs, Tensor) or not isinstance(rhs, Tensor):
        return "an operand is not a tensor"
    return "a product with a vector is no GEMM" if lhs.dim() < 2 or rhs.dim() < 2 else ""


def _is_weight(x: Tensor) -> bool:
    """A parameter or a view of one, whose cast may be kept between uses."""
    return isinstance(x, nn.Parameter) or (not torch.compiler.is_compiling() and isinstance(x._base, nn.Parameter))


def _run_matmul(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs, is_swapped: bool = False) -> Any:
    name = frame.name("matmul")
    lhs = _argument(args, kwargs, 0, "input", "self")
    rhs = _argument(args, kwargs, 1, "other", "mat2", "tensor2")
    if is_swapped:
        lhs, rhs = rhs, lhs
    reason = "a product that is written into out= has no lp form" if kwargs.get("out") is not None else ""
    if reason := reason or _why_no_matrices(lhs, rhs):
        frame.scope.leave(name, "matmul", reason)
        return func(*args, **kwargs)
    product = frame.scope.product(name, "matmul", "matmul", lhs, rhs)
    return func(*args, **kwargs) if product is None else product(lhs, rhs, is_weight=_is_weight(rhs))


def _run_linear(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    name = frame.name("linear")
    lhs, rhs = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    bias = _argument(args, kwargs, 2, "bias")
    if not isinstance(rhs, Tensor) or rhs.dim() < 2:
        frame.scope.leave(name, "linear", "a product with a vector is no GEMM")
        return func(*args, **kwargs)
    product = frame.scope.product(name, "linear", "linear", lhs, rhs, (rhs.shape[0], rhs.shape[1]))
    return func(*args, **kwargs) if product is None else product(lhs, rhs, bias, is_weight=_is_weight(rhs))


def _run_addmm(
    frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs, stem: str = "", names: tuple[str, str] = ("", "")
) -> Any:
    """beta input + alpha (mat1 . mat2)"""
    name = frame.name(stem)
    added = _argument(args, kwargs, 0, "input", "self")
    lhs, rhs = _argument(args, kwargs, 1, names[0]), _argument(args, kwargs, 2, names[1])
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    reason = "out=, or factors by position, have no lp form" if kwargs.get("out") is not None or len(args) > 3 else ""
    if reason := reason or _why_no_matrices(lhs, rhs):
        frame.scope.leave(name, "matmul", reason)
        return func(*args, **kwargs)
    product = frame.scope.product(name, "matmul", "matmul", lhs, rhs)
    if product is None:
        return func(*args, **kwargs)
    if alpha == 1 and beta == 1:
        return product(lhs, rhs, added, is_weight=_is_weight(rhs))
    y = product(lhs, rhs, is_weight=_is_weight(rhs))
    y = y if alpha == 1 else y * alpha
    return y if beta == 0 else y + (added if beta == 1 else added * beta)


def _run_conv(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs, num_dims: int = 0) -> Any:
    op = f"conv{num_dims}d"
    name = frame.name(op)
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    bias = _argument(args, kwargs, 2, "bias")
    stride, padding = (
        _argument(args, kwargs, 3, "stride", default=1),
        _argument(args, kwargs, 4, "padding", default=0),
    )
    dilation, groups = (
        _argument(args, kwargs, 5, "dilation", default=1),
        _argument(args, kwargs, 6, "groups", default=1),
    )
    padded, geometry = read_geometry(x, weight.shape[2:], stride, padding, dilation, groups)
    sizes = (weight.shape[0], math.prod(weight.shape[1:]))
    product = frame.scope.product(name, op, "conv", padded, weight, sizes, geometry)
    if product is None:
        return func(*args, **kwargs)
    return product(padded, weight, bias, geometry=geometry, is_weight=_is_weight(weight))


def _run_conv_transpose(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs, num_dims: int = 0) -> Any:
    op = f"conv_transpose{num_dims}d"
    name = frame.name(op)
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    bias = _argument(args, kwargs, 2, "bias")
    stride, padding, more, groups, dilation = (
        _argument(args, kwargs, position, key, default=default)
        for position, (key, default) in enumerate(_TRANSPOSED_DEFAULTS, 3)
    )
    stride, padding, dilation, more = (per_dim(value, num_dims) for value in (stride, padding, dilation, more))
    return _convolve(frame, name, op, func, args, kwargs, x, weight, bias, stride, padding, dilation, more, groups)


def _run_convolution(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    x, weight, bias, stride, padding, dilation, is_transposed, more, groups = (
        _argument(args, kwargs, position, key) for position, key in enumerate(_CONVOLUTION)
    )
    num_dims = len(stride)
    stride, padding, dilation, more = (per_dim(value, num_dims) for value in (stride, padding, dilation, more))
    op = f"conv{'_transpose' if is_transposed else ''}{num_dims}d"
    name = frame.name(op)
    more = more if is_transposed else ()
    return _convolve(frame, name, op, func, args, kwargs, x, weight, bias, stride, padding, dilation, more, groups)


def _convolve(
    frame: Frame, name: str, op: str, func: Any, args: tuple[Any, ...], kwargs: Kwargs, x: Tensor, weight: Tensor,
    bias: Tensor | None, stride: Any, padding: Any, dilation: Any, more: Any, groups: int,
) -> Any:  # fmt: skip
    geometry = ConvGeometry(stride, padding, dilation, groups, more)
    first, second, *window = weight.shape
    taps = math.prod(window)
    sizes = (second * groups, first // groups * taps) if more else (first, second * taps)
    product = frame.scope.product(name, op, "conv", x, weight, sizes, geometry)
    if product is None:
        return func(*args, **kwargs)
    return product(x, weight, bias, geometry=geometry, is_weight=_is_weight(weight))


def _run_einsum(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    name = frame.name("einsum")
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) < 2:
        reason = "only an equation of two operands or more is read"
    elif len(operands) > 2:
        if not (reason := einsum.why_no_pairs(equation)):
            return _run_pairs(frame, name, func, equation, operands)
    else:
        reason = einsum.why_no_product(equation)
    if reason:
        frame.scope.leave(name, "einsum", reason)
        return func(*args, **kwargs)
    product = _product_of(frame, name, equation, *operands)
    return func(*args, **kwargs) if product is None else _multiply_pair(product, equation, *operands)


def _run_pairs(frame: Frame, name: str, func: Any, equation: str, operands: tuple[Any, ...]) -> Any:
    """Three operands and more: two at a time as torch.einsum takes them, each a product by number. Where the policy
    names none of them the call is torch's own.
    """
    pairs = einsum.pairs(equation, [x.shape for x in operands])
    products: list[Any] = []
    shapes = [*operands] if torch.compiler.is_compiling() else [*map(_without_data, operands)]
    for number, (i, j, pair) in enumerate(pairs):
        left, right = shapes[i], shapes.pop(j)
        shapes[i] = torch.einsum(pair, left, right)
        if reason := einsum.why_no_product(pair):
            frame.scope.leave(f"{name}.{number}", "einsum", reason)
            products.append(None)
        else:
            products.append(_product_of(frame, f"{name}.{number}", pair, left, right))
    if not any(products):
        return func(equation, *operands)
    waiting = [*operands]
    for (i, j, pair), product in zip(pairs, products):
        left, right = waiting[i], waiting.pop(j)
        waiting[i] = func(pair, left, right) if product is None else _multiply_pair(product, pair, left, right)
    return waiting[0]


def _without_data(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _product_of(frame: Frame, name: str, equation: str, left: Tensor, right: Tensor) -> Any:
    """What runs an equation of two operands, as one product of matrices; None where torch does."""
    lhs, rhs = einsum.left_matrices(left, equation), einsum.right_matrices(right, equation)
    return frame.scope.product(name, "matmul", "matmul", lhs, rhs)


def _multiply_pair(product: Any, equation: str, left: Tensor, right: Tensor) -> Tensor:
    left, right = einsum.with_gradients_as_torch(left, right, equation)
    lhs, rhs = einsum.left_matrices(left, equation), einsum.right_matrices(right, equation)
    return einsum.from_matrices(product(lhs, rhs), left, right, equation)


def _run_attention(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """Attention of which a product is named: taken apart as torch's math backend does it."""
    name = frame.name("sdpa")
    q, k, v = (_argument(args, kwargs, position, key) for position, key in enumerate(("query", "key", "value")))
    mask, dropout_p = _argument(args, kwargs, 3, "attn_mask"), _argument(args, kwargs, 4, "dropout_p", default=0.0)
    is_causal = _argument(args, kwargs, 5, "is_causal", default=False)
    scale, enable_gqa = kwargs.get("scale"), kwargs.get("enable_gqa", False)
    qk = frame.scope.product(f"{name}.qk", "matmul", "matmul", q, k.transpose(-2, -1))
    pv = frame.scope.product(f"{name}.pv", "matmul", "matmul", q, v, lhs_shape=(*q.shape[:-1], k.shape[-2]))
    if qk is None and pv is None:
        return func(*args, **kwargs)
    lhs, rhs = attention.scaled_query(q, scale), attention.scaled_key(k, q, scale, enable_gqa)
    scores = torch.matmul(lhs, rhs) if qk is None else qk(lhs, rhs)
    weights = attention.attention_weights(scores, mask, is_causal, dropout_p)
    values = attention.heads_like(v, q, enable_gqa)
    return attention.like_query(torch.matmul(weights, values) if pv is None else pv(weights, values), q)


def _run_multihead(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """torch's multi-head attention as a function: its four products, as those of its module."""
    name = frame.name("multi_head_attention_forward")
    given = dict(zip(_MULTIHEAD, args)) | dict(kwargs)
    if given.get("static_k") is not None or given.get("static_v") is not None:
        frame.scope.leave(name, "linear", "keys and values that are projected already have no lp form")
        return func(*args, **kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    is_apart, width = given.get("use_separate_proj_weight", False), q.shape[-1]
    first, last = given["q_proj_weight"] if is_apart else given["in_proj_weight"], given["out_proj_weight"]
    scores, heads = (*q.shape[:-1], k.shape[0]), q.shape[-1] // given["num_heads"]
    products = {
        "in_proj": frame.scope.product(f"{name}.in_proj", "linear", "linear", q, first, (3 * width, width)),
        "qk": frame.scope.product(f"{name}.qk", "matmul", "matmul", q[..., :heads], k[..., :heads].mT),
        "pv": frame.scope.product(f"{name}.pv", "matmul", "matmul", q, v, lhs_shape=scores),
        "out_proj": frame.scope.product(f"{name}.out_proj", "linear", "linear", q, last, tuple(last.shape)),
    }
    if all(product is None for product in products.values()):
        return func(*args, **kwargs)
    module = SimpleNamespace(
        embed_dim=given["embed_dim_to_check"], num_heads=given["num_heads"], head_dim=heads, batch_first=False,
        in_proj_weight=None if is_apart else first, in_proj_bias=given["in_proj_bias"],
        **{f"{each}_proj_weight": given.get(f"{each}_proj_weight") for each in "qkv"},
        bias_k=given["bias_k"], bias_v=given["bias_v"], add_zero_attn=given["add_zero_attn"],
        dropout=given["dropout_p"], training=given.get("training", True),
        out_proj=SimpleNamespace(weight=last, bias=given["out_proj_bias"]),
    )  # fmt: skip
    options = {each: given[each] for each in _MULTIHEAD_OPTIONS if each in given}
    parts = {part: _part_of_multihead(part, product) for part, product in products.items()}
    return multihead_attention(module, parts, q, k, v, **options)  # type: ignore[arg-type]


def _part_of_multihead(part: str, product: Any) -> Callable[..., Tensor]:
    if part in ("qk", "pv"):
        return torch.matmul if product is None else product

    def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if product is None:
            return torch._C._nn.linear(x, weight, bias)
        y: Tensor = product(x, weight, bias, is_weight=_is_weight(weight))
        return y

    return project


def _run_grouped(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    """Rows of x in groups, one matrix per group: a product per group, under one name."""
    name = frame.name("grouped_mm")
    x, weight, offs, bias, out_dtype = (
        _argument(args, kwargs, position, key)
        for position, key in enumerate(("mat_a", "mat_b", "offs", "bias", "out_dtype"))
    )
    if x.dim() != 2 or weight.dim() != 3 or offs is None:
        reason = "only rows in groups times one matrix per group, x_SK w_GKN, is read"
    else:
        reason = "a grouped product with a bias or an output dtype has no lp form" if bias is not None else ""
        reason = reason or ("" if out_dtype in (None, x.dtype) else "an output dtype has no lp form")
    if reason:
        frame.scope.leave(name, "linear", reason)
        return func(*args, **kwargs)
    is_nk = weight.stride(-2) == 1  # stored as (G, N, K), the weight of a linear layer per group
    kind, matrices = ("linear", weight.transpose(-2, -1)) if is_nk else ("linear_kn", weight)
    product = frame.scope.product(name, "linear", kind, x, matrices[0], (weight.shape[2], weight.shape[1]))
    if product is None:
        return func(*args, **kwargs)
    is_weight = _is_weight(weight)
    *rows, rest = split_groups(x, offs)
    products = [
        product(lhs, rhs, is_weight=is_weight, group=group)
        for group, (lhs, rhs) in enumerate(zip(rows, matrices.unbind(0)))
    ]
    return join_groups(products, rest)


def _run_unreadable(
    frame: Frame, func: Any, args: tuple[Any, ...], kwargs: Kwargs, stem: str = "", reason: str = ""
) -> Any:
    frame.scope.leave(frame.name(stem), stem, reason)
    return func(*args, **kwargs)


_MULTIHEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_MULTIHEAD_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_TRANSPOSED_DEFAULTS = (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1), ("dilation", 1))
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")

_ATEN = torch.ops.aten
_MATMULS = (
    *(op for each in (_ATEN.mm, _ATEN.bmm, _ATEN.matmul) for op in (each, each.default)),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.linalg.matmul),
    *(torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm),
)

RUNNERS.update(
    {
        **dict.fromkeys(_MATMULS, _run_matmul),
        torch.Tensor.__rmatmul__: partial(_run_matmul, is_swapped=True),
        **dict.fromkeys((_ATEN.linear, _ATEN.linear.default), _run_linear),
        torch._C._nn.linear: _run_linear,  # F.linear, by the name that ZeRO-3 does not replace in the whole process
        **dict.fromkeys(
            (torch.addmm, torch.Tensor.addmm, _ATEN.addmm, _ATEN.addmm.default),
            partial(_run_addmm, stem="addmm", names=("mat1", "mat2")),
        ),
        **dict.fromkeys(
            (torch.baddbmm, torch.Tensor.baddbmm, _ATEN.baddbmm, _ATEN.baddbmm.default),
            partial(_run_addmm, stem="baddbmm", names=("batch1", "batch2")),
        ),
        F.conv1d: partial(_run_conv, num_dims=1),
        F.conv2d: partial(_run_conv, num_dims=2),
        F.conv3d: partial(_run_conv, num_dims=3),
        F.conv_transpose1d: partial(_run_conv_transpose, num_dims=1),
        F.conv_transpose2d: partial(_run_conv_transpose, num_dims=2),
        F.conv_transpose3d: partial(_run_conv_transpose, num_dims=3),
        **dict.fromkeys((torch.convolution, _ATEN.convolution, _ATEN.convolution.default), _run_convolution),
        torch.einsum: _run_einsum,
        F.scaled_dot_product_attention: _run_attention,
        F.multi_head_attention_forward: _run_multihead,
        F.grouped_mm: _run_grouped,
        torch._grouped_mm: _run_grouped,
    }
)

for _function, _row in unreadable_functions().items():
    RUNNERS.setdefault(_function, partial(_run_unreadable, stem=_row.op, reason=_row.reason))
