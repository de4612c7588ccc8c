"""Leaf forward: what a leaf runs in the place of its forward, by phase of the schedule.

The forward of a row of lpcompile/frontends/leaves/find.py is run with the products of this phase; weights, geometry and
all else are read from the module as it runs. A leaf that no rule names in this phase runs its own forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpcompile.frontends.intercept.scope import shielded
from lpcompile.frontends.leaves.find import Leaf, LeafRun
from runtime.ops.product import Product
from runtime.state import RunState

Products = Mapping[str, Callable[..., Tensor]]


@dataclass
class LeafForward:
    """The record of a leaf."""

    forward: LeafRun
    phases: list[Products | None]
    state: RunState

    @property
    def sites(self) -> set[str]:
        """The names of its products, of every phase."""
        parts = [part for products in self.phases if products is not None for part in products.values()]
        bare = [getattr(part, "func", part) for part in parts]
        return {part.name for part in bare if isinstance(part, Product)}

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if torch._C._len_torch_function_stack():
            return shielded(self._run, module, original, args, kwargs)
        return self._run(module, original, args, kwargs)

    def _run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        products = self.phases[self.state.phase_in(module.training)]
        if products is None:
            return original(module, *args, **kwargs)
        return self.forward(module, products, *args, **kwargs)


def leaf_products(leaves: list[Leaf], products: Mapping[str, Callable[..., Any]]) -> Products | None:
    """What runs each part of a leaf: those of `products`, by site, and torch for the rest; None if it runs all. Of a
    leaf of grouped products those of `products` alone.
    """
    named = [leaf for leaf in leaves if leaf.name in products]
    if not named:
        return None
    if leaves[0].is_grouped:
        return {leaf.part: products[leaf.name] for leaf in named}
    return {leaf.part: _part(leaf, products.get(leaf.name)) for leaf in leaves}


def _part(leaf: Leaf, product: Callable[..., Any] | None) -> Callable[..., Any]:
    if product is None:
        return torch._C._nn.linear if leaf.kind == "linear" else torch.matmul
    return product if leaf.op == "matmul" else partial(product, is_weight=True)


def is_kept_weight(product: Product) -> bool:
    """Whether a product casts its weight, so that the cast may be kept between uses."""
    casts = (product.spec.fwd.rhs, product.spec.bwd.rhs)
    return any(not (spec.is_identity or spec.is_stochastic or spec.transform) for spec in casts)
