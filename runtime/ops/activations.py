"""Activations: what may follow a product as a part of it, forward and backward, with the bits of torch's own ops.

    name        z =                    backward needs
    relu        max(y, 0)              z
    gelu        y Phi(y), by erf       y
    gelu-tanh   y Phi(y), by tanh      y

silu, tanh and sigmoid are not here: their time goes into computing, and not into the pass over memory that a part of a
product saves (benchmarks/fusion.py). Forward writes in place wherever nothing needs what it overwrites.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu-tanh")
"""Every activation by name."""


def followed_by(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(y + residual) in torch's own ops, with their backward."""
    y = y if residual is None else y + residual
    if activation == "relu":
        return torch.relu(y)
    return F.gelu(y, approximate=_FORMS[activation]) if activation else y


def add_and_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu?(y + residual), written into y, which nothing else may hold; a new tensor under torch.compile."""
    if torch.compiler.is_compiling():
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
    y = y if residual is None else y.add_(residual)
    return torch.relu_(y) if relu else y


def finish_with(y: Tensor, residual: Tensor | None, activation: str, keeps: bool) -> tuple[Tensor, Tensor | None]:
    """The activation of y + residual, and what its backward needs where it `keeps` that. y may be overwritten."""
    y = add_and_relu(y, residual, activation == "relu")
    if activation in ("", "relu"):
        return y, y if activation and keeps else None
    if keeps or torch.compiler.is_compiling():
        return F.gelu(y, approximate=_FORMS[activation]), y
    return torch.ops.aten.gelu.out(y, approximate=_FORMS[activation], out=y), None


def activation_grad(dz: Tensor, needed: Tensor | None, activation: str) -> Tensor:
    """dy from dz, by the function that torch's autograd calls."""
    if not activation:
        return dz
    aten = torch.ops.aten
    if activation == "relu":
        dy: Tensor = aten.threshold_backward(dz, needed, 0)
    else:
        dy = aten.gelu_backward(dz, needed, approximate=_FORMS[activation])
    return dy


_FORMS = {"gelu": "none", "gelu-tanh": "tanh"}
