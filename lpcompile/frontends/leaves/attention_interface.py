"""Attention of transformers as a leaf of two products, qk and pv, through its attention interface.

    use_lp_attention(model)      each attention module gets a child `core_attention`, which its forward calls
    model.layers.0.self_attn.core_attention.qk and .pv     the sites, with or without recording, with or without a cache

A cache of keys and values is no argument that a graph can take, so attention that is given one runs its original
forward; what it calls through the interface is a module all the same, and a leaf of the compiler. Between and around
the two products the arithmetic is that of the model's own eager attention, its masks, biases and sinks included.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lpcompile.errors import LpError, NotSupported

Model = TypeVar("Model", bound=nn.Module)
Products = Mapping[str, Callable[[Tensor, Tensor], Tensor]]


class CoreAttention(nn.Module):
    """What an attention module calls between its projections: its model's own eager attention. No parameters."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        vars(self)["owner"] = owner  # not a child: the owner holds this module

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        """query (B, heads, Q, D), key and value (B, key heads, K, D), an additive mask that broadcasts to
        (B, heads, Q, K). Returns (B, Q, heads, D) and the probabilities. Raises NotSupported for an option that the
        eager attention would ignore, though it may change the result.
        """
        owner: Any = vars(self)["owner"]
        eager = _eager_attention(owner)
        _check_options(owner, eager, options)
        return eager(owner, query, key, value, attention_mask, **options)


def use_lp_attention(model: Model) -> Model:
    """Let every attention of a transformers model run as `core_attention`, in place; call it before lpcompile().

    The model computes what it does with attn_implementation="eager", and so do its masks;
    `model.set_attn_implementation("sdpa")` undoes it. Raises LpError for a model that has no attention of this kind.
    """
    owners = [module for module in model.modules() if _calls_interface(module)]
    choose: Any = getattr(model, "set_attn_implementation", None)
    if not owners or choose is None:
        raise LpError(
            "no attention that goes through the attention interface of transformers",
            where=f"use_lp_attention({type(model).__name__})",
            expected="a transformers model whose attention can be chosen by attn_implementation",
            hint="its products of activations are reached by example inputs, without a cache",
        )
    for owner in owners:
        _eager_attention(owner)  # raises where there is none
        if not isinstance(getattr(owner, CHILD, None), CoreAttention):
            setattr(owner, CHILD, CoreAttention(owner))
    importlib.import_module("transformers").AttentionInterface.register(NAME, _call_core)
    masks = importlib.import_module("transformers.masking_utils")
    masks.AttentionMaskInterface.register(NAME, masks.eager_mask)
    choose(NAME)
    return model


def core_attention(module: CoreAttention, products: Products, *args: Any, **kwargs: Any) -> Any:
    """The forward of CoreAttention with its two products called by name."""
    parts = _Parts(products)
    with parts:
        result = CoreAttention.forward(module, *args, **kwargs)
    if parts.num_seen != len(_PARTS):
        owner = type(vars(module)["owner"]).__name__
        got = f"{parts.num_seen} products in the eager attention of {owner}"
        raise NotSupported("this attention is not two products", expected=" and ".join(_PARTS), got=got)
    return result


def _call_core(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """What transformers calls under the name."""
    core = getattr(module, CHILD, None)
    if core is None:
        raise LpError(
            f"{type(module).__name__} has no {CHILD}",
            where=f'attn_implementation="{NAME}"',
            hint="use_lp_attention(model), which also chooses the name",
        )
    return core(query, key, value, attention_mask, **options)


def _calls_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _eager_attention(owner: nn.Module) -> Callable[..., Any]:
    """The function that the owner's forward names as its default."""
    found = inspect.unwrap(type(owner).forward).__globals__.get("eager_attention_forward")
    if found is None:
        raise LpError(
            f"{type(owner).__name__} names no eager attention",
            where="use_lp_attention",
            expected="a function eager_attention_forward beside the class",
        )
    return found


def _check_options(owner: nn.Module, eager: Callable[..., Any], options: Mapping[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None and name not in (*_READ, *_IGNORED)]
    read = _names_read(eager) if given else ()
    for name in given:
        if name not in read:
            what = f"the eager attention of {type(owner).__name__} does not read {name}"
            expected = f"None, or one of {', '.join((*_READ, *_IGNORED))}"
            hint = 'model.set_attn_implementation("sdpa"), which this front end reaches by example inputs'
            raise NotSupported(what, where=f"core_attention({name}=...)", expected=expected, hint=hint)


@torch.compiler.assume_constant_result
@lru_cache(maxsize=256)
def _names_read(function: Callable[..., Any]) -> frozenset[str]:
    """Its parameters, and what it may look up among its keywords."""
    code = inspect.unwrap(function).__code__
    return frozenset(inspect.signature(function).parameters) | {
        each for each in code.co_consts if isinstance(each, str)
    }


class _Parts(TorchFunctionMode):
    """Gives the products to whom they belong, in the order of the program, and leaves all else alone."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products
        self.num_seen = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _MATMULS or kwargs:
            return func(*args, **(kwargs or {}))
        self.num_seen += 1
        if self.num_seen > len(_PARTS):
            return func(*args)
        return self._products[_PARTS[self.num_seen - 1]](*args)


NAME = "lp"
"""The attn_implementation."""

CHILD = "core_attention"

_PARTS = ("qk", "pv")

_READ = ("scaling", "dropout")
"""What every eager attention reads."""

_IGNORED = (
    *("is_causal", "sliding_window", "position_ids", "cache_position", "use_cache", "past_key_values"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("max_seqlen_q", "max_seqlen_k", "deterministic", "s_aux", "position_embeddings"),
)
"""What models hand to every attention and an eager one leaves to the mask or to its module, as it does uncompiled."""

_MATMULS = frozenset({torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm})
