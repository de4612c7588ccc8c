"""Products: how each function of torch that multiplies matrices runs when a scope sees it called.

A call is read as passes/ir/gemm_nodes.py reads one, numbered, and run by what the scope has for it, else by torch. What
holds several products (attention, einsum, grouped products) has a runner of its own here.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpcompile.frontends.intercept.scope import RUNNERS, Frame
from lpcompile.frontends.leaves.multihead_attention import multihead_attention
from passes.ir.gemm_nodes import GemmNode, Unreadable, gemm_functions, given, read_call, stem_of
from runtime.ops import attention, einsum
from runtime.ops.grouped import join_groups, split_groups

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def run_call(frame: Frame, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A call that multiplies matrices."""
    call = read_call(func, args, kwargs)
    assert call is not None
    name = frame.name(stem_of(call))
    if isinstance(call, Unreadable):
        frame.scope.leave(name, call.op, call.reason)
        return func(*args, **kwargs)
    if not isinstance(call, GemmNode):
        return _COMPOSITES[call.stem](frame, name, func, args, kwargs)
    product = frame.product(name, call.op, call.kind, call.lhs, call.rhs, _sizes(call), call.geometry)
    if product is None:
        return func(*args, **kwargs)
    is_weight, is_scaled = _is_weight(call.rhs), (call.alpha, call.beta) != (1, 1)
    bias = None if is_scaled else call.bias
    y = product(call.lhs, call.rhs, bias, geometry=call.geometry, is_weight=is_weight)
    if not is_scaled:
        return y
    y = y if call.alpha == 1 else y * call.alpha
    return y if call.beta == 0 else y + (call.bias if call.beta == 1 else call.bias * call.beta)


def _sizes(call: GemmNode) -> tuple[int | None, int | None]:
    """n and k, where the right operand is the weight of a layer."""
    if call.kind == "matmul":
        return None, None
    first, second, *window = call.rhs.shape
    taps = math.prod(window)
    if call.geometry is not None and call.geometry.is_transposed:
        return second * call.geometry.groups, first // call.geometry.groups * taps
    return (second, first) if call.kind == "linear_kn" else (first, second * taps)


def _is_weight(x: Tensor) -> bool:
    """A parameter or a view of one, whose cast may be kept between uses."""
    return isinstance(x, nn.Parameter) or (not torch.compiler.is_compiling() and isinstance(x._base, nn.Parameter))


def _run_einsum(frame: Frame, func: Any, args: Args, kwargs: Kwargs) -> Any:
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
    return frame.product(name, "matmul", "matmul", lhs, rhs)


def _multiply_pair(product: Any, equation: str, left: Tensor, right: Tensor) -> Tensor:
    left, right = einsum.with_gradients_as_torch(left, right, equation)
    lhs, rhs = einsum.left_matrices(left, equation), einsum.right_matrices(right, equation)
    return einsum.from_matrices(product(lhs, rhs), left, right, equation)


def _run_attention(frame: Frame, name: str, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Attention of which a product is named: taken apart as torch's math backend does it."""
    q, k, v = (given(args, kwargs, position, key) for position, key in enumerate(("query", "key", "value")))
    mask, dropout_p = given(args, kwargs, 3, "attn_mask"), given(args, kwargs, 4, "dropout_p", default=0.0)
    is_causal = given(args, kwargs, 5, "is_causal", default=False)
    scale, enable_gqa = kwargs.get("scale"), kwargs.get("enable_gqa", False)
    qk = frame.product(f"{name}.qk", "matmul", "matmul", q, k.transpose(-2, -1))
    pv = frame.product(f"{name}.pv", "matmul", "matmul", q, v, lhs_shape=(*q.shape[:-1], k.shape[-2]))
    if qk is None and pv is None:
        return func(*args, **kwargs)
    lhs, rhs = attention.scaled_query(q, scale), attention.scaled_key(k, q, scale, enable_gqa)
    scores = torch.matmul(lhs, rhs) if qk is None else qk(lhs, rhs)
    weights = attention.attention_weights(scores, mask, is_causal, dropout_p)
    values = attention.heads_like(v, q, enable_gqa)
    return attention.like_query(torch.matmul(weights, values) if pv is None else pv(weights, values), q)


def _run_grouped(frame: Frame, name: str, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Rows of x in groups, one matrix per group: a product per group, under one name."""
    x, weight, offs = (given(args, kwargs, position, key) for position, key in enumerate(("mat_a", "mat_b", "offs")))
    is_nk = weight.stride(-2) == 1  # stored as (G, N, K), the weight of a linear layer per group
    kind, matrices = ("linear", weight.transpose(-2, -1)) if is_nk else ("linear_kn", weight)
    product = frame.product(name, "linear", kind, x, matrices[0], (weight.shape[2], weight.shape[1]))
    if product is None:
        return func(*args, **kwargs)
    is_weight = _is_weight(weight)
    *rows, rest = split_groups(x, offs)
    pairs = enumerate(zip(rows, matrices.unbind(0)))
    return join_groups([product(lhs, rhs, is_weight=is_weight, group=group) for group, (lhs, rhs) in pairs], rest)


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
        "in_proj": frame.product(f"{name}.in_proj", "linear", "linear", q, first, (3 * width, width)),
        "qk": frame.product(f"{name}.qk", "matmul", "matmul", q[..., :heads], k[..., :heads].mT),
        "pv": frame.product(f"{name}.pv", "matmul", "matmul", q, v, lhs_shape=scores),
        "out_proj": frame.product(f"{name}.out_proj", "linear", "linear", q, last, tuple(last.shape)),
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


_MULTIHEAD = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_MULTIHEAD_OPTIONS = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
_COMPOSITES: dict[str, Callable[..., Any]] = {
    "sdpa": _run_attention,
    "grouped_mm": _run_grouped,
}
RUNNERS.update(dict.fromkeys(gemm_functions(), run_call))
RUNNERS.update({torch.einsum: _run_einsum, F.multi_head_attention_forward: _run_multihead})
