"""Mixture-of-experts layers of transformers with their two products by name: gate_up_proj (or up_proj) and down_proj.

The model's own implementation runs, whichever the configuration asks for; a mode hands on what it multiplies by the
experts' weights:

    F.linear(x, w[e]), x @ w[e]                      eager: the product of one expert
    bmm(w[ids], x_SK1), bmm(x_S1K, w[ids])           batched_mm: one product per expert, the rows of each together
    grouped_mm(x, w, offs)                           grouped_mm: one product per expert

A product of one token per matrix would cast a weight for every token, so those of batched_mm are brought together. What
the identity runs is the function that the model called, on the operands that it gave.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from lpcompile.frontends.install import original_forward, own_forward
from lpcompile.frontends.intercept.scope import FUNCTION_APPLY, RUNNERS
from runtime.compile_marks import outside_of_graphs
from runtime.ops.grouped import join_groups, split_groups

Products = Mapping[str, Any]
"""A runtime.ops.product.Product by part."""
Kwargs = Mapping[str, Any]


def is_experts(module: nn.Module) -> bool:
    """True for what transformers' `use_experts_implementation` decorates, whose forward is that of the class."""
    return own_forward(module) is None and all(
        hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "down_proj")
    )


def expert_weights(module: Any) -> dict[str, tuple[int, int]]:
    """Name -> (n, k) of each product; ZeRO-3 keeps the shape of a weight that it has partitioned."""
    shapes = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weight = getattr(module, name)
        _, rows, columns = getattr(weight, "ds_shape", weight.shape)
        shapes[name] = (columns, rows) if module.is_transposed else (rows, columns)
    return shapes


def experts(module: Any, products: Products, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, its products handed to `products`, which has those that a policy names."""
    if torch.compiler.is_compiling():  # how many rows an expert gets is data: no graph holds it
        return _run_outside(module, products, args, kwargs)
    with _ExpertWeights(module, products) as weights:
        y = original_forward(module)(module, *args, **kwargs)
    if len(y):
        weights.tell_unseen()
    return y


@outside_of_graphs
def _run_outside(module: Any, products: Products, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
    return experts(module, products, *args, **kwargs)


class _View(NamedTuple):
    """A tensor made of a weight: the matrices of all experts, that of one (`index`), or one per row (`indices`)."""

    tensor: Tensor
    part: str
    is_nk: bool
    """Whether each matrix lies as (n, k), the weight of a linear layer."""
    index: Any = None
    indices: Any = None


class _ExpertWeights(TorchFunctionMode):
    """Follows the weights of one module through one call of it. It is its own frame and scope for a runner of
    lpcompile/frontends/intercept/products.py.
    """

    def __init__(self, module: Any, products: Products) -> None:
        super().__init__()
        self.module, self.products = module, products
        self.views: dict[str, list[_View]] = {part: [] for part in expert_weights(module)}
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_in_a_function():  # which has a gradient of its own, as ZeRO-3's linear
            return func(*args, **kwargs)
        if func in _INDEXING or func in _TURNING or func in _CONVERTING:
            return self._follow(func, args, kwargs)
        if func in _GROUPED or func is getattr(torch.ops.transformers, "grouped_mm_fallback", None):
            return self._multiply_groups(func, args, kwargs)
        if func in _BATCHED and len(args) == 2:
            left, right = (self._find(each) for each in args)
            for view, is_left in ((left, True), (right, False)):
                if view is not None and view.indices is not None:
                    return self._multiply_rows(func, args, view, is_left)
        runner = RUNNERS.get(func)
        return func(*args, **kwargs) if runner is None else runner(self, func, args, kwargs)

    def tell_unseen(self) -> None:
        """Count, and tell once, the products that were run where nothing saw them."""
        for part, product in self.products.items():
            if part not in self.seen and not self.module._is_expert_parallel and not product.is_identity:
                implementation = getattr(self.module.config, "_experts_implementation", "")
                product.fall_through(f"nothing sees the implementation {implementation} multiply by {part}")

    @property
    def scope(self) -> "_ExpertWeights":
        return self

    def name(self, stem: str) -> str:
        return stem

    def leave(self, name: str, op: str, reason: str) -> None:
        """No product of an expert, or one that `tell_unseen` tells of."""

    def product(self, name: str, op: str, kind: str, lhs: Tensor, rhs: Tensor, *_: Any) -> Any:
        """What a runner calls for a product by one expert's matrix; None where torch runs it."""
        view = self._find(rhs)
        if view is None or view.index is None:
            return None
        product = self._named(view)
        if product is None:
            return None
        is_turned, group = view.is_nk is self.module.is_transposed, int(view.index)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
            y: Tensor = product(x, weight.mT if is_turned else weight, bias, is_weight=True, group=group)
            return y

        return run

    def _multiply_groups(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        x, weight, *rest = args
        offs = rest[0] if rest else kwargs["offs"]
        view = self._find(weight)
        product = None if view is None or view.indices is not None else self._named(view)
        return func(*args, **kwargs) if product is None else self._per_expert(product, x, weight, view, offs)

    def _multiply_rows(self, func: Any, args: tuple[Any, ...], view: _View, is_left: bool) -> Any:
        """bmm of one matrix per row, which is the left or the right operand."""
        product = self._named(view)
        other = args[1 if is_left else 0]
        if product is None or other.shape[2 if is_left else 1] != 1:
            return func(*args)
        counts = torch.bincount(view.indices, minlength=self.module.num_experts)
        order = torch.argsort(view.indices, stable=True)
        back = torch.argsort(order)
        x = other.squeeze(2 if is_left else 1)[order]
        weight = getattr(self.module, view.part)
        y = self._per_expert(product, x, weight, view, counts.cumsum(0))[back]
        return y.unsqueeze(2 if is_left else 1)

    def _per_expert(self, product: Any, x: Tensor, weight: Tensor, view: Any, ends: Tensor) -> Tensor:
        """Rows of x in consecutive groups, one matrix of `weight` per group."""
        is_turned = view.indices is None and view.is_nk is self.module.is_transposed
        matrices = (weight.mT if is_turned else weight).unbind(0)
        *rows, rest = split_groups(x, ends)
        pairs = enumerate(zip(rows, matrices))
        return join_groups([product(x, w, is_weight=True, group=group) for group, (x, w) in pairs], rest)

    def _named(self, view: _View) -> Any:
        """What the policy has for the part; None where torch's own function runs."""
        self.seen.add(view.part)
        product = self.products.get(view.part)
        if product is not None and product.is_identity:
            product.count()
            return None
        return product

    def _find(self, x: Any) -> _View | None:
        """What x is, if it is made of a weight."""
        if not isinstance(x, Tensor):
            return None
        is_nk = not self.module.is_transposed
        for part, views in self.views.items():
            for view in views:
                if view.tensor is x:
                    return view
            if is_parametrized(self.module, part):  # computed at every use
                whole = x.dim() == 3 and x.shape == self.module.parametrizations[part].original.shape
            else:
                whole = x is getattr(self.module, part)
            if whole:
                return _View(x, part, is_nk)
        return None

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        """Indexing, transposing and converting of what is made of a weight give more of it."""
        y = func(*args, **kwargs)
        view = self._find(args[0])
        if view is None:
            return y
        views = self.views[view.part]
        if func in _CONVERTING:
            views.append(view._replace(tensor=y))
        elif func in _TURNING:
            if y.shape == view.tensor.mT.shape and y.dim() == view.tensor.dim():
                views.append(view._replace(tensor=y, is_nk=not view.is_nk))
        elif view.tensor.dim() == 3 and view.indices is None:
            index = args[1] if func is Tensor.__getitem__ else args[2]
            if isinstance(index, int) or (isinstance(index, Tensor) and not index.dim()):
                views[:] = [view._replace(tensor=y, index=index)]
            elif isinstance(index, Tensor) and index.dim() == 1 and not index.is_floating_point():
                views[:] = [view._replace(tensor=y, indices=index)]
        return y


def _is_in_a_function() -> bool:
    """Whether the operation is one of an autograd.Function that the implementation calls."""
    frame = sys._getframe(2)
    while frame.f_code is not experts.__code__ and frame.f_back is not None:
        if frame.f_code is FUNCTION_APPLY:
            return True
        frame = frame.f_back
    return False


_INDEXING = {Tensor.__getitem__, Tensor.select, torch.select, Tensor.index_select, torch.index_select}
_TURNING = {Tensor.transpose, torch.transpose, Tensor.mT.__get__, Tensor.T.__get__, Tensor.t, torch.t}  # type: ignore[attr-defined]
_CONVERTING = {Tensor.float, Tensor.to, Tensor.contiguous}
_GROUPED: set[Any] = {F.grouped_mm, torch._grouped_mm}
_BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}
