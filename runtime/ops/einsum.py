"""Einsum of two operands as one batched matrix product: which labels are batch, rows, columns and sum, and the permutes
around it; of more operands as pairs.

    "bqhd,bkhd->bhqk"     batch bh, rows q, columns k, sum d     left (bh, q, d) . right (bh, d, k) = (bh, q, k)

The labels of a group are in the order of the output, those of the sum in the order of the alphabet (capitals first), as
torch.einsum has it: the same products are summed in the same order and give the same bits. Where the output begins
with labels of the right operand, torch multiplies right by left: a policy's `a` stays the left operand, and the order
of the sums may differ, by the machine's library; strides are torch's all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """An equation taken apart: a label of both operands is in batch or in sums, one of the left alone in rows, one of
    the right alone in columns; a label that is summed in one operand alone is in no group.
    """

    left: str
    right: str
    out: str
    batch: str
    rows: str
    columns: str
    sums: str

    @staticmethod
    def of(equation: str) -> "Labels":
        """Groups of `ab,bc->ac`; without an arrow the output is every label that occurs once, in alphabetical order."""
        inputs, arrow, out = equation.replace(" ", "").partition("->")
        left, right = inputs.split(",")
        if not arrow:
            out = "".join(sorted(label for label in left + right if (left + right).count(label) == 1))
        return Labels(
            left,
            right,
            out,
            batch="".join(label for label in out if label in left and label in right),
            rows="".join(label for label in out if label not in right),
            columns="".join(label for label in out if label not in left),
            sums="".join(sorted(label for label in left if label in right and label not in out)),
        )


def why_no_product(equation: str) -> str:
    """Why an equation of two operands is not one batched product of matrices; empty if it is."""
    if "." in equation:
        return "an ellipsis is not taken apart"
    labels = Labels.of(equation)
    if any(len(set(side)) != len(side) for side in (labels.left, labels.right)):
        return "a label twice in one operand takes its diagonal"
    if set(labels.left + labels.right) != set(labels.batch + labels.rows + labels.columns + labels.sums):
        return "a label of one operand only is summed before the product"
    if not labels.sums:
        return "no label is summed"
    if not labels.rows or not labels.columns:
        return "a product with a vector is no GEMM"
    return ""


def why_no_pairs(equation: str) -> str:
    """Why an equation of three operands and more is not taken apart into pairs; empty if it is."""
    return "an ellipsis is not taken apart" if "." in equation else ""


def pairs(equation: str, shapes: Sequence[torch.Size]) -> list[tuple[int, int, str]]:
    """(i, j, equation) of two operands each: operands i < j are replaced by their product, in the place of the first.
    From left to right, as torch.einsum has it, or in the order that opt_einsum finds where torch uses it.
    """
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        labels = "".join(terms)
        out = "".join(sorted(label for label in labels if labels.count(label) == 1))
    found = []
    for i, j in _order(equation, shapes):
        left, right = terms[i], terms.pop(j)
        rest = "".join([*terms[:i], *terms[i + 1 :], out])
        is_last = len(terms) == 1
        terms[i] = out if is_last else "".join(dict.fromkeys(label for label in left + right if label in rest))
        found.append((i, j, f"{left},{right}->{terms[i]}"))
    return found


def _order(equation: str, shapes: Sequence[torch.Size]) -> list[tuple[int, int]]:
    finder = torch.backends.opt_einsum
    if torch.compiler.is_compiling() or not (finder.enabled and finder.is_available()):
        return [(0, 1)] * (len(shapes) - 1)
    path = finder.get_opt_einsum().contract_path(equation, *shapes, shapes=True, optimize=finder.strategy)[0]
    places, order = [*range(len(shapes))], []  # opt_einsum puts a result last, we in the place of the first
    for pair in path:
        first, second = sorted(places[each] for each in pair)
        order.append((first, second))
        places = [place - (place > second) for at, place in enumerate(places) if at not in pair] + [first]
    return order


def left_matrices(x: Tensor, equation: str) -> Tensor:
    """The left operand as (batch, rows, sums)."""
    labels = Labels.of(equation)
    return _grouped(x, labels.left, (labels.batch, labels.rows, labels.sums))


def right_matrices(x: Tensor, equation: str) -> Tensor:
    """The right operand as (batch, sums, columns)."""
    labels = Labels.of(equation)
    return _grouped(x, labels.right, (labels.batch, labels.sums, labels.columns))


def from_matrices(product: Tensor, left: Tensor, right: Tensor, equation: str) -> Tensor:
    """(batch, rows, columns) back to the output's dims, with the strides that torch.einsum gives the result and its
    operands' gradients; sizes are read from the operands.
    """
    labels = Labels.of(equation)
    sizes = dict(zip(labels.left, left.shape)) | dict(zip(labels.right, right.shape))
    order = labels.batch + labels.rows + labels.columns
    y = product.reshape([sizes[label] for label in order]).permute([order.index(label) for label in labels.out])
    if torch.compiler.is_compiling():
        return y
    return _laid(y, _strides(equation, left.shape, left.stride(), right.shape, right.stride())[0])


def with_gradients_as_torch(left: Tensor, right: Tensor, equation: str) -> tuple[Tensor, Tensor]:
    """The operands, whose gradients get the strides that torch.einsum gives them."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return left, right
    _, of_left, of_right = _strides(equation, left.shape, left.stride(), right.shape, right.stride())
    return _GradientLaid.apply(left, of_left), _GradientLaid.apply(right, of_right)


class _GradientLaid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.strides = strides
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _laid(dx, ctx.strides), None


def _laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x with these strides."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


_Strides = tuple[int, ...]


@lru_cache(maxsize=4096)
def _strides(
    equation: str, left: torch.Size, left_strides: _Strides, right: torch.Size, right_strides: _Strides
) -> tuple[_Strides, _Strides, _Strides]:
    """Of torch.einsum's result and of its operands' gradients, found without data."""
    with torch.inference_mode(False), torch.enable_grad():
        pairs = ((left, left_strides), (right, right_strides))
        a, b = (torch.empty_strided(*each, device="meta", requires_grad=True) for each in pairs)
        y = torch.einsum(equation, a, b)
        da, db = torch.autograd.grad(y, (a, b), torch.empty_strided(y.shape, y.stride(), device="meta"))
    return y.stride(), da.stride(), db.stride()


def _grouped(x: Tensor, labels: str, groups: tuple[str, str, str]) -> Tensor:
    sizes = dict(zip(labels, x.shape))
    shape = []
    for group in groups:
        extent = 1
        for label in group:
            extent *= sizes[label]
        shape.append(extent)
    return x.permute([labels.index(label) for group in groups for label in group]).reshape(shape)
