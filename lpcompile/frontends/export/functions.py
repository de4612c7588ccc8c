"""Functions: the aten operations of an exported graph as the functions that a forward writes.

    torch.ops.aten.add.Tensor(%x, %y)      becomes      torch.add(%x, %y)
    torch.ops.aten.view.default(%x, s)                  torch.Tensor.view(%x, s)

torch makes both from one declaration, so arguments stay as they are. Passes read these functions, and a call of one
takes half the time of a call of the operation. Operations that do nothing in a frozen model go: dropout, and a cast to
the dtype that a tensor has.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

_ATEN = torch.ops.aten


def write_functions(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Rewrite the nodes in place; each has the value that torch.export saw in `meta["val"]`, a tensor of `mode`."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if (same := _same_value(node)) is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif node.target is _ATEN.slice.Tensor:
            _write_slice(node)
        else:
            for function in _named_like(node.target):
                if _agrees(function, node, mode):
                    node.target = function
                    break


def _same_value(node: fx.Node) -> fx.Node | None:
    """The operand that the operation gives back as it is; None if it does more."""
    packet, x = node.target.overloadpacket, node.args[0] if node.args else None  # type: ignore[union-attr]
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
        return None
    if packet in _DROPOUTS and node.args[2] is False:
        return x
    if packet is _ATEN.slice and tuple(node.args[2:5]) in ((), (0, _TO_THE_END), (0, _TO_THE_END, 1)):
        return x
    if packet is not _ATEN.to or node.kwargs.get("copy") or any(arg is True for arg in node.args[1:]):
        return None
    before, after = x.meta["val"], node.meta["val"]
    is_kept = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
    return x if is_kept and node.kwargs.get("memory_format") in (None, torch.preserve_format) else None


def _write_slice(node: fx.Node) -> None:
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, start, end, step = given
    if isinstance(dim, int):
        dim %= x.meta["val"].dim()
        part = slice(start, None if end == _TO_THE_END else end, step)
        node.target, node.args = Tensor.__getitem__, (x, (*(slice(None),) * dim, part))


def _named_like(op: torch._ops.OpOverload) -> list[Any]:
    """Functions of torch's that were made from the operation's declaration, the likeliest first."""
    name = op.overloadpacket.__name__
    if op.overloadpacket in _WRITTEN:
        return [_WRITTEN[op.overloadpacket]]
    found = [
        getattr(namespace, name)
        for namespace, table in ((torch, torch._C._VariableFunctions), (torch._C._nn, torch._C._nn))
        if getattr(namespace, name, None) is not None and getattr(namespace, name) is getattr(table, name, None)
    ]
    method = getattr(Tensor, name, None)
    return [*found, *([method] if type(method) in (_METHOD, _SLOT) else [])]


def _agrees(function: Any, node: fx.Node, mode: FakeTensorMode) -> bool:
    """Whether the function takes these arguments, and gives what the operation gave, as far as shapes say it."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta.get("val"))
    seen = [value for value in pytree.tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]
    try:
        with mode, torch.no_grad():
            results = pytree.tree_leaves(function(*args, **kwargs))
    except Exception:  # whatever an argument parser says
        return False
    made = [result for result in results if isinstance(result, Tensor)]
    return len(made) == len(seen) and all(
        (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim()) for a, b in zip(made, seen)
    )


_TO_THE_END = 2**63 - 1
_METHOD, _SLOT = type(Tensor.view), type(Tensor.__and__)
_WRITTEN = {
    _ATEN.einsum: torch.einsum,
    _ATEN.sym_size: Tensor.size,
    _ATEN.scaled_dot_product_attention: F.scaled_dot_product_attention,
    _ATEN._grouped_mm: torch._grouped_mm,
    _ATEN.max_pool1d: F.max_pool1d,
    _ATEN.max_pool2d: F.max_pool2d,
    _ATEN.max_pool3d: F.max_pool3d,
    _ATEN.to: Tensor.to,
}
"""Where passes read another function than the one that is made from the declaration, or it is not found by its name."""
_DROPOUTS = (_ATEN.dropout, _ATEN.dropout_, _ATEN.feature_dropout, _ATEN.alpha_dropout, _ATEN.feature_alpha_dropout)
