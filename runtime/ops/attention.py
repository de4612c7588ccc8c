"""Attention between its two products, operation by operation as torch's math backend has it, so that the same products
give the same bits.

    scores = scaled_query(q) . scaled_key(k)      both are scaled by sqrt(1 / sqrt(E)), which keeps the product in range
    y      = attention_weights(scores) . heads_like(v)

Shapes: q (..., H, L, E), k (..., H_kv, S, E), v (..., H_kv, S, V), scores (..., H, L, S). Half-precision inputs are
computed in fp32 from the first scaling on; `like_query` rounds the output once, to the query's dtype.
"""

import math

import torch
from torch import Tensor


def scaled_query(q: Tensor, scale: float | None) -> Tensor:
    """q sqrt|scale| in fp32 or wider, with the scale's sign; scale None is 1 / sqrt(E)."""
    factor = _factor(q, scale)
    return _wide(q) * (-factor if scale is not None and scale < 0 else factor)


def scaled_key(k: Tensor, q: Tensor, scale: float | None, enable_gqa: bool) -> Tensor:
    """k^T sqrt|scale|, (..., H, E, S): heads repeated to those of q if enable_gqa."""
    return _repeated(_wide(k), q, enable_gqa).transpose(-2, -1) * _factor(q, scale)


def heads_like(v: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    """v in fp32 or wider, heads repeated to those of q if enable_gqa."""
    return _repeated(_wide(v), q, enable_gqa)


def attention_weights(scores: Tensor, mask: Tensor | None, is_causal: bool, dropout_p: float) -> Tensor:
    """softmax(scores + mask) with dropout. A boolean mask is True where a key takes part; a row with no key is 0."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = scores.new_zeros(mask.shape).masked_fill_(mask.logical_not(), -math.inf)
        scores = scores + mask
    weights: Tensor = torch.ops.aten._safe_softmax.default(scores, -1)  # torch.compile knows it by this name alone
    return torch.dropout(weights, dropout_p, True) if dropout_p > 0 else weights


def like_query(y: Tensor, q: Tensor) -> Tensor:
    """y in the dtype of q."""
    return y.to(q.dtype)


def _factor(q: Tensor, scale: float | None) -> float:
    return math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _repeated(x: Tensor, q: Tensor, enable_gqa: bool) -> Tensor:
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if enable_gqa else x
