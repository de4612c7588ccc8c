"""nn.MultiheadAttention with its four products by name: in_proj, qk, pv and out_proj.

The arithmetic of torch.nn.functional.multi_head_attention_forward, operation by operation, so that equal products give
equal bits; where torch calls a fused attention (need_weights=False), those of its math backend, or that attention
itself where the policy rounds neither of its products. in_proj is one call for self-attention, two where key and value
are one tensor, else three. torch's inference fast path is not taken.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.ops import attention
from runtime.ops.product import Product

Products = Mapping[str, Callable[..., Tensor]]


def multihead_attention(
    module: nn.MultiheadAttention,
    products: Products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results of nn.MultiheadAttention.forward."""
    is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)  # type: ignore[attr-defined]
    if not is_batched:
        query, key, value = _thrice(query, key, value, lambda x: x.unsqueeze(1))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif module.batch_first:
        query, key, value = _thrice(query, key, value, lambda x: x.transpose(1, 0))
    key_padding_mask = _as_float(key_padding_mask, "key_padding_mask", query.dtype)
    attn_mask = _as_float(attn_mask, "attn_mask", query.dtype)
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    is_causal = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if is_causal else attn_mask

    length, batch, _ = query.shape
    heads = module.num_heads
    _check_shapes(module, query, key, value, key_padding_mask, attn_mask)
    q, k, v = _project(module, products["in_proj"], query, key, value)
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, module.bias_v.repeat(1, batch, 1)])
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    q, k, v = (x.view(x.shape[0], batch * heads, module.head_dim).transpose(0, 1) for x in (q, k, v))
    if module.add_zero_attn:
        zeros = k.new_zeros((k.shape[0], 1, k.shape[2]))
        k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        attn_mask, key_padding_mask = _one_more(attn_mask), _one_more(key_padding_mask)
    mask = _merge(attn_mask, key_padding_mask, batch, heads, k.shape[1])
    dropout_p = module.dropout if module.training else 0.0

    weights: Tensor | None = None
    if need_weights:
        scores = products["qk"](q * math.sqrt(1.0 / q.shape[-1]), k.transpose(-2, -1))
        weights = (scores if mask is None else mask + scores).softmax(dim=-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        y = products["pv"](weights, v)
        weights = weights.view(batch, heads, length, k.shape[1])
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if is_batched else weights.squeeze(0)
    else:
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, heads, -1, k.shape[1])
        q, k, v = (x.view(batch, heads, x.shape[1], -1) for x in (q, k, v))
        inner = [products["qk"], products["pv"]]
        if all(each is torch.matmul or (isinstance(each, Product) and each.is_identity) for each in inner):
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal).flatten(0, 1)
            for each in inner:
                if isinstance(each, Product) and not torch.compiler.is_compiling():
                    each.count()
            return _projected(module, products, y, length, batch, is_batched), None
        scores = products["qk"](attention.scaled_query(q, None), attention.scaled_key(k, q, None, False))
        shares = attention.attention_weights(scores, mask, is_causal, dropout_p)
        y = attention.like_query(products["pv"](shares, attention.heads_like(v, q, False)), q).flatten(0, 1)
    return _projected(module, products, y, length, batch, is_batched), weights


def _projected(
    module: nn.MultiheadAttention, products: Products, y: Tensor, length: int, batch: int, is_batched: bool
) -> Tensor:
    """(batch x heads, length, size of a head) through out_proj, laid as the module gives it."""
    y = y.transpose(0, 1).reshape(length * batch, module.embed_dim)
    y = products["out_proj"](y, module.out_proj.weight, module.out_proj.bias).view(length, batch, -1)
    if not is_batched:
        return y.squeeze(1)
    return y.transpose(1, 0) if module.batch_first else y


def _thrice(query: Tensor, key: Tensor, value: Tensor, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """The three changed; what was one tensor stays one tensor. torch.compile decides `is` as it traces; it would
    guard on an id, and compile anew for every other tensor.
    """
    first = change(query)
    second = first if key is query else change(key)
    return first, second, first if value is query else second if value is key else change(value)


def _project(
    module: nn.MultiheadAttention, project: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    weight, bias = module.in_proj_weight, module.in_proj_bias
    biases: Any = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:  # embedding sizes of their own for key and value
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        return tuple(project(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    width = module.embed_dim
    if query is key and key is value:
        return _parts(project(query, weight, bias), 3)
    if key is value:
        w_q, w_kv = weight.split([width, 2 * width])
        b_q, b_kv = (None, None) if bias is None else bias.split([width, 2 * width])
        return project(query, w_q, b_q), *_parts(project(key, w_kv, b_kv), 2)
    return tuple(project(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases))


def _parts(packed: Tensor, number: int) -> tuple[Tensor, ...]:
    return packed.unflatten(-1, (number, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous().unbind(0)


def _as_float(mask: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask is True where a key is left out. Raises AssertionError for one of integers."""
    return F._canonical_mask(mask, name, other_type=None, other_name="", target_type=dtype, check_other=False)


def _check_shapes(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """The errors of multi_head_attention_forward for what would broadcast."""
    length, batch, width = query.shape
    if width != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {width}")
    dims = 3 if module.in_proj_weight is not None else 2
    if key.shape[:dims] != value.shape[:dims]:
        raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
    if attn_mask is not None:
        shape = (length, key.shape[0]) if attn_mask.dim() == 2 else (batch * module.num_heads, length, key.shape[0])
        if attn_mask.shape != shape:
            raise RuntimeError(f"The shape of the attn_mask is {attn_mask.shape}, but should be {shape}.")
    if key_padding_mask is not None and key_padding_mask.shape != (batch, key.shape[0]):
        shape = (batch, key.shape[0])
        raise AssertionError(f"The shape of the key_padding_mask is {key_padding_mask.shape}, but should be {shape}.")


def _one_more(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))


def _merge(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, num_keys: int
) -> Tensor | None:
    """One mask for all, (1 or batch x heads, queries, keys)."""
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask.unsqueeze(0)
    if key_padding_mask is None:
        return attn_mask
    padding = key_padding_mask.view(batch, 1, 1, num_keys).expand(-1, heads, -1, -1).reshape(-1, 1, num_keys)
    return padding if attn_mask is None else attn_mask + padding
