"""Activations: what may follow a product as a part of it, forward and backward, with the bits of torch's own ops.

    name        z =                    backward needs
    relu        max(y, 0)              z
    gelu        y Phi(y), by erf       y
    gelu-tanh   y Phi(y), by tanh      y

silu, tanh and sigmoid are not here: their time goes into computing, and not into the pass over memory that a part of a
product saves (benchmarks/fusion.py). Inside of a torch op they write in place, where nothing needs what they overwrite.
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
    """relu?(y + residual), written into y, which nothing else may hold: inside of a torch op."""
    y = y if residual is None else y.add_(residual)
    return torch.relu_(y) if relu else y


def overwrite_with(y: Tensor, activation: str) -> Tensor:
    """The activation of y, which nothing else may hold, in its place; relu is done by `add_and_relu`."""
    if activation in ("", "relu"):
        return y
    return torch.ops.aten.gelu.out(y, approximate=_FORMS[activation], out=y)


def needed_by(activation: str, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """(activation of y, what its backward needs), y being kept where it is that; of relu y is the result already."""
    if activation in ("", "relu"):
        return y, y if activation else None
    return F.gelu(y, approximate=_FORMS[activation]), y


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
