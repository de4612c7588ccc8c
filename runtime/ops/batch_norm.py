"""Folding: a batch norm in evaluation mode, read as y = s * x + t, moves into the weight and bias next to it.

    s = weight / sqrt(var + eps)    t = bias - mean * s        per feature of the batch norm
    w' = w * s                      b' = b * s + t             s and t of the outputs: the batch norm comes after
    w' = w * s                      b' = b + sum_k w_nk t_k    s and t of the inputs: the batch norm comes before

Everything is computed in float32 (float64 where w is), each operation rounded once, in the order written; w' and b' are
rounded to the dtype of w. The root is taken in float64 and rounded: torch's fp32 root is off by an ulp here and there,
and not everywhere alike. NaN and Inf propagate as IEEE says. Differentiable in every operand.

`axis` is the axis of w along which s lies. Along axis 1 a convolution with `groups` holds its features once per group:
feature g * w.shape[1] + i belongs to row block g, i along axis 1.
"""

import torch
from torch import Tensor


def norm_scale(weight: Tensor | None, var: Tensor, *, eps: float) -> Tensor:
    """weight / sqrt(var + eps), the factor of a batch norm in evaluation mode, in fp32; no weight counts as ones."""
    padded = _wide(var) + eps
    inverse = 1 / padded.double().sqrt().to(padded.dtype)
    return inverse if weight is None else inverse * weight


def norm_shift(bias: Tensor | None, mean: Tensor, s: Tensor) -> Tensor:
    """bias - mean * s, the summand of a batch norm in evaluation mode, in fp32; no bias counts as zeros."""
    shift = -(_wide(mean) * s)
    return shift if bias is None else bias + shift


def fold_weight(w: Tensor, s: Tensor, *, axis: int, groups: int) -> Tensor:
    """w * s, s along `axis` of w: the weight with the batch norm before or after it folded in, in the dtype of w."""
    return _along(_wide(w), s, axis, groups).to(w.dtype)


def fold_bias(w: Tensor, b: Tensor | None, s: Tensor, t: Tensor) -> Tensor:
    """b * s + t, the bias with the batch norm after it folded in, in the dtype of w; no b counts as zeros."""
    return (t if b is None else _wide(b) * s + t).to(w.dtype)


def fold_input_bias(w: Tensor, b: Tensor | None, t: Tensor, *, axis: int, groups: int) -> Tensor:
    """b + the sum of w * t over the inputs and the window, the bias with the batch norm before it folded in, in the
    dtype of w; no b counts as zeros. It is right where no window reaches into a padding.
    """
    through = _along(_wide(w), t, axis, groups)
    summed = through.sum(0) if axis == 0 else through.flatten(1).sum(1)
    return (summed if b is None else b + summed).to(w.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _along(w: Tensor, v: Tensor, axis: int, groups: int) -> Tensor:
    """w times v, v along an axis of w."""
    window = (1,) * (w.dim() - 2)
    if axis == 0:
        return w * v.view(-1, 1, *window)
    return (w.unflatten(0, (groups, -1)) * v.view(groups, 1, -1, *window)).flatten(0, 1)
