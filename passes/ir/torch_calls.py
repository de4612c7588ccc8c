"""Torch calls: what torch itself says of a call that a text holds, asked with tensors that have no data.

    matmul of one operand -> a TypeError of torch          neg of 2x2 -> 2x2, whatever the text says

Nothing is computed or changed: operands are on the `meta` device. Where torch cannot say without data (item(),
nonzero), or something else than a tensor goes in, nothing is known, and nothing is wrong.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from passes.ir.operators import is_factory
from passes.ir.targets import is_target, name_of
from passes.ir.types import Types
from runtime.ops.types import OpType, TensorType


def wrong_call(node: fx.Node, types: Types, said: OpType) -> tuple[str, str]:
    """What is wrong with a call_function or call_method node whose result is said to be of type `said`: (what was
    expected, what was got), or two empty strings. `types` are those of the nodes before it.
    """
    if not _can_be_asked(node, types):
        return "", ""
    if node.op == "call_method" and not is_target(f"torch.Tensor.{node.target}"):
        return "a method of tensors that computes, and does nothing else", f"{node.target}()"
    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda each: _without_data(each, types))
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        with torch.no_grad(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
            found = function(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # whatever torch, or a function of torch's in Python, says of wrong arguments
        sentence = str(error).partition("\n")[0]
        is_unknown = isinstance(error, NotImplementedError) or any(word in sentence.lower() for word in _UNKNOWN)
        return ("", "") if is_unknown else ("a call that torch accepts", sentence[:200])
    if not isinstance(said, TensorType):
        return "", ""
    if not isinstance(found, torch.Tensor):
        return f"a {type(found).__name__}, which is !torch.value", str(said)
    is_cast = found.dtype.is_floating_point and said.dtype.is_floating_point  # autocast may have been on
    if tuple(found.shape) != said.shape or not (found.dtype == said.dtype or is_cast):
        return str(TensorType(tuple(found.shape), found.dtype)), str(said)
    return "", ""


def _can_be_asked(node: fx.Node, types: Types) -> bool:
    """A call of torch on tensors whose sizes are known, which gives back no list longer than it is worth."""
    name = f"torch.Tensor.{node.target}" if node.op == "call_method" else name_of(node.target) or ""
    if not name.startswith(_ASKED) or not all(isinstance(types[each], TensorType) for each in node.all_input_nodes):
        return False
    if node.op == "call_method" and not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if name.rpartition(".")[2] in _TO_DEVICES or not (node.all_input_nodes or is_factory(name)):
        return False
    if any(isinstance(each, range) and len(each) > _LONGEST for each in _leaves((node.args, dict(node.kwargs)))):
        return False
    gives_list = any(word in name for word in _LISTS)
    sizes = (size for each in node.all_input_nodes for size in types[each].shape)  # type: ignore[union-attr]
    return not (gives_list and max(sizes, default=0) > _LONGEST)


def _without_data(value: Any, types: Types) -> Any:
    if isinstance(value, fx.Node):
        kind = types[value]
        assert isinstance(kind, TensorType)
        return torch.empty(kind.shape, dtype=kind.dtype, device="meta")
    return torch.device("meta") if _is_device(value) else value


def _is_device(value: Any) -> bool:
    """Also as a text: torch.rand(3, device='cpu') would draw from the process's generator."""
    try:
        return isinstance(value, torch.device) or (isinstance(value, str) and bool(torch.device(value)))
    except RuntimeError:
        return False


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


_ASKED = (
    *("torch.Tensor.", "torch.nn.functional.", "torch._C._nn.", "torch.linalg.", "torch.fft.", "torch.special."),
    *("torch.ops.aten.", "operator.", *(f"torch.{name}" for name in dir(torch._C._VariableFunctions))),
)
"""Functions of tensors. torch._C._set_grad_enabled, say, would change the process."""
_TO_DEVICES = ("cuda", "ipu", "mtia", "pin_memory", "xpu")
"""They start a device."""
_LISTS = ("unbind", "split", "chunk", "__iter__", "meshgrid", "tensors")
_LONGEST = 4096
_UNKNOWN = ("meta", "dtype", "scalar type")
"""Of a sentence of torch's: what it cannot say without data, and what autocast would have cast."""
