"""Mixture-of-experts layers of transformers with their two products by name: gate_up_proj (or up_proj) and down_proj.

Tokens are sorted by expert, multiplied group by group, weighted and added up per token, operation by operation as the
library's `grouped_mm` implementation does it, whichever the configuration asks for: equal products give its bits, and
those of the others up to the order in which a token's experts are added.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpcompile.errors import NotSupported

Products = Mapping[str, Callable[..., Tensor]]


def is_experts(module: nn.Module) -> bool:
    """True for what transformers' `use_experts_implementation` decorates."""
    return all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "down_proj"))


def expert_weights(module: Any) -> dict[str, tuple[int, int, int]]:
    """Name -> (experts, n, k) of each product; ZeRO-3 keeps the shape of a weight that it has partitioned."""
    shapes = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name)
        experts, rows, columns = getattr(weight, "ds_shape", weight.shape)
        shapes[name] = (experts, columns, rows) if module.is_transposed else (experts, rows, columns)
    return shapes


def experts(
    module: Any, products: Products, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """hidden_states (tokens, size), top_k_index and top_k_weights (tokens, k) -> (tokens, size)."""
    if module._is_expert_parallel:
        raise NotSupported(
            "compiled experts do not run expert-parallel", where="lpcompile", hint="expert parallelism off"
        )
    num_tokens, num_chosen = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1))
    counts = torch.histc(expert_of_row.float(), bins=module.num_experts, min=0, max=module.num_experts - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)

    def multiply(name: str, x: Tensor) -> Tensor:
        weight = getattr(module, name)
        y = products[name](x.to(weight.dtype), weight, ends)
        return y + getattr(module, f"{name}_bias")[expert_of_row] if module.has_bias else y

    x = hidden_states[order // num_chosen]
    if module.has_gate:
        x = module._apply_gate(multiply("gate_up_proj", x))
    else:
        x = module.act_fn(multiply("up_proj", x))
    x = multiply("down_proj", x)
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return x[back].view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_states.dtype)
